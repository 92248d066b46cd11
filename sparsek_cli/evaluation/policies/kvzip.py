"""KVzip (Kim et al. 2025, arXiv 2505.23416): what the model needs to tell the context again stays.

The oracle of eviction that does not know the question. The context is read densely, then told again
by teacher forcing, a part at a time; a pair is worth the largest attention that it gets from that.
What is beyond the slots is dropped, sinks and window always stay, and only then is the question
read. A SparseK model has to choose while it reads, and reads the context once.
"""

import copy
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, ClassVar

import torch

from sparsek_cli.evaluation.policies.evicting_layer import EvictingLayer, largest_attention
from sparsek_cli.evaluation.policies.snapkv_h2o import Evicting
from sparsek_cli.models.logits import Logits

REPEAT = "\n\nRepeat the previous context exactly."
PART = 1024  # tokens told again at once
TOGETHER = 8  # parts side by side on a GPU
LEAD = 8  # last tokens of the part before, told once more: where this part goes on


class TellingLayer(EvictingLayer):
    """Ranks the pairs of a context by the largest attention while it is told again.

    Attributes:
        context: how many first pairs are the context's while it is told; None before and after.
    """

    def __init__(self, slots: int, recent: int, sinks: int = 0):
        super().__init__(slots, recent, sinks)
        self.context: int | None = None

    @contextmanager
    def listening(self, parts: int) -> Iterator[None]:
        """Within the block `parts` parts are told, side by side; their own pairs do not stay."""
        self.context, pairs = self.seen, (self.keys, self.values)
        self.keys, self.values = (tensor.expand(parts, -1, -1, -1) for tensor in pairs)
        try:
            yield
        finally:
            self.mass = self.mass[:, :, : self.context]
            self.keys, self.values = pairs
            self.seen, self.context = self.context, None

    def see(self, query: torch.Tensor, logits: Logits) -> None:
        """Notes what queries that tell the context again see of it."""
        if self.context is not None:
            seen = largest_attention(query, self.keys, logits)[:, :, : self.context]
            told = self.mass[:, :, : self.context]
            torch.maximum(told, seen.amax(dim=0, keepdim=True), out=told)


class KVzip(Evicting):
    """The context told again chooses what stays of it, before the question is read."""

    kind: ClassVar[str] = "kvzip"
    layer: ClassVar[type[EvictingLayer]] = TellingLayer
    keeps_sinks: ClassVar[bool] = True
    evicts_before_question: ClassVar[bool] = True

    def unfit_for(self, task: Any) -> str | None:
        """A task whose samples do not say where their question begins."""
        if task.OUTPUT_TYPE != "generate_until":
            return "it is measured on written answers"
        if not next(iter(task.eval_docs), {}).get("asked"):
            return "it evicts before the question, and the task does not say where that begins"
        return None

    @torch.no_grad()
    def tell_again(
        self, model: Any, cache: Any, context: Sequence[int], opening: Sequence[int]
    ) -> None:
        """Ranks the pairs in `cache`, which holds `context` in its one row.

        Layers of other kinds (a sliding window, a state) go on from the context each time.

        Args:
            context: its tokens. opening: of the request to repeat it, and what begins a reply.
        """
        whole = list(cache.layers)
        own = [layer for layer in whole if isinstance(layer, TellingLayer)]
        parts = parts_of(context)
        alone = len(own) < len(whole) or model.device.type != "cuda"
        together = 1 if alone else TOGETHER
        for start in range(0, len(parts), together):
            told = parts[start : start + together]
            ids = torch.tensor([[*opening, *part] for part in told], device=model.device)
            cache.layers = [layer if layer in own else copy.deepcopy(layer) for layer in whole]
            with ExitStack() as stack:
                for layer in own:
                    stack.enter_context(layer.listening(len(told)))
                model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        cache.layers = whole


def parts_of(context: Sequence[int]) -> list[Sequence[int]]:
    """Parts of equal length that are told again one by one, and hold every token of a context.

    Each begins with the last tokens of the part before; the last one with as many as it takes.
    """
    size = min(len(context), LEAD + PART)
    starts = (min(s - LEAD, len(context) - size) for s in range(0, len(context), PART))
    return [context[max(0, s) : max(0, s) + size] for s in starts]
