"""Which tiles a program of the forward pass takes, and what its warps need to know of each.

Where tiles are many, as many programs run as the GPU has multiprocessors, and each takes every so
many tiles: the first copies of a tile run under the last products of the one before.
"""

from functools import lru_cache

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from sparsek_kernels.triton.hopper.tiles import items, sequence_of, span_of

# Tiles per program from which sharing pays: 8 cost 9 % on an H200, 31 gained 4 %.
LEAST_TURNS = 16


@gluon.jit
def work_of(
    index, lines, shape, columns, window,
    SIZE: gl.constexpr, BQ: gl.constexpr, HG: gl.constexpr, REGULAR: gl.constexpr,
):  # fmt: skip
    """Tile `index`: whether it exists, batch, KV head, query head, first query, span, own list.

    `lines` are sequences, tiles, offsets, counts and listed keys; `shape` is (KV heads, group,
    queries, keys of a row); tiles stand in `columns` per row of heads.
    """
    sequences, tiles, offsets, counts, listed = lines
    heads, group, queries, row_keys = shape
    column = index % columns
    row = index // columns
    tile = column // (SIZE // BQ)
    exists, place, its = sequence_of(tile, sequences, tiles, queries, row_keys, SIZE, REGULAR)
    local = place * SIZE + column % (SIZE // BQ) * BQ
    head = row // (group // HG)
    last = its.first_key + its.keys
    t0 = last - its.queries + local
    t1 = gl.minimum(t0 + BQ, last)
    span, own = span_of(
        tile, head, heads, t0, t1, its.window_first, window, offsets, counts, listed
    )
    q_head = head * group + row % (group // HG) * HG
    exists = exists & (local < its.queries)
    return exists, its.batch, head, q_head, its.first_query + local, span, own


@gluon.jit
def rows_of(
    index, lines, shape, columns, window,
    SIZE: gl.constexpr, BQ: gl.constexpr, HG: gl.constexpr, BN: gl.constexpr,
    REGULAR: gl.constexpr,
):  # fmt: skip
    """Whether tile `index` exists, batch, query head, first query, queries, clear steps, all steps.

    What computing warps need; of the last tile where there are no more.
    """
    heads, group, queries, row_keys = shape
    last = columns * heads * (group // HG) - 1
    exists, batch, head, q_head, query, span, own = work_of(
        gl.minimum(index, last), lines, shape, columns, window, SIZE, BQ, HG, REGULAR
    )
    clear, steps = items(span, BN)
    return exists, batch, q_head, query, span.t1 - span.t0, clear, steps


@lru_cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def programs(tiles: int, device: torch.device) -> int:
    """Programs that share so many tiles: one each where they are few, and start as others end."""
    if device.type != "cuda":
        return min(tiles, 2)  # under the emulator: programs have several tiles there too
    multiprocessors = _multiprocessors(device)
    return multiprocessors if tiles >= LEAST_TURNS * multiprocessors else tiles
