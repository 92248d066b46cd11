"""The keys of a prompt's first piece, and the states that a call leaves behind.

Twins of what `sparsek_kernels.keys` does: a new state is one launch; some fifty of PyTorch are too
many where a short prompt is read.
"""

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparsek_kernels.keys import KeyList
from sparsek_kernels.quantization import quantize
from sparsek_kernels.scores import effective_scores
from sparsek_kernels.state import EMPTY, SlotLayout, SparseKState, StateRows
from sparsek_kernels.triton.geometry import Geometry, head_budgets
from sparsek_kernels.triton.launches.launch import launch
from sparsek_kernels.triton.selection import FOREVER
from sparsek_kernels.triton.short.ends import short_ends
from sparsek_kernels.triton.short.limits import is_short
from sparsek_kernels.triton.tiles import rows_of, sequence_at

BLOCK = 1024  # keys or slots that a program looks at together
ROWS = 32  # slots that a program copies
_EMPTY = tl.constexpr(EMPTY)
_FOREVER = tl.constexpr(FOREVER)


def list_new(
    k: Tensor,
    v: Tensor,
    scores: Tensor,
    slopes: Tensor | None,
    layout: SlotLayout,
    state: SparseKState,
    shape: Geometry,
) -> tuple[KeyList, Tensor | None]:
    """The keys of batch items that have seen nothing, and their ends where the call is short.

    Args:
        k, v: [B, G, N, D]. scores: [B, G, N]. state: is not looked at. shape: of the call.
    """
    n, end = k.shape[2], None
    if is_short(shape):
        effective = torch.empty(scores.shape, dtype=torch.float64, device=k.device)
        end = short_ends(
            scores, layout.topk, layout.window, shape,
            sinks=layout.sinks, slopes=slopes, effective=effective,
        )  # fmt: skip
    else:
        places = torch.arange(n, device=k.device)
        effective = effective_scores(scores, slopes, places)
        effective = effective.masked_fill(places < layout.sinks, torch.inf)
    stored = {"keys": k, "values": v}
    if state.quantized:
        for name, new in (("key", k), ("value", v)):
            stored[f"{name}s"], stored[f"{name}_scale"] = quantize(new)
    return KeyList(k, v, stored, effective, None, -layout.window, max(layout.topk), n), end


@triton.jit
def _select(
    end, effective, mine, line, keys, length, first, base, sinks, low, high, BLOCK: tl.constexpr
):
    """Writes keys of one head that stay, of ranks low .. high in order of position; their number.

    Counted as far as is needed. mine: where that of rank 0 goes.
    """
    last = length - 1
    count = 0
    start = 0
    while (start < keys) & (count < high):
        index = start + tl.arange(0, BLOCK)
        inside = index < keys
        leaves = tl.load(end + line + index, mask=inside, other=0)
        score = tl.load(effective + line + index, mask=inside, other=float("-inf"))
        # Joined by the last query, not gone by it, neither a sink nor an empty slot.
        stays = (leaves == _FOREVER) | (leaves - first > last)
        chosen = inside & stays & (index - base <= last) & (index >= sinks)
        chosen &= (score > float("-inf")) & (score < float("inf"))
        one = chosen.to(tl.int32)
        rank = count + tl.cumsum(one, 0) - one
        tl.store(mine + rank, index, mask=chosen & (rank >= low) & (rank < high))
        count += tl.sum(one, 0)
        start += BLOCK
    return count


