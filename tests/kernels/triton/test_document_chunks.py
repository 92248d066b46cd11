"""Packed documents read in chunks of any lengths: each ends with the state of one pass over it."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sparsek_kernels import SparseKState, sparsek_attention
from sparsek_kernels.naive.attention import naive_attention, naive_selection
from sparsek_kernels.quantization import quantize

pytestmark = pytest.mark.interpret

HEADS, GROUPS, DIM = 4, 2, 16
SLOPES = torch.tensor([0.0, 0.3])  # ties in the first head, which the second breaks


@st.composite
def splits(draw, most: int):
    """(topk, window, sinks), the cache's dtype, and the lengths of what is read.

    For each chunk, how many tokens each document gets of it: documents may be empty, end early,
    begin late, and pass over chunks in between. And the length of a last chunk in which they are
    rows of a batch, each of another age; 0: there is none.
    """
    topk = tuple(draw(st.integers(0, 7)) for _ in range(GROUPS))
    shape = dict(topk=topk, window=draw(st.integers(1, 6)), sinks=draw(st.integers(0, 4)))
    documents, chunks = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    size = st.one_of(st.integers(0, 3), st.integers(0, most))
    steps = [[draw(size) for _ in range(documents)] for _ in range(chunks)]
    tail = draw(st.sampled_from([0, 2, 5]))  # one token alone would be decoded
    return shape, draw(st.sampled_from([torch.float32, torch.int8])), steps, tail


def inputs(lengths: list[int]) -> list[list[torch.Tensor]]:
    """q, k, v and scores of each document whole; few different scores, some of them -inf."""
    new = torch.Generator().manual_seed(sum(lengths))
    made = []
    for length in lengths:
        scores = torch.randint(-1, 4, (1, GROUPS, length), generator=new).float()
        scores = scores.masked_fill(scores < 0, -torch.inf)
        rows = (torch.randn(1, h, length, DIM, generator=new) for h in (HEADS, GROUPS, GROUPS))
        made.append([*rows, scores])
    return made


def read(whole, steps, tail, kept, shape):
    """Outputs of each document, and the state, after all chunks."""
    state = SparseKState.empty(len(whole), GROUPS, DIM, dtype=kept, **shape)
    options = {"slopes": SLOPES, "backend": "triton", **shape}
    done, outs = [0] * len(whole), [[] for _ in whole]
    for lengths in steps:
        cuts = [
            [x[:, :, start : start + length] for x in tensors]
            for tensors, start, length in zip(whole, done, lengths, strict=True)
        ]
        packed = [torch.cat(parts, 2) for parts in zip(*cuts, strict=True)]
        bounds = torch.tensor([0, *lengths]).cumsum(0)
        out, state = sparsek_attention(*packed, cu_seqlens=bounds, state=state, **options)
        for mine, part in zip(outs, out.split(lengths, 2), strict=True):
            mine.append(part)
        done = [start + length for start, length in zip(done, lengths, strict=True)]
    if tail:
        rows = [[x[:, :, -tail:] for x in tensors] for tensors in whole]
        batch = [torch.cat(parts) for parts in zip(*rows, strict=True)]
        out, state = sparsek_attention(*batch, state=state, **options)
        for mine, part in zip(outs, out.split(1), strict=True):
            mine.append(part)
    return [torch.cat(parts, 2) for parts in outs], state


def check(shape, kept, steps, tail, relative_error) -> None:
    lengths = [sum(sizes) + tail for sizes in zip(*steps, strict=True)]
    whole = inputs(lengths)
    outs, state = read(whole, steps, tail, kept, shape)
    _, once = read(whole, [lengths], 0, kept, shape)
    for name, tensor in state.slots.items():
        assert torch.equal(tensor, once.slots[name]), f"{name}, after one pass it is another"
    assert state.seen.tolist() == lengths
    for row, (tensors, out) in enumerate(zip(whole, outs, strict=True)):
        if lengths[row] == 0:
            assert (state.positions[row] == -1).all()
            continue
        if kept != torch.int8:  # later chunks see earlier keys as they were kept
            assert relative_error(out, naive_attention(*tensors, slopes=SLOPES, **shape)) < 1e-5
        check_slots(state, row, tensors, **shape)


def check_slots(state, row, tensors, *, topk, window, sinks) -> None:
    """What the slots of one document hold, by the definition."""
    _, k, v, scores = (x[0] for x in tensors)
    length, first = k.shape[1], 0
    for head in range(GROUPS):
        effective = scores[head].double() + SLOPES[head].double() * torch.arange(length)
        chosen = naive_selection(effective, topk[head], window, sinks)[-1].nonzero()[:, 0]
        slots = slice(first, first + sinks + topk[head] + window)
        first = slots.stop
        places = state.positions[row, slots].long()
        at = places[sinks : sinks + topk[head]]
        assert at[at >= 0].tolist() == chosen.tolist()
        assert places[:sinks].tolist() == [p if p < length else -1 for p in range(sinks)]
        ring = [-1] * window
        for p in range(max(sinks, length - window), length):
            ring[p % window] = p
        assert places[sinks + topk[head] :].tolist() == ring
        there = places >= 0
        for held, new in ((state.keys, k), (state.values, v)):
            new = quantize(new)[0] if state.quantized else new
            assert torch.equal(held[row, slots][there], new[head, places[there]])
            assert not held[row, slots][~there].any()
        counted = there & (places >= sinks)
        assert torch.equal(state.scores[row, slots][counted], effective[places[counted]])


QUIET = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]


ENDING_EARLY = [[5, 0, 7], [0, 3, 1], [9, 2, 0]]  # and beginning late, and passing over a chunk


@pytest.mark.parametrize(
    "topk, window, sinks, kept, steps, tail",
    [
        ((3, 0), 2, 1, torch.float32, ENDING_EARLY, 2),
        ((0, 5), 4, 0, torch.int8, [[1, 14], [3, 0]], 5),
        ((7, 7), 1, 4, torch.float32, [[0, 1, 20, 2]], 0),
    ],
)
@torch.no_grad()
def test_a_split_ends_as_one_pass(topk, window, sinks, kept, steps, tail, relative_error):
    check(dict(topk=topk, window=window, sinks=sinks), kept, steps, tail, relative_error)


@pytest.mark.slow
@settings(max_examples=60, deadline=None, suppress_health_check=QUIET)
@given(drawn=splits(most=90))
@torch.no_grad()
def test_many_splits_end_as_one_pass(drawn, relative_error):
    check(*drawn, relative_error)
