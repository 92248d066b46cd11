"""lm-eval's Hugging Face model class, made to tell what it did.

Different from `HFLM`: every pass goes through the policy's own cache, so that bytes come from real
tensors; prompts that share their beginning read it once; nothing is cut unless the user said how,
and then it is counted; passages report the loss of every token. Prompts, stop sequences and scoring
are lm-eval's.
"""

import copy
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import (
    handle_stop_sequences,
    normalize_gen_kwargs,
    postprocess_generated_text,
)
from torch.nn import functional

from sparsek_cli.evaluation.ppl import TokenLogLikelihood
from sparsek_cli.evaluation.prefixes import Group, group_by_prefix
from sparsek_cli.evaluation.proof import Proof

if TYPE_CHECKING:
    from sparsek_cli.evaluation.policies import Policy

PREFILL_CHUNK = 8192  # tokens fed at once
LOGITS_BYTES = 1 << 30  # larger float32 logits are not formed whole
EXPANDED_CACHE_BYTES = 1 << 30  # questions answered side by side share at most this much cache

Request = tuple[Any, list[int], list[int]]


class SparsekLM(HFLM):
    """One model under one policy.

    Args:
        model: any causal LM in eval mode, on its device.
        tokenizer: its tokenizer.
        policy: what attends and what the cache is.
        max_length: most tokens of prompt and answer together.
        truncate: None (refuse), "left" or "middle": what to do with longer prompts.
        batch_size: prompts without a shared beginning that are scored side by side.
        share_prefix: read shared beginnings once.
        max_new_tokens: upper bound on answers, below the task's own.
        advance: called with the number of requests finished.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        policy: "Policy",
        max_length: int,
        truncate: str | None = None,
        batch_size: int = 1,
        share_prefix: bool = True,
        max_new_tokens: int | None = None,
        advance: Callable[[int], None] = lambda count: None,
    ):
        super().__init__(
            pretrained=model,
            tokenizer=tokenizer,
            backend="causal",
            max_length=max_length,
            batch_size=batch_size,
            device=str(model.device),
        )
        self.policy = policy
        self.truncate = truncate
        self.share_prefix = share_prefix
        self.max_new_tokens = max_new_tokens
        self.advance = advance
        self.proof = Proof()
        self._encodings: dict[str, list[int]] = {}

    # ------------------------------------------------------------------ lengths

    def tok_encode(self, string: str, *args: Any, **kwargs: Any) -> list[int]:
        """As lm-eval's, remembering long strings: they are measured first and run later."""
        if args or kwargs or len(string) < 1000:
            return super().tok_encode(string, *args, **kwargs)
        if string not in self._encodings:
            self._encodings[string] = super().tok_encode(string)
        return list(self._encodings[string])

    def forget_encodings(self) -> None:
        self._encodings.clear()

    def over_limit(self, instances: Sequence[Any]) -> tuple[int, int]:
        """(requests that do not fit, tokens of the longest request with its answer)."""
        over = longest = 0
        for instance in instances:
            if instance.request_type == "generate_until":
                size = len(self.tok_encode(instance.args[0])) + self._room(instance.args[1])
            elif instance.request_type == "loglikelihood":
                # One less: the last token of a continuation is never fed.
                size = (
                    sum(map(len, self._encode_pair(*instance.args))) - 1 if instance.args[0] else 0
                )
            else:
                size = 0  # rolling windows are that request's own definition
            over += size > self.max_length
            longest = max(longest, size)
        return over, longest

    def _room(self, gen_kwargs: dict[str, Any]) -> int:
        own = normalize_gen_kwargs(dict(gen_kwargs), self.max_gen_toks)["max_gen_toks"]
        return min(own, self.max_new_tokens or own)

    def _fit(self, tokens: list[int], limit: int) -> list[int]:
        """`tokens` cut to `limit` the way the user chose."""
        excess = len(tokens) - limit
        if excess <= 0:
            return tokens
        if self.truncate is None:
            raise ValueError(f"a prompt of {len(tokens)} tokens does not fit into {limit}")
        self.proof.truncated_prompts += 1
        self.proof.truncated_tokens += excess
        if self.truncate == "left":
            return tokens[excess:]
        head = limit // 2
        return tokens[:head] + tokens[len(tokens) - (limit - head) :]

    def _saw_prompt(self, size: int) -> None:
        self.proof.prompts += 1
        self.proof.longest_prompt = max(self.proof.longest_prompt, size)

    # ------------------------------------------------------------------ model

    @torch.no_grad()
    def _read(
        self, tokens: Sequence[int] | torch.Tensor, cache: Any, keep: int = 0
    ) -> torch.Tensor:
        """Feeds tokens ([n] ids or an int64 tensor [B, n]) after what `cache` holds.

        Returns:
            Logits [B, keep, V] of the last `keep` positions; all of them when `keep` is 0.
        """
        ids = torch.as_tensor(tokens, dtype=torch.long, device=self.device)
        ids = ids[None] if ids.ndim == 1 else ids
        pieces = []
        for start in range(0, ids.shape[1], PREFILL_CHUNK):
            chunk = ids[:, start : start + PREFILL_CHUNK]
            after = ids.shape[1] - start - chunk.shape[1]  # tokens still to come
            wanted = chunk.shape[1] if keep == 0 else max(0, min(keep - after, chunk.shape[1]))
            # logits_to_keep=0 means all of them; a position that nobody wants costs little.
            asked = 0 if wanted == chunk.shape[1] else max(wanted, 1)
            logits = self.model(
                input_ids=chunk, past_key_values=cache, use_cache=True, logits_to_keep=asked
            ).logits
            if wanted:
                pieces.append(logits)
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=1)

    def _new_cache(self) -> Any:
        return self.policy.new_cache(self.model)

    def _saw_cache(self, cache: Any, tokens: int) -> None:
        self.proof.saw_cache(cache, tokens, self.model.config)

    # ------------------------------------------------------------------ likelihoods

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """As lm-eval's; a text of one window comes back with the loss of each token."""
        results = []
        for request in requests:
            tokens = self.tok_encode(request.args[0])
            self._saw_prompt(len(tokens))
            parts = [
                self._score_passage(
                    tokens[start : start + self.max_length], tokens[start - 1 : start]
                )
                for start in range(0, max(1, len(tokens)), self.max_length)
            ]
            # Summed where and as lm-eval sums, so that the total is its total to the last digit.
            total = sum(float(part.sum()) for part in parts)
            each = np.concatenate([part.cpu().numpy() for part in parts])
            results.append(TokenLogLikelihood(each, total))
            self.advance(1)
        return results

    def _score_passage(self, tokens: list[int], before: list[int]) -> torch.Tensor:
        """Log-likelihood (nats, float32 [n]) of each token given the ones before it."""
        ids = [*(before or [self.prefix_token_id]), *tokens]
        cache = self._new_cache()
        scores, target = [], torch.tensor(tokens, device=self.device)
        step = max(256, LOGITS_BYTES // (4 * self.vocab_width()))
        for start in range(0, len(tokens), step):
            logits = self._read(ids[start : min(start + step, len(tokens))], cache)[0]
            log_p = functional.log_softmax(logits, dim=-1, dtype=torch.float32)
            scores.append(log_p.gather(1, target[start : start + step, None])[:, 0])
        self._saw_cache(cache, len(tokens))
        return torch.cat(scores)

    def vocab_width(self) -> int:
        return self.model.get_output_embeddings().weight.shape[0]

    def _loglikelihood_tokens(
        self, requests: list[Request], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        sequences, answers = [], []
        for _, context, continuation in requests:
            self._saw_prompt(len(context) + len(continuation) - 1)
            context = self._fit(context, self.max_length + 1 - len(continuation))
            sequences.append((context + continuation)[:-1])
            answers.append(continuation)
        results: list[tuple[float, bool]] = [(0.0, False)] * len(requests)
        limits = [len(s) - len(a) for s, a in zip(sequences, answers, strict=True)]
        if self.share_prefix:
            groups = group_by_prefix(sequences, limits)
        else:
            groups = [Group(0, [i]) for i in sorted(range(len(requests)), key=lambda i: -limits[i])]
        alone = [group.members[0] for group in groups if len(group.members) == 1]
        for start in range(0, len(alone), self.batch_size):
            batch = alone[start : start + self.batch_size]
            chosen = [(sequences[i], len(answers[i])) for i in batch]
            for i, log_p in zip(batch, self._score_batch(chosen), strict=True):
                results[i] = _score(log_p, answers[i])
            self.advance(len(batch))
        for group in groups:
            if len(group.members) == 1:
                continue
            shared = self._new_cache()
            self._read(sequences[group.members[0]][: group.prefix], shared, keep=1)
            self._saw_cache(shared, group.prefix)
            for i in group.members:
                logits = self._read(
                    sequences[i][group.prefix :], copy.deepcopy(shared), keep=len(answers[i])
                )
                results[i] = _score(_log_softmax(logits[0]), answers[i])
                self.advance(1)
        return results

    def _score_batch(self, batch: list[tuple[list[int], int]]) -> list[torch.Tensor]:
        """Log-probabilities [answer, V] of each (sequence, answer length), padded together."""
        longest = max(len(sequence) for sequence, _ in batch)
        if len(batch) == 1:
            sequence, size = batch[0]
            cache = self._new_cache()
            # All logits, as lm-eval forms them, unless they are huge.
            whole = longest * self.vocab_width() * 4 <= LOGITS_BYTES
            logits = self._read(sequence, cache, keep=0 if whole else size)
            self._saw_cache(cache, len(sequence))
            return [_log_softmax(logits[0])[-size:]]
        if not self.proof.kv_tokens:
            cache = self._new_cache()
            self._read(max(batch, key=lambda item: len(item[0]))[0], cache, keep=1)
            self._saw_cache(cache, longest)
        rows = [sequence + [0] * (longest - len(sequence)) for sequence, _ in batch]
        with torch.no_grad():
            ids = torch.tensor(rows, dtype=torch.long, device=self.device)
            logits = self.model(input_ids=ids, use_cache=False).logits
        log_p = _log_softmax(logits)
        return [log_p[row, len(s) - n : len(s)] for row, (s, n) in enumerate(batch)]

    # ------------------------------------------------------------------ answers

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


def _log_softmax(logits: torch.Tensor) -> torch.Tensor:
    return functional.log_softmax(logits, dim=-1, dtype=torch.float32)


def _score(log_p: torch.Tensor, answer: list[int]) -> tuple[float, bool]:
    """(log-likelihood, greedy would say it) of `answer` under log_p [n, V]."""
    target = torch.tensor(answer, device=log_p.device)
    chosen = log_p.gather(1, target[:, None])[:, 0]
    return float(chosen.sum()), bool((log_p.argmax(dim=-1) == target).all())
