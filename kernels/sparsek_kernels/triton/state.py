"""The keys of a call that continues states, and the states it leaves behind.

Twins of what `sparsek_kernels.keys` does: a new state takes two launches, which key goes into which
slot, and the copying; some fifty of PyTorch are too many where a short prompt is read.
"""

import dataclasses
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparsek_kernels.keys import KeyList, list_keys, list_new_keys
from sparsek_kernels.scores import effective_scores
from sparsek_kernels.state import EMPTY, SlotLayout, SparseKState, StateRows
from sparsek_kernels.triton.geometry import Geometry, geometry, head_budgets
from sparsek_kernels.triton.selection import FOREVER
from sparsek_kernels.triton.tiles import rows_of, sequence_at

BLOCK = 1024  # keys or slots that a program looks at together
ROWS = 32  # slots that a program copies
_EMPTY = tl.constexpr(EMPTY)
_FOREVER = tl.constexpr(FOREVER)


def list_rows(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scores: Tensor,
    slopes: Tensor | None,
    layout: SlotLayout,
    state: SparseKState,
    *,
    fresh: bool,
) -> tuple[KeyList, Geometry]:
    """The keys of each batch item, and who sees which.

    Args:
        q [B, H, N, D], k and v [B, G, N, D], scores [B, G, N].
        fresh: the state has seen nothing, and is not looked at.
    """
    batch, _, n, _ = q.shape
    positions = torch.arange(n, device=q.device).expand(batch, n)
    if not fresh:
        positions = positions + state.seen[:, None]
    effective = effective_scores(scores, slopes, positions)
    listed = list_new_keys if fresh else list_keys
    keys = listed(k, v, effective, positions, layout, state)
    if fresh:
        return keys, geometry(q.shape, k.shape, q.device)
    window_start = keys.keys.shape[2] - n - _window_held(state)
    return keys, geometry(q.shape, keys.keys.shape, q.device, window_start=window_start)


def _window_held(state: SparseKState) -> Tensor:
    """[B] int64, tokens that each row's window holds: those since max(sinks, seen - window)."""
    return (state.seen - state.layout.sinks).clamp(0, state.layout.window)


@triton.jit(do_not_specialize=("row_keys",), do_not_specialize_on_alignment=("seen",))
def _choose_slots(
    end, effective, sequences, seen, budgets, starts, take,
    heads, row_keys, base, slots, sinks, window, BLOCK: tl.constexpr,
):  # fmt: skip
    """take[row, slot] = place in the row's keys of what one head's slots hold, -1 for nothing."""
    row = tl.program_id(0)
    head = tl.program_id(1)
    its = sequence_at(sequences, row)
    length = its.queries
    keys = its.keys
    last = length - 1
    k = tl.load(budgets + head)
    mine = take + row.to(tl.int64) * slots + tl.load(starts + head)
    line = (its.batch * heads + head) * row_keys + its.first_key
    first = its.first_key + keys - length  # `end` counts keys from the start of the row
    lane = tl.arange(0, BLOCK)
    count = 0
    for start in range(0, keys, BLOCK):
        index = start + lane
        inside = index < keys
        leaves = tl.load(end + line + index, mask=inside, other=0)
        score = tl.load(effective + line + index, mask=inside, other=float("-inf"))
        # Joined by the last query, not gone by it, neither a sink nor an empty slot.
        stays = (leaves == _FOREVER) | (leaves - first > last)
        chosen = inside & stays & (index - base <= last) & (index >= sinks)
        chosen &= (score > float("-inf")) & (score < float("inf"))
        one = chosen.to(tl.int32)
        rank = count + tl.cumsum(one, 0) - one
        tl.store(mine + sinks + rank, index, mask=chosen & (rank < k))
        count += tl.sum(one, 0)
    for start in range(0, k, BLOCK):
        rank = start + lane
        tl.store(mine + sinks + rank, -1, mask=(rank >= count) & (rank < k))
    before = tl.load(seen + row)
    for start in range(0, sinks, BLOCK):
        sink = start + lane
        new = sink - before
        index = tl.where(new < 0, sink, new + base + window)
        tl.store(mine + sink, tl.where(new < length, index, -1), mask=sink < sinks)
    for start in range(0, window, BLOCK):
        place = start + lane
        # The newest token whose position is `place` modulo the window; none where this is < 0.
        age = before + last - place
        position = before + last - age % window
        index = position - before + window + base
        held = (age >= 0) & (position >= sinks)
        tl.store(mine + sinks + k + place, tl.where(held, index, -1), mask=place < window)


