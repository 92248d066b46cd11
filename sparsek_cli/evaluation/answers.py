"""lm-eval's generation requests: greedy answers, prompts with a common beginning read once."""

import copy
from typing import Any

import torch
from lm_eval.models.utils import (
    handle_stop_sequences,
    normalize_gen_kwargs,
    postprocess_generated_text,
)

from sparsek_cli.evaluation.prefixes import Group, group_by_prefix
from sparsek_cli.evaluation.reading import PromptReader

EXPANDED_CACHE_BYTES = 1 << 30  # questions answered side by side share at most this much cache


class Answers(PromptReader):
    """`generate_until`."""

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """Greedy answers; sampling goes to lm-eval's own loop."""
        results: list[str] = [""] * len(requests)
        by_settings: dict[str, list[int]] = {}
        for index, request in enumerate(requests):
            by_settings.setdefault(repr(sorted(request.args[1].items())), []).append(index)
        for indices in by_settings.values():
            settings = normalize_gen_kwargs(dict(requests[indices[0]].args[1]), self.max_gen_toks)
            if settings.get("do_sample") or settings.get("num_beams", 1) > 1:
                answers = super().generate_until([requests[i] for i in indices], disable_tqdm)
                self.advance(len(indices))
            else:
                answers = self._answer([requests[i].args[0] for i in indices], settings)
            for index, answer in zip(indices, answers, strict=True):
                results[index] = answer
        return results

    def _answer(self, prompts: list[str], settings: dict[str, Any]) -> list[str]:
        eos = self.tok_decode(self.eot_token_id, skip_special_tokens=False)
        until = handle_stop_sequences(settings.get("until"), eos=eos)
        room = min(settings["max_gen_toks"], self.max_new_tokens or settings["max_gen_toks"])
        sequences = []
        for prompt in prompts:
            tokens = self.tok_encode(prompt)
            self._saw_prompt(len(tokens) + room)
            sequences.append(self._fit(tokens, self.max_length - room))
        if self.share_prefix:
            groups = group_by_prefix(sequences, [len(s) - 1 for s in sequences])
        else:
            groups = [Group(0, [i]) for i in range(len(sequences))]
        results = [""] * len(prompts)
        for group in groups:
            shared = self._new_cache()
            if group.prefix:
                self._read(sequences[group.members[0]][: group.prefix], shared, keep=1)
                self._saw_cache(shared, group.prefix)
            for batch in self._batches(group, sequences):
                rests = torch.tensor([sequences[i][group.prefix :] for i in batch])
                cache = copy.deepcopy(shared) if group.prefix else shared
                if len(batch) > 1:
                    cache.reorder_cache(
                        torch.zeros(len(batch), dtype=torch.long, device=self.device)
                    )
                texts = self._decode(rests, cache, until, room)
                for index, text in zip(batch, texts, strict=True):
                    results[index] = postprocess_generated_text(text, until, None)
                self.advance(len(batch))
        return results

    def _batches(self, group: Group, sequences: list[list[int]]) -> list[list[int]]:
        """A group's members in batches of equal length, so that no padding is needed."""
        if not group.prefix:
            return [group.members]
        by_length: dict[int, list[int]] = {}
        for index in group.members:
            by_length.setdefault(len(sequences[index]), []).append(index)
        rows = max(1, EXPANDED_CACHE_BYTES // max(1, self.proof.kv_bytes))
        return [
            members[start : start + rows]
            for members in by_length.values()
            for start in range(0, len(members), rows)
        ]

    def _decode(self, ids: torch.Tensor, cache: Any, until: list[str], room: int) -> list[str]:
        """Greedy continuations of [B, n] prompts (or their rests) whose beginning `cache` holds."""
        single = ids.shape[0] == 1
        logits = self._read(ids, cache, keep=1)
        if single:
            self._saw_cache(cache, cache.get_seq_length())
        ends = _end_tokens(self.model, self.eot_token_id)
        answers: list[list[int]] = [[] for _ in range(ids.shape[0])]
        running = list(range(ids.shape[0]))
        for _ in range(room):
            tokens = logits[:, -1].float().argmax(dim=-1)
            chosen = tokens.tolist()
            for row in list(running):
                answers[row].append(chosen[row])
                if chosen[row] in ends or self._stopped(answers[row], until):
                    running.remove(row)
            if not running or len(answers[running[0]]) == room:
                break
            logits = self._read(tokens[:, None], cache, keep=1)
        return [self.tok_decode(answer) for answer in answers]

    def _stopped(self, answer: list[int], until: list[str]) -> bool:
        text = self.tok_decode(answer[-32:], skip_special_tokens=False)
        return any(stop and stop in text for stop in until)


def _end_tokens(model: Any, eos: int) -> set[int]:
    """Tokens that end an answer: the generation config's (often several) and the tokenizer's."""
    configured = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    listed = configured if isinstance(configured, list) else [configured]
    return {token for token in [*listed, eos] if token is not None}
