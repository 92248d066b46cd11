"""Tables of documents, made in one launch each, against those that PyTorch makes."""

import pytest
import torch
from sparsek_kernels.triton.documents.tables import BLOCK
from sparsek_kernels.triton.geometry import geometry, plain_sequence_table
from sparsek_kernels.triton.lists import _room, plain_tile_tables
from sparsek_kernels.triton.selection import _segment_tables, plain_segment_tables

pytestmark = pytest.mark.interpret

LENGTHS = [[5], [0, 0, 7], [300, 0, 1, 64, 65, 0], [0] * 3, [3] * 600]


@pytest.mark.parametrize("lengths", LENGTHS, ids=lambda lengths: f"{len(lengths)} documents")
@pytest.mark.parametrize("width", [0, 37])
@pytest.mark.parametrize("topk", [(4, 0, 90), (37,)])
def test_tables_of_documents(lengths, width, topk):
    queries, heads, window = sum(lengths), len(topk), 9
    bounds = torch.tensor([0, *lengths]).cumsum(0)
    first = bounds + torch.arange(len(bounds)) * width
    keys = queries + len(lengths) * width
    if keys == 0:
        return
    shape = geometry(
        (1, heads, queries, 8), (1, heads, keys, 8), bounds.device, bounds, cu_keys=first
    )
    segments, chunks, lines = _segment_tables(shape, topk, bounds.device)
    expected = plain_segment_tables(shape, topk, len(chunks), bounds.device)
    assert torch.equal(segments, expected[0])
    assert torch.equal(lines, expected[2])
    used = expected[1][:, 0] >= 0
    assert torch.equal(chunks[:, 0], expected[1][:, 0])
    assert torch.equal(chunks[used], expected[1][used])
    assert lines[-1] == used.sum()  # the bound held
    for size in (32, 64, 1024):
        room = _room(topk, window, 2, shape, size)
        tiles, offsets, first_tiles = plain_tile_tables(
            shape, [k + 2 + size for k in topk], size, window
        )
        used = tiles[:, 0] >= 0
        assert torch.equal(room.tiles[:, 0], tiles[:, 0])
        assert torch.equal(room.tiles[used], tiles[used])
        assert torch.equal(room.offsets, offsets)
        assert torch.equal(room.first, first_tiles)
        assert offsets[-1] <= room.total


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("lengths", [[], *LENGTHS, [1] * (BLOCK + 1)], ids=len)
def test_sequences_and_tiles_of_documents(lengths, dtype):
    bounds, queries = torch.tensor([0, *lengths]).cumsum(0).to(dtype), sum(lengths)
    shape = geometry((1, 2, queries, 8), (1, 1, queries, 8), bounds.device, bounds)
    assert shape.sequences.dtype == torch.int32
    assert torch.equal(shape.sequences, plain_sequence_table(bounds, None, None))
    for size in (32, 64):
        tiles, plain = shape.tiles(size), shape.plain_tiles(size)
        used = plain[:, 0] >= 0
        assert torch.equal(tiles[:, 0], plain[:, 0])
        assert torch.equal(tiles[used], plain[used])


def test_several_programs_and_rounds_are_among_them():
    assert len(LENGTHS[-1]) * 3 > BLOCK
