"""Which prompts are read together: side by side, or those with a common beginning, that being once.

Reading a small model's prompt costs launches, a large model's costs work: the first is saved by
reading side by side, the second by reading a beginning once.
"""

from collections.abc import Sequence
from typing import Any

import torch

from sparsek_cli.evaluation.lm import side_by_side
from sparsek_cli.evaluation.lm.contexts import ContextReader
from sparsek_cli.evaluation.lm.proof import row_bytes
from sparsek_cli.evaluation.lm.shared_prefixes import Group, group_by_prefix
from sparsek_cli.models import SparseKCache, sparsek_cache_bytes

TOGETHER = ("cuda",)  # devices on which many rows take hardly longer than one
MOST_ROWS = 32
MEMORY_SHARE = 0.2  # of a GPU's free memory goes to caches of prompts read, or answered, together
# Parameters times tokens of a common beginning from which on it is read once: some 40 ms of work
# for a data centre's GPU, as long as the launches of one more reading take.
WORTH_SHARING = 1 << 43

# A prompt's cache, and logits [1, 1, V] of its answer's first token.
Read = tuple[Any, torch.Tensor]


def memory_for_caches(device: torch.device) -> int | None:
    """Bytes that caches of several prompts may take; None where nothing says how many there are."""
    if device.type != "cuda":
        return None
    free, _ = torch.cuda.mem_get_info(device)
    # What torch keeps for itself and does not use is free for it.
    free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return int(MEMORY_SHARE * free)


class TogetherReader(ContextReader):
    """Reads whole prompts, several at once where that changes nothing but time."""

    def _together_or_shared(
        self, sequences: Sequence[list[int]]
    ) -> tuple[list[list[int]], list[Group]]:
        """Numbers of prompts to be read at once, and groups whose common beginning is read once."""
        together = self._reads_together()
        groups = [Group(0, [i]) for i in range(len(sequences))]
        if self.share_prefix:
            groups = group_by_prefix(sequences, [len(s) - 1 for s in sequences])
        least = max(1, WORTH_SHARING // self.model.num_parameters()) if together else 1
        shared = [group for group in groups if group.prefix >= least]
        alone = [i for group in groups if group.prefix < least for i in group.members]
        most, tokens = self._most_at_once() if together else (1, 0)
        return side_by_side.batches(sequences, alone, most=most, tokens=tokens), shared

    def _most_at_once(self) -> tuple[int, int]:
        """(prompts, tokens of all of them) that may be read at once: what memory is there for."""
        config, dtype = self.model.config.get_text_config(), self.model.dtype
        tokens = side_by_side.tokens_at_once(config)
        if self.answers_together is not None:
            return min(MOST_ROWS, self.answers_together), tokens
        room = memory_for_caches(self.device)
        if room is None:
            return MOST_ROWS, tokens
        if isinstance(self._new_cache(), SparseKCache):
            return max(1, min(MOST_ROWS, room // sparsek_cache_bytes(config, dtype))), tokens
        return MOST_ROWS, min(tokens, room // self._token_bytes())

    @torch.no_grad()
    def _token_bytes(self) -> int:
        """What a token takes in a growing cache, seen at one: no config says how it is stored.

        Latent attention (DeepSeek) has keys of other widths than its values and than its heads.
        """
        cache, first = self._new_cache(), torch.zeros(1, 1, dtype=torch.long, device=self.device)
        self.model(input_ids=first, past_key_values=cache, use_cache=True)
        return row_bytes(cache)

    def _reads_together(self) -> bool:
        """Whether prompts can be read side by side, and the user did not ask for one at a time."""
        return (
            self.device.type in TOGETHER
            and self.policy.reads_rows
            and self.answers_together != 1
            and side_by_side.can_split(self._new_cache())
        )

    def _read_prompts(self, prompts: list[list[int]]) -> list[Read]:
        """Whole prompts, side by side if there are several."""
        if len(prompts) == 1:
            return [self._read_prompt(prompts[0])]
        found: list[Read] = []
        try:
            for cache, logits in side_by_side.read(self.model, prompts, self._new_cache):
                self.policy.end_prompt(self.model, cache)
                found.append((cache, logits))
        except torch.OutOfMemoryError:
            found = []  # what the attempt holds is free only once the error has been dealt with
        if not found:
            return [self._read_prompt(prompt) for prompt in prompts]
        for prompt, (cache, _) in zip(prompts, found, strict=True):
            self._saw_cache(cache, len(prompt))
        return found

    def _read_prompt(self, tokens: list[int]) -> tuple[Any, torch.Tensor]:
        """(cache, logits [1, 1, V]) after a whole prompt."""
        cache = self._new_cache()
        return cache, self._read_end(tokens, cache)

    def _read_end(self, ids: Any, cache: Any) -> torch.Tensor:
        """Reads what is left of a prompt; logits [B, 1, V] of the answer's first token."""
        logits = self._read(ids, cache, keep=1)
        self.policy.end_prompt(self.model, cache)
        self._saw_cache(cache, cache.get_seq_length())
        return logits
