"""One call end to end: selection, lists, attention; and its gradient."""

from dataclasses import dataclass
from functools import lru_cache
from types import ModuleType

import torch
import triton

from sparsek_kernels.state import EMPTY
from sparsek_kernels.triton.backward.key_gradient import key_gradient
from sparsek_kernels.triton.backward.query_gradient import query_gradient
from sparsek_kernels.triton.backward.row_products import row_products
from sparsek_kernels.triton.backward.scores import interior_runs, score_gradient
from sparsek_kernels.triton.forward import attend_forward
from sparsek_kernels.triton.geometry import Geometry
from sparsek_kernels.triton.lists import SUPER_TILE, KeyLists, key_lists
from sparsek_kernels.triton.selection import selection_ends
from sparsek_kernels.triton.short.ends import short_ends
from sparsek_kernels.triton.short.limits import has_short_thresholds, is_short
from sparsek_kernels.triton.short.lists import short_lists
from sparsek_kernels.triton.short.thresholds import short_thresholds
from sparsek_kernels.triton.stand_ins import StandIns, join_stand_ins, stand_in_gradient
from sparsek_kernels.triton.thresholds.descent import prefix_thresholds
from sparsek_kernels.triton.tiles import LOG2_E, rows_of
from sparsek_kernels.triton.tuning import device_capability, launch_config

GLUON_VERSIONS = ("3.6.", "3.7.")  # of Triton; Gluon is experimental and changes between them
LIST_SHARE = 0.04  # of the bytes of Q + K + V, the most that the finest key lists may take


@dataclass(frozen=True)
class Settings:
    topk: tuple[int, ...]
    window: int
    sinks: int
    gate: str
    scale: float
    softcap: float | None = None


@dataclass(frozen=True)
class Selection:
    """Which keys each query sees.

    Attributes:
        end: int32 [B, G, M], see `selection_ends`. lists: the keys of tiles of queries.
        tau, gate_scores: for the gates log and kv.
    """

    end: torch.Tensor
    lists: KeyLists
    tau: torch.Tensor | None = None
    gate_scores: torch.Tensor | None = None


def sink_mask(geometry: Geometry, sinks: int) -> torch.Tensor | None:
    """bool [1, 1, M]: the first `sinks` keys of every sequence (no carried state)."""
    if sinks == 0:
        return None
    device = geometry.sequences.device
    if not geometry.packed:
        return _first_keys(geometry.keys, sinks, device)
    place = torch.arange(geometry.keys, device=device)
    starts = geometry.sequences[:, 3].contiguous()
    place = place - starts[torch.searchsorted(starts, place.int(), right=True) - 1]
    return (place < sinks)[None, None]


@lru_cache(maxsize=64)
def _first_keys(keys: int, sinks: int, device: torch.device) -> torch.Tensor:
    return (torch.arange(keys, device=device) < sinks)[None, None]


def list_size(settings: Settings, q: torch.Tensor, k: torch.Tensor) -> int:
    """Queries per key list: the finest that keeps the lists within `LIST_SHARE` of Q, K and V."""
    per_query = (q.shape[1] + 2 * k.shape[1]) * q.shape[3] * q.element_size() * LIST_SHARE
    size = 64
    while size < SUPER_TILE and 4 * sum(settings.topk) > size * per_query:
        size *= 2
    return size


def _config(kind: str, q: torch.Tensor, group: int):
    bits = 8 * q.element_size()
    return launch_config(kind, device_capability(q.device), q.shape[3], group, bits)


def forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scores: torch.Tensor,
    settings: Settings,
    shape: Geometry,
    *,
    positions: torch.Tensor | None = None,
    end: torch.Tensor | None = None,
    sink_logits: torch.Tensor | None = None,
    stand_ins: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """out, lse, end and (gates log and kv) tau.

    Args:
        q [B, H, N, D], k and v [B, G, M, D], scores float64 [B, G, M].
        positions: int64 [B, G, M] of keys that were listed from a state, see `find_ends`.
        end: what `find_ends` found, if somebody asked before; gates log and kv alone read the
            scores then.
        sink_logits: [H] or None. stand_ins: [H, M, 2 D + 2] or None. out: where to write, or None.
    """
    q, k, v = rows_of(q), rows_of(k), rows_of(v)
    found = select(q, k, scores, settings, shape, positions=positions, end=end)
    out, lse = attend(q, k, v, found, settings, shape, out)
    if sink_logits is not None:
        out, lse = add_sinks(out, lse, sink_logits)
    if stand_ins is not None:
        given = _stand_ins(stand_ins, settings, positions)
        join_stand_ins(q, out, lse, given, found.lists, shape, settings.scale)
    return out, lse, found.end, found.tau


