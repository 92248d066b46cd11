"""A gate inside the softmax: the log of scores that a softmax over the prefix has normalised.

After arXiv 2609.13141. What normalises them is the same for all keys of a query, so that it leaves
the attention's own softmax again. What stays is the effective score of each key in its logit, and a
gradient of it without thresholds. It goes through the kernels as two more dimensions of keys.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch.nn import functional as F

from sparsek_cli.models.attention.registration import replaced_attention
from sparsek_cli.models.config import ATTENTION

CHANNELS = 8  # of which two are used: rows of keys begin at multiples of 16 bytes


@contextmanager
def prefix_gates(strength: float) -> Iterator[None]:
    """Within the block `strength` times the effective score stands in each key's logit.

    The keys that are kept are chosen as ever, and what that choice would teach scores is left out.
    Without a cache.
    """
    with replaced_attention(ATTENTION, lambda before: partial(_attend, before, strength)):
        yield


def _attend(
    before: Callable, strength: float, module: Any, query, key, value, mask, *,
    scaling: float, sparsek_scores, sparsek_slopes, sparsek_stand_ins=None, sparsek_cache=None,
    **more: Any,
) -> tuple[torch.Tensor, None]:  # fmt: skip
    """The attention function of transformers; `before` is the one that it takes the place of."""
    if sparsek_cache is not None:
        raise NotImplementedError("a cache of keys with prefix gates")
    size, gates = query.shape[-1], strength * _gates(sparsek_scores, sparsek_slopes)
    # A bf16 number has 8 bits: what it leaves of a gate is the second dimension.
    high = (gates / scaling).to(value.dtype)
    low = (gates / scaling - high.float()).to(value.dtype)
    key = F.pad(torch.cat((key.to(value.dtype), high[..., None], low[..., None]), -1), _rest(2))
    ones = query.new_ones(*query.shape[:-1], 2)
    query = F.pad(torch.cat((query, ones), -1).to(value.dtype), _rest(2))
    if sparsek_stand_ins is not None:
        sparsek_stand_ins = _wide(sparsek_stand_ins, size)
    out, _ = before(
        module, query, key, F.pad(value, _rest(0)), mask, scaling=scaling,
        sparsek_scores=sparsek_scores.detach(), sparsek_slopes=sparsek_slopes.detach(),
        sparsek_stand_ins=sparsek_stand_ins, **more,
    )  # fmt: skip
    return out[..., :size], None


def _gates(scores: torch.Tensor, slopes: torch.Tensor) -> torch.Tensor:
    """float32 [B, G, N]: scores with their slopes, less their mean, which no softmax sees.

    Nor does it see where in a row a document begins, whose places are counted from the row's start.
    """
    places = torch.arange(scores.shape[-1], device=scores.device, dtype=torch.float32)
    gates = scores.float() + slopes.float()[:, None] * places
    return gates - gates.mean(-1, keepdim=True)


def _rest(used: int) -> tuple[int, int]:
    return 0, CHANNELS - used


def _wide(pairs: torch.Tensor, size: int) -> torch.Tensor:
    """Stand-ins [H, M, 2 D + 2] for heads of D + CHANNELS."""
    keys, values, rest = pairs.split((size, size, 2), -1)
    return torch.cat((F.pad(keys, _rest(0)), F.pad(values, _rest(0)), rest), -1)
