"""The keys of all documents in one row, each behind what its state holds, in one launch.

Read as a pool is, a prompt is a matter of launches: PyTorch takes some eighty for this (the plain
twin is `naive/documents.py`).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparsek_kernels.keys import KeyList
from sparsek_kernels.quantization import LEAST_SCALE, STEP
from sparsek_kernels.rows import document_lengths
from sparsek_kernels.state import EMPTY, SlotLayout, SparseKState, StateRows
from sparsek_kernels.triton.effective import effective_score
from sparsek_kernels.triton.geometry import SEQUENCE_FIELDS, Geometry, head_budgets
from sparsek_kernels.triton.launches.launch import launch
from sparsek_kernels.triton.tiles import load_rows, rows_of

ROWS = 32  # keys that a program copies
BLOCK = 128  # slots or documents that it looks at together
_EMPTY = tl.constexpr(EMPTY)
_LAST = tl.constexpr(2**31 - 1)
_STEP = tl.constexpr(STEP)
_LEAST_SCALE = tl.constexpr(LEAST_SCALE)


@triton.jit
def _codes(x, QUANTIZED: tl.constexpr):
    """Rows [ROWS, D] as a state of 8 bits holds them, and scales; see quantization.quantize."""
    if QUANTIZED:
        x = x.to(tl.float32)
        scale = tl.maximum(tl.max(tl.abs(x), 1) * _STEP, _LEAST_SCALE)
        codes = tl.floor(tl.div_rn(x, scale[:, None] + tl.zeros_like(x)) + 0.5)
        return codes.to(tl.int8), scale
    else:
        return x, 0.0


@triton.jit
def _places(positions, slot, real, widest, k, BLOCK: tl.constexpr):
    """[ROWS] places of selected slots of one head by position; what is empty comes last.

    positions: pointer to the head's first selected slot. slot: [ROWS]. real: [ROWS] bool, within k.
    """
    own = tl.load(positions + slot, mask=real, other=_EMPTY)
    own = tl.where(own == _EMPTY, _LAST, own)
    place = tl.zeros_like(slot)
    for start in range(0, widest, BLOCK):
        other = start + tl.arange(0, BLOCK)
        position = tl.load(positions + other, mask=other < k, other=_EMPTY)
        position = tl.where(position == _EMPTY, _LAST, position)
        before = position[None, :] < own[:, None]
        before |= (position[None, :] == own[:, None]) & (other[None, :] < slot[:, None])
        place += tl.sum((before & (other < widest)[None, :]).to(tl.int32), 1)
    return place


@triton.jit
def _store(
    rows, stored, scales, at, row, codes, scale, d, inside, D: tl.constexpr, QUANTIZED: tl.constexpr
):  # fmt: skip
    """Keys or values [ROWS, DP] at places `at` of the list; codes, too, where the state has them.

    `row` is what is attended, `codes` what is kept.
    """
    where = at[:, None] * D + d[None, :]
    mask = inside[:, None] & (d < D)[None, :]
    tl.store(rows + where, row.to(rows.dtype.element_ty), mask=mask)
    if QUANTIZED:
        tl.store(stored + where, codes, mask=mask)
        tl.store(scales + at, scale, mask=inside)


@triton.jit
def _held_rows(
    held, held_scale, slot, real, d, dtype: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
    QUANTIZED: tl.constexpr,
):  # fmt: skip
    """(rows as they are attended, codes, scales) of slots of a state; zeros where not `real`."""
    codes = load_rows(held, slot * D, d, real, D, DP, True)
    if QUANTIZED:
        scale = tl.load(held_scale + slot, mask=real, other=0.0)
        return (codes.to(tl.float32) * scale[:, None]).to(dtype), codes, scale
    else:
        return codes, codes, 0.0


@triton.jit
def _list_slots(
    held_keys, held_values, held_key_scale, held_value_scale, held_positions, held_scores, fresh,
    keys, values, key_codes, value_codes, key_scale, value_scale, effective, positions,
    bounds, before, base, k, number, blocks, line, widest, sinks, window,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
    QUANTIZED: tl.constexpr, FRESH: tl.constexpr,
):  # fmt: skip
    """Some slots of one document: sinks, selected ones by position, the window by age.

    The pointers are those of the document's row, which has seen `before` tokens.
    """
    document = number // blocks
    item = number % blocks * ROWS + tl.arange(0, ROWS)
    width = sinks + widest + window
    is_selected = (item >= sinks) & (item < sinks + widest)
    is_window = (item >= sinks + widest) & (item < width)
    real = (item < width) & ((is_selected == 0) | (item < sinks + k))
    held_k = k
    if FRESH:  # whatever stands in the row, it holds nothing
        is_fresh = tl.load(fresh + document) != 0
        real &= is_fresh == 0
        held_k = tl.where(is_fresh, 0, k)
    place = item
    if (number % blocks * ROWS < sinks + widest) & (number % blocks * ROWS + ROWS > sinks):
        order = _places(
            held_positions + base + sinks, item - sinks, real & is_selected, widest, held_k, BLOCK
        )
        place = tl.where(is_selected, sinks + order, place)
    ring = item - sinks - widest
    age = (ring - before % window + window) % window
    place = tl.where(is_window, sinks + widest + age.to(tl.int32), place)
    at = line + tl.load(bounds + document).to(tl.int64) + document * width + place
    slot = base + tl.where(is_window, sinks + k + ring, item)
    position = tl.load(held_positions + slot, mask=real, other=_EMPTY)
    score = tl.load(held_scores + slot, mask=real, other=0.0)
    score = tl.where(position == _EMPTY, -float("inf"), score)
    score = tl.where(item < sinks, float("inf"), score)
    inside = item < width
    tl.store(positions + at, position.to(tl.int64), mask=inside)
    tl.store(effective + at, score, mask=inside)
    d = tl.arange(0, DP)
    dtype: tl.constexpr = keys.dtype.element_ty
    row, codes, scale = _held_rows(
        held_keys, held_key_scale, slot, real, d, dtype, D, DP, QUANTIZED
    )
    _store(keys, key_codes, key_scale, at, row, codes, scale, d, inside, D, QUANTIZED)
    row, codes, scale = _held_rows(
        held_values, held_value_scale, slot, real, d, dtype, D, DP, QUANTIZED
    )
    _store(values, value_codes, value_scale, at, row, codes, scale, d, inside, D, QUANTIZED)


@triton.jit
def _rows_seen(seen, seen_b, pool_rows, fresh, document, POOLED: tl.constexpr, FRESH: tl.constexpr):
    """int64, tokens that the rows of some documents have seen."""
    row = document.to(tl.int64)
    if POOLED:
        row = tl.load(pool_rows + document).to(tl.int64)
    before = tl.load(seen + row * seen_b)
    if FRESH:
        before = tl.where(tl.load(fresh + document) != 0, 0, before)
    return before


# What differs from step to step of a server, and would be compiled for: numbers that 16 divides or
# that are 1, and places in the middle of a tensor.
_VARYING = ("documents", "tokens", "listed", "ns_h")
_PLACES = ("pool_rows", "fresh", "bounds", "seen", "new_scores")


@triton.jit(do_not_specialize=_VARYING, do_not_specialize_on_alignment=_PLACES)
def _list_documents(
    held_keys, held_values, held_key_scale, held_value_scale, held_positions, held_scores, seen,
    pool_rows, fresh, bounds, budgets, starts, new_keys, new_values, new_scores, slopes,
    keys, values, key_codes, value_codes, key_scale, value_scale, effective, positions, sequences,
    keys_b, values_b, key_scale_b, value_scale_b, positions_b, scores_b,
    nk_h, nk_n, nv_h, nv_n, ns_h, ns_n,
    seen_b, documents, tokens, listed, blocks, widest, sinks, window,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
    SLOPED: tl.constexpr, QUANTIZED: tl.constexpr, POOLED: tl.constexpr, FRESH: tl.constexpr,
):  # fmt: skip
    """Some keys of one head: slots of a document, or tokens of any of them.

    Compiled without fused multiply-add: effective scores must be those that steps compute.
    """
    number = tl.program_id(0)
    head = tl.program_id(1)
    width = sinks + widest + window
    line = head.to(tl.int64) * listed
    if number < documents * blocks:
        its = number // blocks
        before = _rows_seen(seen, seen_b, pool_rows, fresh, its, POOLED, FRESH)
        held_row = its.to(tl.int64)
        held_row = tl.load(pool_rows + held_row).to(tl.int64) if POOLED else held_row
        _list_slots(
            held_keys + held_row * keys_b, held_values + held_row * values_b,
            held_key_scale + held_row * key_scale_b, held_value_scale + held_row * value_scale_b,
            held_positions + held_row * positions_b, held_scores + held_row * scores_b, fresh,
            keys, values, key_codes, value_codes, key_scale, value_scale, effective, positions,
            bounds, before, tl.load(starts + head).to(tl.int64), tl.load(budgets + head), number,
            blocks, line, widest, sinks, window, ROWS, BLOCK, D, DP, QUANTIZED, FRESH,
        )  # fmt: skip
        if (head == 0) & (number % blocks == 0):
            low, high = tl.load(bounds + its), tl.load(bounds + its + 1)
            first = (low + its * width).to(tl.int32)
            inside = tl.maximum(before - sinks, 0)
            inside = tl.minimum(inside, window).to(tl.int32)
            fields = sequences + 6 * its
            tl.store(fields, 0)
            tl.store(fields + 1, low.to(tl.int32))
            tl.store(fields + 2, (high - low).to(tl.int32))
            tl.store(fields + 3, first)
            tl.store(fields + 4, (high - low).to(tl.int32) + width)
            tl.store(fields + 5, first + width - inside)
        return
    token = (number - documents * blocks) * ROWS + tl.arange(0, ROWS)
    inside = token < tokens
    document = tl.zeros_like(token)
    for start in range(0, documents, BLOCK):
        other = start + tl.arange(0, BLOCK)
        stop = tl.load(bounds + other + 1, mask=other < documents, other=_LAST)
        document += tl.sum((stop[None, :] <= token[:, None]).to(tl.int32), 1)
    document = tl.minimum(document, documents - 1)
    place = (token - tl.load(bounds + document)).to(tl.int64)
    place += _rows_seen(seen, seen_b, pool_rows, fresh, document, POOLED, FRESH)
    at = line + token + (document + 1).to(tl.int64) * width
    score = tl.load(new_scores + head * ns_h + token.to(tl.int64) * ns_n, mask=inside, other=0.0)
    slope = tl.load(slopes + head) if SLOPED else 0.0
    score = effective_score(score, slope, place, SLOPED)
    score = tl.where(place < sinks, float("inf"), score)
    tl.store(positions + at, place, mask=inside)
    tl.store(effective + at, score, mask=inside)
    d = tl.arange(0, DP)
    own = token.to(tl.int64)
    row = load_rows(new_keys + head * nk_h, own * nk_n, d, inside, D, DP, True)
    codes, scale = _codes(row, QUANTIZED)
    _store(keys, key_codes, key_scale, at, row, codes, scale, d, inside, D, QUANTIZED)
    row = load_rows(new_values + head * nv_h, own * nv_n, d, inside, D, DP, True)
    codes, scale = _codes(row, QUANTIZED)
    _store(values, value_codes, value_scale, at, row, codes, scale, d, inside, D, QUANTIZED)


def list_documents(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scores: Tensor,
    slopes: Tensor | None,
    cu_seqlens: Tensor,
    layout: SlotLayout,
    state: SparseKState | StateRows,
    starts: Tensor,
) -> tuple[KeyList, Geometry]:
    """The keys of all documents in one row, [slots | tokens] of each, and who sees which.

    So one launch of every kernel does for documents of any lengths, none is padded to the length
    of another, and nobody asks the device how long they are.

    Args:
        q [1, H, N, D], k and v [1, G, N, D], scores [1, G, N].
        cu_seqlens: [docs + 1] bounds of the documents along N.
        state: one row for each document; rows of a pool are read where they stand.
        starts: int32 [G], first slot of each head.

    Raises:
        ValueError: the bounds, where they are on the CPU, are not 0 .. N in order.
    """
    n, size, device = q.shape[2], q.shape[3], q.device
    if cu_seqlens.device.type == "cpu":  # on a GPU they are believed: to look is to wait
        document_lengths(cu_seqlens, n)
    documents, heads, quantized = state.batch, layout.heads, state.quantized
    listed = documents * layout.width + n

    def row(*shape: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(1, heads, listed, *shape, dtype=dtype, device=device)

    keys, values = (row(size, dtype=k.dtype) for _ in range(2))
    effective, positions = row(dtype=torch.float64), row(dtype=torch.int64)
    stored = {"keys": keys, "values": values}
    scales = (effective, effective)  # never written
    if quantized:
        stored = {name: row(size, dtype=state.keys.dtype) for name in ("keys", "values")}
        scales = tuple(row(dtype=torch.float32) for _ in range(2))
        stored |= {"key_scale": scales[0], "value_scale": scales[1]}
    sequences = torch.empty(documents, SEQUENCE_FIELDS, dtype=torch.int32, device=device)
    k, v = rows_of(k), rows_of(v)
    blocks = triton.cdiv(layout.width, ROWS)
    pool, rows, fresh = state, None, None
    if isinstance(state, StateRows):
        pool, rows, fresh = state.pool, state.rows.contiguous(), state.fresh
    held_scales = (pool.key_scale, pool.value_scale) if quantized else (pool.scores,) * 2
    held = (pool.keys, pool.values, *held_scales, pool.positions, pool.scores)
    seen = pool.seen
    launch(
        _list_documents, (documents * blocks + triton.cdiv(n, ROWS), heads),
        *held, seen, seen if rows is None else rows, seen if fresh is None else fresh,
        cu_seqlens.to(device).contiguous(), head_budgets(layout.topk, device), starts,
        k, v, scores, scores if slopes is None else slopes,
        keys, values, stored["keys"], stored["values"], *scales, effective, positions, sequences,
        *(tensor.stride(0) for tensor in held),
        *k.stride()[1:3], *v.stride()[1:3], *scores.stride()[1:],
        seen.stride(0), documents, n, listed, blocks,
        max(layout.topk), layout.sinks, layout.window,
        ROWS=ROWS, BLOCK=BLOCK, D=size, DP=triton.next_power_of_2(size),
        SLOPED=slopes is not None, QUANTIZED=quantized, POOLED=rows is not None,
        FRESH=fresh is not None, num_warps=4, enable_fp_fusion=False,
    )  # fmt: skip
    base = layout.sinks + max(layout.topk)
    found = KeyList(keys, values, stored, effective, positions, base, max(layout.topk), n)
    shape = Geometry(
        1, heads, q.shape[1] // heads, n, listed, sequences, packed=True, longest=listed,
        regular=False,
    )  # fmt: skip
    return found, shape
