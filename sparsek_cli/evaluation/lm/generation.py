"""lm-eval's generation requests: greedy answers, prompts with a common beginning read once."""

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from lm_eval.models.utils import (
    handle_stop_sequences,
    normalize_gen_kwargs,
    postprocess_generated_text,
)

from sparsek_cli.evaluation.lm.batching import Joined, can_join, join
from sparsek_cli.evaluation.lm.contexts import ContextCaches, place_in
from sparsek_cli.evaluation.lm.prefill import check_numbers
from sparsek_cli.evaluation.lm.proof import row_bytes
from sparsek_cli.evaluation.lm.read_together import (
    TOGETHER,
    Read,
    TogetherReader,
    memory_for_caches,
)
from sparsek_cli.evaluation.lm.shared_prefixes import Group, common
from sparsek_cli.evaluation.lm.slot_steps import SlotSteps, in_slots
from sparsek_cli.evaluation.policies.snapkv_h2o import observed_attention
from sparsek_cli.models import SparseKCache
from sparsek_cli.models.generation.kept_decoders import decoder_for

SHARED_CACHE_BYTES = 1 << 30  # questions about one document share at most this much cache
MOST_TOGETHER = 32
GRAPHED = ("cuda",)  # devices on which a decoding step is a graph

Written = tuple[list[int], list[str]]  # which prompts, and their answers