@triton.jit(
    do_not_specialize=("listed", "place_head"),
    do_not_specialize_on_alignment=("pool_rows",),
)
def _copy_slots(
    take, owner, sequences, keys, values, key_scale, value_scale, effective, positions, pool_rows,
    new_keys, new_values, new_key_scale, new_value_scale, new_positions, new_scores,
    keys_b, values_b, key_scale_b, value_scale_b, positions_b, scores_b,
    heads, listed, slots, size,
    key_row, key_head, key_step, value_row, value_head, value_step, place_row, place_head,
    ROWS: tl.constexpr, SIZE: tl.constexpr, QUANTIZED: tl.constexpr, POOLED: tl.constexpr,
):  # fmt: skip
    """Copies what `take` names into the slots; empty ones get zeros and position EMPTY."""
    row = tl.program_id(0).to(tl.int64)
    its = sequence_at(sequences, row)
    slot = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    inside = slot < slots
    index = tl.load(take + row * slots + slot, mask=inside, other=-1)
    to_row = tl.load(pool_rows + row).to(tl.int64) if POOLED else row
    head = tl.load(owner + slot, mask=inside, other=0).to(tl.int64)
    there = index >= 0
    index += its.first_key
    line = (its.batch * heads + head) * listed + index
    score = tl.load(effective + line, mask=there, other=0.0)
    score = tl.where(score == float("inf"), 0.0, score)  # a sink's score is never read
    tl.store(new_scores + to_row * scores_b + slot, score, mask=inside)
    place = tl.load(
        positions + its.batch * place_row + head * place_head + index, mask=there, other=_EMPTY
    )
    tl.store(new_positions + to_row * positions_b + slot, place.to(tl.int32), mask=inside)
    dim = tl.arange(0, SIZE)[None, :]
    wanted = there[:, None] & (dim < size)
    to = slot.to(tl.int64)[:, None] * size + dim
    index = index.to(tl.int64)
    from_key = its.batch * key_row + head * key_head + index * key_step
    from_value = its.batch * value_row + head * value_head + index * value_step
    stored = inside[:, None] & (dim < size)
    key = tl.load(keys + from_key[:, None] + dim, mask=wanted, other=0.0)
    tl.store(new_keys + to_row * keys_b + to, key, mask=stored)
    value = tl.load(values + from_value[:, None] + dim, mask=wanted, other=0.0)
    tl.store(new_values + to_row * values_b + to, value, mask=stored)
    if QUANTIZED:
        scale = tl.load(key_scale + line, mask=there, other=0.0)
        tl.store(new_key_scale + to_row * key_scale_b + slot, scale, mask=inside)
        scale = tl.load(value_scale + line, mask=there, other=0.0)
        tl.store(new_value_scale + to_row * value_scale_b + slot, scale, mask=inside)


@lru_cache(maxsize=64)
def slot_places(layout: SlotLayout, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """int32: the first slot of each head [G], and the head of each slot [S]."""
    sizes = torch.tensor([layout.sinks + k + layout.window for k in layout.topk])
    starts = (sizes.cumsum(0) - sizes).to(torch.int32)
    owner = torch.arange(layout.heads, dtype=torch.int32).repeat_interleave(sizes)
    return starts.to(device), owner.to(device)


def next_state(
    keys: KeyList,
    layout: SlotLayout,
    end: torch.Tensor,
    shape: Geometry,
    state: SparseKState | StateRows,
) -> SparseKState | StateRows:
    """The state after the new tokens of each sequence: new tensors, or rows of a pool in place.

    Args:
        keys: of batch items, or of documents packed along one row.
        end: int32 [B, G, M] of `selection_ends`.
        state: one row for each sequence of `shape`.
    """
    heads, listed = keys.effective.shape[1:]
    batch, device, slots, size = state.batch, keys.keys.device, layout.total, keys.keys.shape[3]
    starts, owner = slot_places(layout, device)
    take = torch.empty(batch, slots, dtype=torch.int32, device=device)
    effective, seen = keys.effective.contiguous(), state.seen
    _choose_slots[(batch, heads)](
        end, effective, shape.sequences, seen.contiguous(),
        head_budgets(layout.topk, device), starts,
        take, heads, listed, keys.base, slots, layout.sinks, layout.window,
        BLOCK=BLOCK, num_warps=4,
    )  # fmt: skip
    seen = seen + shape.sequences[:, 2]
    pooled, quantized = isinstance(state, StateRows), state.quantized
    if pooled:
        new = state.pool
        new.seen.index_copy_(0, state.rows.long(), seen)
    else:
        made = {
            name: torch.empty(held.shape, dtype=held.dtype, device=device)
            for name, held in state.slots.items()
            if name != "seen"
        }
        new = dataclasses.replace(state, **made, seen=seen, support=None, tau=None)
    k, v = rows_of(keys.stored["keys"]), rows_of(keys.stored["values"])
    places = keys.positions.expand(-1, heads, -1)
    scales, new_scales = (effective,) * 2, (new.scores,) * 2  # else neither read nor written
    if quantized:
        scales = [keys.stored[name].contiguous() for name in ("key_scale", "value_scale")]
        new_scales = (new.key_scale, new.value_scale)
    held = (new.keys, new.values, *new_scales, new.positions, new.scores)
    _copy_slots[(batch, triton.cdiv(slots, ROWS))](
        take, owner, shape.sequences, k, v, *scales, effective, places,
        state.rows.contiguous() if pooled else take, *held, *(tensor.stride(0) for tensor in held),
        heads, listed, slots, size, *k.stride()[:3], *v.stride()[:3], *places.stride()[:2],
        ROWS=ROWS, SIZE=triton.next_power_of_2(size), QUANTIZED=quantized, POOLED=pooled,
        num_warps=4,
    )  # fmt: skip
    return state if pooled else new