def _stand_ins(
    pairs: torch.Tensor, settings: Settings, positions: torch.Tensor | None = None
) -> StandIns:
    return StandIns(
        pairs.contiguous(), settings.topk, settings.sinks + settings.window, positions
    )  # fmt: skip


def select(
    q: torch.Tensor,
    k: torch.Tensor,
    scores: torch.Tensor,
    settings: Settings,
    shape: Geometry,
    *,
    positions: torch.Tensor | None = None,
    end: torch.Tensor | None = None,
) -> Selection:
    """The first part of `forward`, whose arguments it takes; of q and k only shapes are read."""
    if end is None:
        end = find_ends(scores, settings, shape, positions)
    tau = gate_scores = None
    if settings.gate != "straight_through":
        tau = find_thresholds(scores, settings, shape)
        gate_scores = gate_values(scores, sink_mask(shape, settings.sinks))
    size = list_size(settings, q, k)
    hopper = hopper_kernels(q, settings)
    if hopper:
        size = max(size, hopper.tile_queries(shape.group))
    own = (end, settings.topk, settings.window, settings.sinks, shape)
    lists = short_lists(*own, size) if is_short(shape) else key_lists(*own, [size])[0]
    return Selection(end, lists, tau, gate_scores)


def find_ends(
    scores: torch.Tensor,
    settings: Settings,
    shape: Geometry,
    positions: torch.Tensor | None = None,
    slopes: torch.Tensor | None = None,
) -> torch.Tensor:
    """`selection_ends`, whose scores and slopes it takes; in two launches where the call is short.

    Args:
        positions: int64 [B, G, M] of keys listed from a state, whose sinks are those of score +inf;
            EMPTY slots are never seen. None: the sinks are the first keys of each sequence.
    """
    topk, window, listed = settings.topk, settings.window, positions is not None
    if is_short(shape):
        sinks = 0 if listed else settings.sinks
        return short_ends(
            scores, topk, window, shape, sinks=sinks, slopes=slopes, positions=positions
        )
    always = scores == torch.inf if listed else sink_mask(shape, settings.sinks)
    never = positions == EMPTY if listed else None
    given = scores, topk, window, shape
    return selection_ends(*given, slopes=slopes, always=always, never=never)


def find_thresholds(scores: torch.Tensor, settings: Settings, shape: Geometry) -> torch.Tensor:
    """`prefix_thresholds` of scores float64 [B, G, M], in two launches where the call is short."""
    find = short_thresholds if has_short_thresholds(shape) else prefix_thresholds
    return find(scores, settings.topk, settings.window, shape, settings.sinks)


def attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    found: Selection,
    settings: Settings,
    shape: Geometry,
    out: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The second part of `forward`: out and lse, without the sinks' logits; q, k and v by rows."""
    common = dict(window=settings.window, scale=settings.scale, out=out)
    hopper = hopper_kernels(q, settings)
    if hopper:
        return hopper.attend_forward(q, k, v, found.end, found.lists, shape, **common)
    return attend_forward(
        q, k, v, found.end, found.lists, shape, gate=settings.gate,
        config=_config("forward", q, shape.group), gate_scores=found.gate_scores, tau=found.tau,
        softcap=settings.softcap, **common,
    )  # fmt: skip


def hopper_kernels(q: torch.Tensor, settings: Settings) -> ModuleType | None:
    """The module `hopper`, where it takes the call and Triton has the Gluon it was tried with."""
    if device_capability(q.device) != (9, 0) or not triton.__version__.startswith(GLUON_VERSIONS):
        return None
    from sparsek_kernels.triton import hopper

    return hopper if hopper.takes(q, settings.gate, settings.scale, settings.softcap) else None