class Answers(TogetherReader):
    """`generate_until`."""

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """Greedy answers; what asks for others has been left out (see `wants_chance_or_beams`)."""
        results: list[str] = [""] * len(requests)
        by_settings: dict[str, list[int]] = {}
        for index, request in enumerate(requests):
            by_settings.setdefault(repr(sorted(request.args[1].items())), []).append(index)
        for indices in by_settings.values():
            settings = normalize_gen_kwargs(dict(requests[indices[0]].args[1]), self.max_gen_toks)
            answers = self._answer([requests[i] for i in indices], settings)
            for index, answer in zip(indices, answers, strict=True):
                results[index] = answer
        return results

    def _answer(self, requests: list[Any], settings: dict[str, Any]) -> list[str]:
        eos = self.tok_decode(self.eot_token_id, skip_special_tokens=False)
        until = handle_stop_sequences(settings.get("until"), eos=eos)
        room = min(settings["max_gen_toks"], self.max_new_tokens or settings["max_gen_toks"])
        prompts = [request.args[0] for request in requests]
        self._remember(prompts)
        sequences = []
        for prompt in prompts:
            # An empty prompt is the token that every text begins with.
            tokens = self.tok_encode(prompt) or [self.prefix_token_id]
            self._saw_prompt(len(tokens) + room)
            sequences.append(self._fit(tokens, self.max_length - room))
        results = [""] * len(requests)
        # The end token is known by its id; looking for its text would decode every row every step.
        stops = [stop for stop in until if stop != eos]
        for indices, texts in self._all_written(requests, sequences, stops, room):
            for index, text in zip(indices, texts, strict=True):
                results[index] = postprocess_generated_text(text, until, None)
            self.advance(len(indices))
        return results

    def _all_written(
        self, requests: list[Any], sequences: list[list[int]], until: list[str], room: int
    ) -> Iterator[Written]:
        if self.policy.evicts_before_question:
            sizes = self._context_sizes(requests, sequences)
            contexts = ContextCaches(self)
            order = sorted(range(len(sizes)), key=lambda i: (-sizes[i], sequences[i][: sizes[i]]))
            yield from self._write_alone(
                [[i] for i in order],
                lambda i: [contexts.after(sequences[i], sizes[i])],
                until,
                room,
            )
            return
        if self.policy.evicts_after_prompt and _first_turn(requests[0]) is not None:
            yield from self._write_turns(requests, sequences, until, room)
            return
        batches, groups = self._together_or_shared(sequences)
        yield from self._write_alone(
            batches,
            lambda *members: self._read_prompts([sequences[i] for i in members]),
            until,
            room,
        )
        for group in groups:
            yield from self._write_shared(group, sequences, until, room)

    def _write_turns(
        self, requests: list[Any], sequences: list[list[int]], until: list[str], room: int
    ) -> Iterator[Written]:
        """Conversations under a policy that evicts at a question: it does so at the first one."""
        for index, (request, sequence) in enumerate(zip(requests, sequences, strict=True)):
            told = self.tok_encode(_first_turn(request))
            first = common(told, sequence)
            if first < len(told) - 1:  # the user had the prompt cut: all of it is one turn
                first = len(sequence)
            cache = self._new_cache()
            logits = self._read_end(sequence[:first], cache)
            for token in sequence[first:]:  # as when they were written: each may push a pair out
                logits = self._read([token], cache, keep=1)
            yield [index], self._decode(logits, cache, until, room)

    # ------------------------------------------------------------------ prompts by themselves

    def _write_alone(
        self, batches: Sequence[list[int]], read: Callable, until: list[str], room: int
    ) -> Iterator[Written]:
        """As many answers written together as memory allows, of prompts read in `batches`.

        Args:
            read: numbers of prompts -> what was `Read`.
        """
        pile: list[tuple[int, Any, torch.Tensor]] = []
        largest = 0
        for number, members in enumerate(batches, 1):
            for index, (cache, logits) in zip(members, read(*members), strict=True):
                pile.append((index, cache, logits))
                largest = max(largest, row_bytes(cache, room))
                last = number == len(batches) and index == members[-1]
                if len(pile) >= self._together(largest) or last:
                    yield [i for i, _, _ in pile], self._write_pile(pile, until, room)
                    pile, largest = [], 0

    def _together(self, size: int) -> int:
        """How many answers to write side by side when the largest cache takes `size` bytes.

        Joined rows are as large as the largest, and the caches they came from stay meanwhile.
        """
        if self.answers_together is not None:
            return self.answers_together
        room = memory_for_caches(self.device)
        return 1 if room is None else max(1, min(MOST_TOGETHER, room // max(1, size)))

    def _write_pile(
        self, pile: Sequence[tuple[int, Any, torch.Tensor]], until: list[str], room: int
    ) -> list[str]:
        joined = None
        if len(pile) > 1:
            try:
                joined = join([cache for _, cache, _ in pile])
                if joined is not None:
                    logits = torch.cat([first for _, _, first in pile])
                    return self._decode(logits, joined.cache, until, room, joined)
            except torch.OutOfMemoryError:  # one by one then: the caches of the pile are whole
                joined = None
        return [self._decode(first, cache, until, room)[0] for _, cache, first in pile]

    # ------------------------------------------------------------------ prompts about one document

    def _write_shared(
        self, group: Group, sequences: list[list[int]], until: list[str], room: int
    ) -> Iterator[Written]:
        """The common beginning is read once.

        On a GPU all answers come together where their caches can be joined, else those to rests of
        equal length.
        """
        shared = self._new_cache()
        self._read(sequences[group.members[0]][: group.prefix], shared, keep=1)
        self._saw_cache(shared, group.prefix)
        if self.device.type in TOGETHER and can_join(shared):

            def read(index: int) -> list[Read]:
                cache = copy.deepcopy(shared)
                return [(cache, self._read_end(sequences[index][group.prefix :], cache))]

            yield from self._write_alone([[i] for i in group.members], read, until, room)
            return
        longest = max(len(sequences[i]) for i in group.members)
        size = row_bytes(shared, longest - group.prefix + room)
        rows = max(1, SHARED_CACHE_BYTES // max(1, size))
        by_length: dict[int, list[int]] = {}
        for index in group.members:
            by_length.setdefault(len(sequences[index]), []).append(index)
        for members in by_length.values():
            for start in range(0, len(members), rows):
                batch = members[start : start + rows]
                rests = torch.tensor([sequences[i][group.prefix :] for i in batch])
                cache = copy.deepcopy(shared)
                if len(batch) > 1:
                    first = torch.zeros(len(batch), dtype=torch.long, device=self.device)
                    cache.reorder_cache(first)
                logits = self._read_end(rests, cache)
                yield batch, self._decode(logits, cache, until, room)

    # ------------------------------------------------------------------ decoding

    def _decode(
        self,
        logits: torch.Tensor,
        cache: Any,
        until: list[str],
        room: int,
        joined: Joined | None = None,
    ) -> list[str]:
        """Greedy answers after prompts that `cache` holds.

        Args:
            logits: [B, 1, V] of the first token.
            joined: where the rows of `cache` stand, when they may differ in length.
        """
        ends = _end_tokens(self.model, self.eot_token_id)
        answers: list[list[int]] = [[] for _ in range(logits.shape[0])]
        running = list(range(logits.shape[0]))
        read, padding = _row_lengths(cache, len(running), joined)
        slots = self._slots(cache, joined, room)
        cache = slots or cache
        check_numbers(logits)
        with self._steps(cache, joined, slots is not None) as read_words:
            for step in range(room):
                tokens = logits[:, -1].float().argmax(dim=-1)
                chosen = tokens.tolist()
                for row in list(running):
                    answers[row].append(chosen[row])
                    stops = chosen[row] in ends or self._stopped(answers[row], until)
                    if stops or step + 1 == room:
                        running.remove(row)
                        # Now: until the others end, more is read into the row than its answer.
                        self._saw_cache(cache, read[row] + step, row, padding[row])
                if not running:
                    break
                logits = read_words(tokens, step)
        check_numbers(logits)  # of what was answered: once it is none, it stays so
        return [self.tok_decode(answer) for answer in answers]

    def _slots(self, cache: Any, joined: Joined | None, room: int) -> Any:
        """The cache in slots that never move, on a GPU; None where it stays as it is."""
        if self.device.type not in GRAPHED or isinstance(cache, SparseKCache):
            return None
        return in_slots(self.model, cache, joined, room)

    @contextmanager
    def _steps(self, cache: Any, joined: Joined | None, slots: bool) -> Iterator[Callable]:
        """Reads one token of every row: (tokens [B], steps before) -> logits [B, 1, V].

        A SparseK cache is empty afterwards.
        """
        if slots:
            steps = SlotSteps(self.model, cache, cache.layers[0].after)
            # Policies that evict see every query already.
            known = nullcontext() if self.policy.evicts_after_prompt else None
            with known or observed_attention(self.model):
                yield lambda tokens, step: steps.read(tokens)
            return
        if isinstance(cache, SparseKCache) and cache.all_slots:
            positions = cache.layers[0].state.seen if joined is None else joined.positions
            with (
                decoder_for(self.model, cache.batch_size) as decoder,
                decoder.over(cache, positions, keep=False),
            ):
                yield lambda tokens, step: decoder.read(tokens)[:, None]
            return
        mask = None if joined is None else joined.mask

        def read(tokens: torch.Tensor, step: int) -> torch.Tensor:
            nonlocal mask
            placed: dict[str, torch.Tensor] = {}
            if joined is not None:
                placed["position_ids"] = (joined.positions + step)[:, None]
            if mask is not None:
                mask = torch.nn.functional.pad(mask, (0, 1), value=True)
                placed["attention_mask"] = mask
            return self._read(tokens[:, None], cache, keep=1, **placed)

        yield read

    def _stopped(self, answer: list[int], until: list[str]) -> bool:
        if not until:
            return False
        text = self.tok_decode(answer[-32:], skip_special_tokens=False)
        return any(stop and stop in text for stop in until)


def _row_lengths(cache: Any, rows: int, joined: Joined | None) -> tuple[list[int], list[int]]:
    """(tokens read, padding before them) of each row of a cache whose prompts have been read."""
    if joined is None:
        return [cache.get_seq_length()] * rows, [0] * rows
    read = joined.positions.tolist()
    padded = joined.mask is not None
    return read, [max(read) - tokens if padded else 0 for tokens in read]


def _first_turn(request: Any) -> str | None:
    """What a conversation says before its first answer; None for other prompts."""
    size = (request.doc or {}).get("first_turn")
    if size is None:
        return None
    return request.args[0][: place_in(request.args[0], request.doc["prompt"]) + size]


def _end_tokens(model: Any, eos: int) -> set[int]:
    """Tokens that end an answer: the generation config's (often several) and the tokenizer's."""
    configured = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    listed = configured if isinstance(configured, list) else [configured]
    return {token for token in [*listed, eos] if token is not None}