# What differs from step to step; so does where rows, and which of them are fresh, are named.
@triton.jit(
    do_not_specialize=("row_keys", "key_head", "value_head"),
    do_not_specialize_on_alignment=("pool_rows", "fresh"),
)
def _leave_state(
    end, effective, sequences, budgets, starts, scratch, positions, pool_rows, fresh,
    keys, values, key_scale, value_scale,
    held_keys, held_values, held_key_scale, held_value_scale, held_positions, held_scores,
    held_seen, keys_b, values_b, key_scale_b, value_scale_b, positions_b, scores_b, seen_b,
    heads, row_keys, base, sinks, window, size,
    key_row, key_head, key_step, value_row, value_head, value_step,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, SIZE: tl.constexpr, QUANTIZED: tl.constexpr,
    POOLED: tl.constexpr, SOME_FRESH: tl.constexpr, ALL_FRESH: tl.constexpr,
):  # fmt: skip
    """Fills some slots of one head of one row; empty ones get zeros and position EMPTY."""
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    first_slot = tl.program_id(2) * ROWS
    its = sequence_at(sequences, row)
    length = its.queries
    is_fresh = tl.load(fresh + row) != 0 if SOME_FRESH else ALL_FRESH
    if (length == 0) & (is_fresh == 0):  # what it holds, it holds
        return
    line = (its.batch * heads + head) * row_keys + its.first_key
    lead = its.keys - length  # keys listed before the new ones
    before = its.batch * 0  # int64, tokens seen before these
    if ALL_FRESH == 0:
        before += tl.load(positions + line + lead, mask=length > 0, other=0)
    k = tl.load(budgets + head)
    slot = first_slot + tl.arange(0, ROWS)
    inside = slot < sinks + k + window
    # Which key comes into each slot, -1 for none.
    new = slot - before
    taken = tl.where(new < 0, slot, new + base + window)
    taken = tl.where((slot < sinks) & (new < length), taken, -1)
    # The newest token whose position is `place` modulo the window; none where this is < 0.
    place = slot - sinks - k
    newest = before + length - 1
    age = newest - place
    position = newest - age % window
    in_window = (place >= 0) & (age >= 0) & (position >= sinks)
    taken = tl.where(in_window, position - before + window + base, taken)
    if (first_slot < sinks + k) & (first_slot + ROWS > sinks):
        parts = tl.num_programs(2)
        mine = scratch + ((row * heads + head) * parts) * ROWS
        low = tl.maximum(first_slot - sinks, 0)
        high = tl.minimum(first_slot + ROWS - sinks, k)
        first = its.first_key + lead  # `end` counts keys from the start of the row
        count = _select(
            end, effective, mine + sinks, line, its.keys, length, first, base, sinks, low, high,
            BLOCK,
        )  # fmt: skip
        tl.debug_barrier()  # they are read back by other threads of this program
        is_selected = (slot >= sinks) & (slot < sinks + k)
        chosen = tl.load(mine + slot, mask=is_selected & (slot - sinks < count), other=-1)
        taken = tl.where(is_selected, chosen.to(tl.int64), taken)
    there = inside & (taken >= 0)
    at = line + taken
    score = tl.load(effective + at, mask=there, other=0.0)
    score = tl.where(score == float("inf"), 0.0, score)  # a sink's score is never read
    to_row = tl.load(pool_rows + row).to(tl.int64) if POOLED else row
    to_slot = (tl.load(starts + head) + slot).to(tl.int64)
    tl.store(held_scores + to_row * scores_b + to_slot, score, mask=inside)
    if ALL_FRESH:
        token = tl.where(there, taken, _EMPTY)
    else:
        token = tl.load(positions + at, mask=there, other=_EMPTY)
    tl.store(held_positions + to_row * positions_b + to_slot, token.to(tl.int32), mask=inside)
    d = tl.arange(0, SIZE)[None, :]
    wanted = there[:, None] & (d < size)
    stored = inside[:, None] & (d < size)
    to = to_slot[:, None] * size + d
    index = its.first_key + taken
    from_key = its.batch * key_row + head.to(tl.int64) * key_head + index * key_step
    key = tl.load(keys + from_key[:, None] + d, mask=wanted, other=0.0)
    tl.store(held_keys + to_row * keys_b + to, key, mask=stored)
    from_value = its.batch * value_row + head.to(tl.int64) * value_head + index * value_step
    value = tl.load(values + from_value[:, None] + d, mask=wanted, other=0.0)
    tl.store(held_values + to_row * values_b + to, value, mask=stored)
    if QUANTIZED:
        scale = tl.load(key_scale + at, mask=there, other=0.0)
        tl.store(held_key_scale + to_row * key_scale_b + to_slot, scale, mask=inside)
        scale = tl.load(value_scale + at, mask=there, other=0.0)
        tl.store(held_value_scale + to_row * value_scale_b + to_slot, scale, mask=inside)
    if (head == 0) & (first_slot == 0):
        tl.store(held_seen + to_row * seen_b, before + length)


@lru_cache(maxsize=64)
def first_slots(layout: SlotLayout, device: torch.device) -> torch.Tensor:
    """int32 [G]: the first slot of each head."""
    sizes = torch.tensor([layout.sinks + k + layout.window for k in layout.topk])
    return (sizes.cumsum(0) - sizes).to(torch.int32).to(device)


def next_state(
    keys: KeyList,
    layout: SlotLayout,
    end: torch.Tensor,
    shape: Geometry,
    state: SparseKState | StateRows,
) -> None:
    """The state becomes that after the new tokens of each sequence, in place.

    Args:
        keys: of batch items that have seen nothing, or of documents packed along one row.
        end: int32 [B, G, M] of `selection_ends`.
        state: one row for each sequence of `shape`, or rows of a pool.
    """
    heads, listed = keys.effective.shape[1:]
    device, size = keys.keys.device, keys.keys.shape[3]
    pool, rows, fresh = state, None, None
    if isinstance(state, StateRows):
        pool, rows, fresh = state.pool, state.rows.contiguous(), state.fresh
    k, v = rows_of(keys.stored["keys"]), rows_of(keys.stored["values"])
    effective = keys.effective
    scales, held_scales = (effective,) * 2, (pool.scores,) * 2  # else neither read nor written
    if pool.quantized:
        scales = [keys.stored[name].contiguous() for name in ("key_scale", "value_scale")]
        held_scales = (pool.key_scale, pool.value_scale)
    held = (pool.keys, pool.values, *held_scales, pool.positions, pool.scores, pool.seen)
    parts = triton.cdiv(layout.width, ROWS)
    scratch = torch.empty(state.batch, heads, parts * ROWS, dtype=torch.int32, device=device)
    launch(
        _leave_state, (state.batch, heads, parts),
        end, effective, shape.sequences, head_budgets(layout.topk, device),
        first_slots(layout, device), scratch,
        end if keys.positions is None else keys.positions,
        end if rows is None else rows, end if fresh is None else fresh,
        k, v, *scales, *held, *(tensor.stride(0) for tensor in held),
        heads, listed, keys.base, layout.sinks, layout.window, size,
        *k.stride()[:3], *v.stride()[:3],
        ROWS=ROWS, BLOCK=BLOCK, SIZE=triton.next_power_of_2(size), QUANTIZED=pool.quantized,
        POOLED=rows is not None, SOME_FRESH=fresh is not None, ALL_FRESH=keys.positions is None,
        num_warps=4,
    )  # fmt: skip
