"""Prefill for lm-eval's requests: prompts read into a policy's cache."""

from array import array
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import torch
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import normalize_gen_kwargs

from sparsek_cli.errors import DAMAGED_OR_TOO_LARGE, SparsekError
from sparsek_cli.evaluation.lm.proof import Proof
from sparsek_cli.evaluation.settings import Prompts

if TYPE_CHECKING:
    from sparsek_cli.evaluation.policies.policy import Policy

ENCODERS = 8  # threads
LONG = 1000  # characters from which on a string's tokens are remembered


def check_numbers(logits: torch.Tensor) -> None:
    """Raises SparsekError where they are none, of which the largest would be the answer."""
    if logits.isnan().any():
        raise SparsekError("the model's output is not a number", hint=DAMAGED_OR_TOO_LARGE)


class PromptReader(HFLM):
    """One model under one policy.

    Args:
        model: any causal LM in eval mode, on its device.
        tokenizer: its tokenizer.
        policy: what attends and what the cache is.
        max_length: most tokens of prompt and answer together, in place of what `prompts` asks for.
        prompts: how they are read and answered. Without a batch size, prompts that share no
            beginning are scored one by one, and read and answered one by one on a CPU, as many
            together as memory allows on a GPU.
        advance: called with the number of requests finished.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        policy: "Policy",
        max_length: int,
        prompts: Prompts,
        advance: Callable[[int], None] = lambda count: None,
    ):
        super().__init__(
            pretrained=model,
            tokenizer=tokenizer,
            backend="causal",
            max_length=max_length,
            batch_size=prompts.batch_size or 1,
            device=str(model.device),
        )
        self.policy = policy
        self.truncate = None if prompts.truncate == "refuse" else prompts.truncate
        self.answers_together = prompts.batch_size
        self.share_prefix = prompts.share_prefix
        self.max_new_tokens = prompts.max_new_tokens
        self.advance = advance
        self.proof = Proof()
        self._encodings: dict[str, array[int]] = {}  # lists take nine times as much

    def tok_encode(self, string: str, *args: Any, **kwargs: Any) -> list[int]:
        """As lm-eval's, remembering long strings: they are measured first and run later."""
        if args or kwargs or len(string) < LONG:
            return super().tok_encode(string, *args, **kwargs)
        if string not in self._encodings:
            self._encodings[string] = array("i", super().tok_encode(string))
        return self._encodings[string].tolist()

    def _remember(self, strings: Iterable[str]) -> None:
        """Encodes long strings on all cores: while it does, a tokenizer lets other threads work."""
        known = self._encodings
        long = [text for text in dict.fromkeys(strings) if len(text) >= LONG and text not in known]
        for first in long[:1]:  # by itself: it gives the tokenizer the settings that it keeps
            self.tok_encode(first)
        with ThreadPoolExecutor(ENCODERS) as pool:
            list(pool.map(self.tok_encode, long[1:]))

    def forget_encodings(self) -> None:
        self._encodings.clear()

    def over_limit(self, instances: Sequence[Any]) -> tuple[int, int]:
        """(requests that do not fit, tokens of the longest request with its answer)."""
        over = longest = 0
        written = (i.args[0] for i in instances if i.request_type == "generate_until")
        self._remember(written)
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

    def wants_chance_or_beams(self, instances: Sequence[Any]) -> bool:
        """Whether an answer is to be drawn at random, or searched for with beams.

        lm-eval's own loop would write those with a cache of its own, whatever the policy's is.
        """
        settings = (
            normalize_gen_kwargs(dict(instance.args[1]), self.max_gen_toks)
            for instance in instances
            if instance.request_type == "generate_until"
        )
        return any(one["do_sample"] or one.get("num_beams", 1) > 1 for one in settings)

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

    @torch.no_grad()
    def _read(
        self, tokens: Sequence[int] | torch.Tensor, cache: Any, keep: int = 0, **placed: Any
    ) -> torch.Tensor:
        """Feeds tokens ([n] ids or an int64 tensor [B, n]) after what `cache` holds.

        `placed` (position_ids, attention_mask) places a single token of rows of unequal length.

        Returns:
            Logits [B, keep, V] of the last `keep` positions; all of them when `keep` is 0.
        """
        ids = torch.as_tensor(tokens, dtype=torch.long, device=self.device)
        ids = ids[None] if ids.ndim == 1 else ids
        pieces = []
        step = self.policy.read_chunk
        for start in range(0, ids.shape[1], step):
            chunk = ids[:, start : start + step]
            after = ids.shape[1] - start - chunk.shape[1]  # tokens still to come
            wanted = chunk.shape[1] if keep == 0 else max(0, min(keep - after, chunk.shape[1]))
            # logits_to_keep=0 means all of them; a position that nobody wants costs little.
            asked = 0 if wanted == chunk.shape[1] else max(wanted, 1)
            logits = self.model(
                input_ids=chunk,
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=asked,
                **placed,
            ).logits
            if wanted:
                pieces.append(logits)
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=1)

    def _new_cache(self) -> Any:
        return self.policy.new_cache(self.model)

    def _saw_cache(self, cache: Any, tokens: int, row: int = 0, padding: int = 0) -> None:
        bounded = [layer.bounded for layer in cache.layers if hasattr(layer, "bounded")]
        if self.policy.evicts_after_prompt and not all(bounded):
            return  # the prompt is still being read
        self.proof.saw_cache(cache, tokens, self.model.config, row, padding)

    def vocab_width(self) -> int:
        return self.model.config.vocab_size
