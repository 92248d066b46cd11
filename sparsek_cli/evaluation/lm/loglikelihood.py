"""lm-eval's likelihood requests: passages, and answers after a context."""

import copy
from typing import Any

import numpy as np
import torch
from torch.nn import functional

from sparsek_cli.evaluation.lm.prefill import PromptReader, check_numbers
from sparsek_cli.evaluation.lm.shared_prefixes import Group, group_by_prefix
from sparsek_cli.evaluation.tasks.ppl import TokenLogLikelihood

LOGITS_BYTES = 1 << 30  # larger float32 logits are not formed whole

Request = tuple[Any, list[int], list[int]]


class Likelihoods(PromptReader):
    """`loglikelihood` and `loglikelihood_rolling`."""

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
        alone = [group.members[0] for group in groups if self._may_batch(group)]
        for start in range(0, len(alone), self.batch_size):
            batch = alone[start : start + self.batch_size]
            chosen = [(sequences[i], len(answers[i])) for i in batch]
            for i, log_p in zip(batch, self._score_batch(chosen), strict=True):
                results[i] = _score(log_p, answers[i])
            self.advance(len(batch))
        for group in groups:
            if self._may_batch(group):
                continue
            shared = self._new_cache()
            if group.prefix:
                self._read(sequences[group.members[0]][: group.prefix], shared, keep=1)
                self._saw_cache(shared, group.prefix)
            for i in group.members:
                log_p = self._score_rest(
                    sequences[i][group.prefix :], copy.deepcopy(shared), len(answers[i])
                )
                results[i] = _score(log_p, answers[i])
                self.advance(1)
        return results

    def _may_batch(self, group: Group) -> bool:
        return len(group.members) == 1 and not self.policy.evicts_after_prompt

    def _score_rest(self, rest: list[int], cache: Any, size: int) -> torch.Tensor:
        """Log-probabilities [size, V] at the last `size` of the tokens fed after `cache`."""
        if not self.policy.evicts_after_prompt:
            logits = self._read(rest, cache, keep=size)
            self._saw_cache(cache, cache.get_seq_length())
            return _log_softmax(logits[0])
        context, answer = rest[: len(rest) - size + 1], rest[len(rest) - size + 1 :]
        pieces = [self._read(context, cache, keep=1)]
        self.policy.end_prompt(self.model, cache)
        # One by one, as an answer is written: each token may push a pair out.
        pieces += [self._read([token], cache, keep=1) for token in answer]
        self._saw_cache(cache, cache.get_seq_length())
        return _log_softmax(torch.cat(pieces, dim=1)[0])

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
        try:
            with torch.no_grad():
                ids = torch.tensor(rows, dtype=torch.long, device=self.device)
                log_p = _log_softmax(self.model(input_ids=ids, use_cache=False).logits)
        except torch.OutOfMemoryError:
            half = len(batch) // 2
            return self._score_batch(batch[:half]) + self._score_batch(batch[half:])
        return [log_p[row, len(s) - n : len(s)] for row, (s, n) in enumerate(batch)]


def _log_softmax(logits: torch.Tensor) -> torch.Tensor:
    return functional.log_softmax(logits, dim=-1, dtype=torch.float32)


def _score(log_p: torch.Tensor, answer: list[int]) -> tuple[float, bool]:
    """(log-likelihood, greedy would say it) of `answer` under log_p [n, V].

    Raises:
        SparsekError: it is no number: of choices the first would be the likeliest.
    """
    target = torch.tensor(answer, device=log_p.device)
    chosen = log_p.gather(1, target[:, None])[:, 0]
    check_numbers(chosen)
    return float(chosen.sum()), bool((log_p.argmax(dim=-1) == target).all())
