"""Prompts of which the context is read first, and evicted, before the question is seen."""

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch

from sparsek_cli.data.chat_format import ChatFormat, TemplateFails
from sparsek_cli.errors import SparsekError
from sparsek_cli.evaluation.lm.prefill import PromptReader
from sparsek_cli.evaluation.lm.shared_prefixes import common
from sparsek_cli.evaluation.policies.kvzip import REPEAT


def place_in(prompt: str, part: str, find: Callable[[str, str], int] = str.index) -> int:
    """Where a part of a task's prompt begins in what is read of it, in characters.

    A chat template may stand around it, and most take white space off its ends.

    Raises:
        SparsekError: it is not there as it was.
    """
    try:
        return find(prompt, part.strip()) - (len(part) - len(part.lstrip()))
    except ValueError as error:
        raise SparsekError(
            "the chat template changes what the task says, so that nobody knows where its question "
            "begins",
            hint="chat_template=off, or leave baselines out that evict at a question",
        ) from error


class ContextReader(PromptReader):
    """What a policy needs that evicts before the question."""

    def _context_sizes(self, requests: Sequence[Any], sequences: Sequence[list[int]]) -> list[int]:
        """How many first tokens of each prompt are its context, the user's cuts regarded."""
        sizes = []
        prompts = [request.args[0] for request in requests]
        contexts = [
            prompt[: place_in(prompt, request.doc["asked"], str.rindex)]
            for prompt, request in zip(prompts, requests, strict=True)
        ]
        self._remember(contexts)
        for prompt, context, sequence in zip(prompts, contexts, sequences, strict=True):
            whole, told = self.tok_encode(prompt), self.tok_encode(context)
            question = len(whole) - common(told, whole)
            sizes.append(max(1, len(sequence) - question))
        return sizes

    def _read_context(self, context: list[int]) -> Any:
        """The bounded cache of a context that was read and told again."""
        cache = self._new_cache()
        self._read(context, cache, keep=1)
        self.policy.tell_again(self.model, cache, context, self._opening(context))
        self.policy.end_prompt(self.model, cache)
        self._saw_cache(cache, len(context))
        return cache

    def _opening(self, context: list[int]) -> list[int]:
        """Tokens of the request to repeat what was told, and what begins a reply to it."""
        request = self.tok_encode(REPEAT, add_special_tokens=False)
        try:
            chat = ChatFormat.of(self.tokenizer)
        except (ValueError, TemplateFails):
            return request
        start = list(chat.start)
        return request + list(chat.reply) if start and context[: len(start)] == start else request

    def _read_question(self, question: list[int], cache: Any) -> torch.Tensor:
        """Reads what follows a context; logits [1, 1, V] of the answer's first token.

        Half a window at once: each token pushes a pair out, and must not push out what is read
        with it.
        """
        recent = next(layer.recent for layer in cache.layers if hasattr(layer, "recent"))
        step = max(1, recent // 2)
        for start in range(0, len(question), step):
            logits = self._read(question[start : start + step], cache, keep=1)
        self._saw_cache(cache, cache.get_seq_length())
        return logits


class ContextCaches:
    """Caches of contexts: of consecutive prompts with the same context, it is read once."""

    def __init__(self, reader: ContextReader):
        self._reader = reader
        self._context: list[int] | None = None
        self._cache: Any = None

    def after(self, sequence: list[int], size: int) -> tuple[Any, torch.Tensor]:
        """(cache, logits [1, 1, V]) after a prompt whose first `size` tokens are its context."""
        if self._context != sequence[:size]:
            self._context = sequence[:size]
            self._cache = self._reader._read_context(self._context)
        cache = copy.deepcopy(self._cache)
        return cache, self._reader._read_question(sequence[size:], cache)