def add_sinks(
    out: torch.Tensor, lse: torch.Tensor, sink_logits: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """out [B, H, N, D], changed in place, and lse [B, H, N] with one more logit [H] in the softmax.

    It has no value, so that it only shrinks what the kernels found. With this lse their backward
    passes need to know nothing of it.
    """
    joined = torch.logaddexp2(lse, _base_2(sink_logits))
    return out.mul_((lse - joined).exp2_()[..., None]), joined


def sink_gradient(
    lse: torch.Tensor, delta: torch.Tensor, sink_logits: torch.Tensor
) -> torch.Tensor:
    """d(sink_logits): its weight carries no value, P = 0 in ds = weight (P - D).

    Args:
        lse, delta: float32 [B, H, N], to the base 2, and D = sum of do * out. sink_logits: [H].

    Returns:
        [H] in the dtype of sink_logits.
    """
    weight = (_base_2(sink_logits) - lse).exp2_()
    return weight.mul_(delta).sum((0, 2)).neg_().to(sink_logits.dtype)


def _base_2(sink_logits: torch.Tensor) -> torch.Tensor:
    return sink_logits.float()[:, None] * LOG2_E  # [H, 1]


def gate_values(scores: torch.Tensor, always: torch.Tensor | None) -> torch.Tensor:
    """Scores [B, G, N] with sinks at +inf, so that their gate is 1.

    Args:
        always: bool, broadcast to the scores, True at sinks; None: there are none.
    """
    scores = scores.detach()
    return scores if always is None else scores.masked_fill(always, float("inf"))


def backward(
    do: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scores: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    end: torch.Tensor,
    tau: torch.Tensor | None,
    settings: Settings,
    shape: Geometry,
    *,
    score_grad: bool,
    deterministic: bool,
    sink_logits: torch.Tensor | None = None,
    stand_ins: torch.Tensor | None = None,
) -> tuple[torch.Tensor | None, ...]:
    """dq, dk, dv in the inputs' dtypes, d(scores) float64, d(sink_logits) and d(stand_ins).

    None in their places where not. `scores` may be None under the gate straight_through, where
    no gradient of them is asked for.
    """
    if shape.keys != shape.queries:
        raise ValueError("no gradient through a carried state: detach it or start without one")
    q, k, v, do = rows_of(q), rows_of(k), rows_of(v), rows_of(do)
    runs = changes = gate_scores = None
    if score_grad and tau is None:
        tau = find_thresholds(scores, settings, shape)
    if score_grad:
        runs, changes = interior_runs(scores, tau, settings.window, shape, settings.sinks)
    if settings.gate != "straight_through":
        gate_scores = gate_values(scores, sink_mask(shape, settings.sinks))
    hopper = hopper_kernels(q, settings)
    size = list_size(settings, q, k)
    sizes = [max(size, hopper.tile_queries(shape.group)) if hopper else size, SUPER_TILE]
    lists = key_lists(end, settings.topk, settings.window, settings.sinks, shape, sizes, runs)
    delta = row_products(out, do)
    rows = (q, k, v, do, lse, delta, end)
    common = dict(window=settings.window, scale=settings.scale, runs=runs)
    if hopper:
        dq, row_sum = hopper.query_gradient(*rows, lists[0], shape, **common)
        dk, dv, column_sum = hopper.key_gradient(
            *rows, lists[-1], shape, deterministic=deterministic, **common
        )
    else:
        common |= dict(
            gate=settings.gate, gate_scores=gate_scores, tau=tau, softcap=settings.softcap
        )
        dq, row_sum = query_gradient(
            *rows, lists[0], shape, config=_config("dq", q, shape.group), **common
        )
        dk, dv, column_sum = key_gradient(
            *rows, lists[-1], shape, config=_config("dkdv", q, shape.group),
            deterministic=deterministic, **common,
        )  # fmt: skip
    de = None
    if score_grad:
        de = score_gradient(column_sum, row_sum, runs, changes)
    own = None if sink_logits is None else sink_gradient(lse, delta, sink_logits)
    theirs = None
    if stand_ins is not None:
        given = _stand_ins(stand_ins, settings)
        theirs = stand_in_gradient(
            q, do, dq, lse, delta, given, lists[0], shape, settings.scale
        )  # fmt: skip
    return dq, dk.to(k.dtype), dv.to(v.dtype), de, own, theirs
