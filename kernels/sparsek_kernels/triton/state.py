"""The state after a call in two launches: which key goes into which slot, and the copying.

The twin of `keys.next_state`, which takes some fifty launches of PyTorch: too many where a short
prompt is read.
"""

import dataclasses
from functools import lru_cache

import torch
import triton
import triton.language as tl

from sparsek_kernels.keys import KeyList
from sparsek_kernels.state import EMPTY, SlotLayout, SparseKState
from sparsek_kernels.triton.geometry import head_budgets
from sparsek_kernels.triton.selection import FOREVER
from sparsek_kernels.triton.tiles import rows_of

BLOCK = 1024  # keys or slots that a program looks at together
ROWS = 32  # slots that a program copies
_EMPTY = tl.constexpr(EMPTY)
_FOREVER = tl.constexpr(FOREVER)


@triton.jit
def _choose_slots(
    end, effective, lengths, seen, budgets, starts, take,
    heads, keys, queries, base, slots, sinks, window,
    RAGGED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """take[row, slot] = index in the key list of what one head's slots hold, -1 for nothing."""
    row = tl.program_id(0)
    head = tl.program_id(1)
    length = tl.load(lengths + row).to(tl.int32) if RAGGED else queries
    last = length - 1
    k = tl.load(budgets + head)
    mine = take + row.to(tl.int64) * slots + tl.load(starts + head)
    line = (row.to(tl.int64) * heads + head) * keys
    first = keys - queries
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


@triton.jit
def _copy_slots(
    take, owner, keys, values, effective, positions,
    new_keys, new_values, new_scores, new_positions,
    heads, listed, slots, size,
    key_row, key_head, key_step, value_row, value_head, value_step, place_row, place_head,
    ROWS: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    """Copies what `take` names into the slots; empty ones get zeros and position EMPTY."""
    row = tl.program_id(0).to(tl.int64)
    slot = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    inside = slot < slots
    index = tl.load(take + row * slots + slot, mask=inside, other=-1)
    head = tl.load(owner + slot, mask=inside, other=0).to(tl.int64)
    there = index >= 0
    score = tl.load(effective + (row * heads + head) * listed + index, mask=there, other=0.0)
    score = tl.where(score == float("inf"), 0.0, score)  # a sink's score is never read
    tl.store(new_scores + row * slots + slot, score, mask=inside)
    place = tl.load(
        positions + row * place_row + head * place_head + index, mask=there, other=_EMPTY
    )
    tl.store(new_positions + row * slots + slot, place.to(tl.int32), mask=inside)
    dim = tl.arange(0, SIZE)[None, :]
    wanted = there[:, None] & (dim < size)
    to = (row * slots + slot)[:, None] * size + dim
    index = index.to(tl.int64)
    from_key = row * key_row + head * key_head + index * key_step
    from_value = row * value_row + head * value_head + index * value_step
    stored = inside[:, None] & (dim < size)
    tl.store(new_keys + to, tl.load(keys + from_key[:, None] + dim, mask=wanted, other=0.0),
             mask=stored)  # fmt: skip
    tl.store(new_values + to, tl.load(values + from_value[:, None] + dim, mask=wanted, other=0.0),
             mask=stored)  # fmt: skip


@lru_cache(maxsize=64)
def _places(layout: SlotLayout, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """int32: the first slot of each head [G], and the head of each slot [S]."""
    sizes = torch.tensor([layout.sinks + k + layout.window for k in layout.topk])
    starts = (sizes.cumsum(0) - sizes).to(torch.int32)
    owner = torch.arange(layout.heads, dtype=torch.int32).repeat_interleave(sizes)
    return starts.to(device), owner.to(device)


def next_state(
    keys: KeyList,
    layout: SlotLayout,
    end: torch.Tensor,
    lengths: torch.Tensor | None,
    state: SparseKState,
) -> SparseKState:
    """The state after the new tokens of each row; tensors are new.

    Args:
        keys: not in 8 bits.
        end: int32 [B, G, M] of `selection_ends`.
        lengths: [B] int64, how many of the new tokens are real; None: all N.
    """
    batch, heads, listed = keys.effective.shape
    device, slots, size = keys.keys.device, layout.total, keys.keys.shape[3]
    starts, owner = _places(layout, device)
    take = torch.empty(batch, slots, dtype=torch.int32, device=device)
    effective = keys.effective.contiguous()
    _choose_slots[(batch, heads)](
        end, effective, state.seen if lengths is None else lengths, state.seen,
        head_budgets(layout.topk, device), starts, take,
        heads, listed, keys.n, keys.base, slots, layout.sinks, layout.window,
        RAGGED=lengths is not None, BLOCK=BLOCK, num_warps=4,
    )  # fmt: skip
    new = dataclasses.replace(
        state,
        keys=torch.empty(batch, slots, size, dtype=state.keys.dtype, device=device),
        values=torch.empty(batch, slots, size, dtype=state.values.dtype, device=device),
        positions=torch.empty(batch, slots, dtype=torch.int32, device=device),
        scores=torch.empty(batch, slots, dtype=torch.float64, device=device),
        seen=state.seen + (keys.n if lengths is None else lengths),
        support=None,
        tau=None,
    )
    k, v = rows_of(keys.keys), rows_of(keys.values)
    places = keys.positions.expand(-1, heads, -1)
    _copy_slots[(batch, triton.cdiv(slots, ROWS))](
        take, owner, k, v, effective, places,
        new.keys, new.values, new.scores, new.positions,
        heads, listed, slots, size, *k.stride()[:3], *v.stride()[:3], *places.stride()[:2],
        ROWS=ROWS, SIZE=triton.next_power_of_2(size), num_warps=4,
    )  # fmt: skip
    return new
