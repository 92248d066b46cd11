"""Decoding steps: in one launch and in two the same slots to the bit; the likeliest token."""

import pytest
import torch
from logits import cases
from sparsek_kernels.attention import sparsek_attention
from sparsek_kernels.state import SlotLayout, SparseKState, StateRows
from sparsek_kernels.triton.decode import attend
from sparsek_kernels.triton.decode import step as steps
from sparsek_kernels.triton.decode.likeliest import likeliest
from sparsek_kernels.triton.launches.overlap import states_at_rest
from state_pool import strided_pool

pytestmark = pytest.mark.interpret
SHAPE = dict(topk=(20, 3), window=6, sinks=2)


def drawn(count, rows=1, heads=4, groups=2, dim=16, dtype=torch.float32):
    """Queries, keys, values and scores, among which there are ties, of `count` tokens."""
    new = torch.Generator().manual_seed(count)
    q, k, v = (
        torch.randn(rows, many, count, dim, generator=new).to(dtype)
        for many in (heads, groups, groups)
    )
    return q, k, v, torch.randint(0, 9, (rows, groups, count), generator=new).float()


def filled(rows=1, kept=torch.float32, count=40, **shape):
    """A state that has read `count` tokens."""
    shape = SHAPE | shape
    state = SparseKState.empty(rows, 2, 16, dtype=kept, **shape)
    return sparsek_attention(*drawn(count, rows), state=state, backend="pytorch", **shape)[1]


def tokens(rows=1):
    """Five more."""
    more = drawn(5, rows)
    return [[x[:, :, i : i + 1] for x in more] for i in range(5)]


def same(found: SparseKState, expected: SparseKState) -> None:
    for name, tensor in expected.slots.items():
        assert torch.equal(found.slots[name], tensor), name


@pytest.fixture(params=["one block", "several programs", "several blocks"])
def cut(request, monkeypatch):
    """How a head of 28 slots is cut, and one of 11."""
    if request.param != "one block":
        monkeypatch.setattr(steps, "_TILE_BYTES", 1024)  # 16 slots of 16 float32
    if request.param == "several blocks":
        monkeypatch.setattr(steps, "JOINED_NUMBERS", 20)
    return request.param


@torch.no_grad()
@pytest.mark.parametrize("kept", [torch.float32, torch.int8], ids=["float32", "int8"])
@pytest.mark.parametrize("more", [{}, {"softcap": 2.0, "sink_logits": torch.ones(4)}], ids=str)
def test_one_launch_is_two(relative_error, monkeypatch, cut, kept, more):
    monkeypatch.setattr(attend, "LEAST_SLOTS", 16)
    state = filled(kept=kept)
    states = [state, state.clone()]
    options = dict(**SHAPE, **more, slopes=torch.tensor([0.0, 0.02]), backend="triton")
    for token in tokens():
        outs = []
        for state, rows in zip(states, (4, 0), strict=True):
            monkeypatch.setattr(steps, "ONE_LAUNCH_ROWS", rows)
            outs.append(sparsek_attention(*token, state=state, **options)[0])
        assert relative_error(*outs) < 1e-5
    same(*states)
    assert not states[0].arrivals().any()


@torch.no_grad()
@pytest.mark.parametrize("topk, count", [((20, 0), 40), ((0, 0), 40), ((20, 1), 7), ((3, 20), 1)])
def test_one_launch_is_pytorch(relative_error, topk, count):
    """The same keys: none to select for some heads, slots not yet full (any of them is taken)."""
    state = filled(topk=topk, count=count)
    states = [state, state.clone()]
    options = dict(SHAPE, topk=topk, slopes=torch.tensor([0.0, 0.02]))
    for token in tokens():
        outs = [
            sparsek_attention(*token, state=state, backend=backend, **options)[0]
            for state, backend in zip(states, ("triton", "pytorch"), strict=True)
        ]
        assert relative_error(*outs) < 1e-5
        assert torch.equal(*(state.positions.sort(1).values for state in states))
        assert torch.equal(*(state.scores.sort(1).values for state in states))


@torch.no_grad()
def test_rows_of_a_pool_in_one_launch(cut):
    alone = filled(2)
    pool = strided_pool(5, 2, 16, **SHAPE)
    for row, own in ((3, 0), (1, 1)):
        pool.put_row(row, alone.index_select(torch.tensor([own])))
    # A server's own indices, which may have 32 bits, and its own memory for the answer.
    held = StateRows(pool, torch.tensor([[3, 0], [1, 0]], dtype=torch.int32)[:, 0])
    for token in tokens(2):
        out = torch.empty_like(token[0])
        outs = [
            sparsek_attention(*token, state=state, backend="triton", out=out, **SHAPE)[0]
            for state, out in ((alone, None), (held, out))
        ]
        assert torch.equal(*outs) and outs[1] is out
    same(held.take(), alone)
    assert not pool._arrivals, "other rows may be stepped beside these: each call counts for itself"
    assert pool.seen[[0, 2, 4]].tolist() == [7, 7, 7]


@torch.no_grad()
def test_a_step_counts_for_itself_where_its_state_may_not(monkeypatch, cut):
    """As where a CUDA graph is captured before any step has run."""
    states = [filled(2), filled(2)]
    monkeypatch.setattr(type(states[0]), "arrivals", lambda state: None)
    options = dict(SHAPE, backend="triton")
    for token in tokens(2):
        outs = []
        for state, rows in zip(states, (4, 0), strict=True):
            monkeypatch.setattr(steps, "ONE_LAUNCH_ROWS", rows)
            outs.append(sparsek_attention(*token, state=state, **options)[0])
        torch.testing.assert_close(*outs)
    same(*states)


@torch.no_grad()
def test_other_numbers_of_rows_and_copies_count_apart(relative_error):
    """A state whose rows were joined steps on, though programs were counted before."""
    state = filled(2, count=3)
    first, second, *_ = tokens(2)
    sparsek_attention(*first, state=state, backend="triton", **SHAPE)
    wider = SparseKState.cat([state, state])
    twin = wider.clone()
    token = [torch.cat([x, x]) for x in second]
    outs = [
        sparsek_attention(*token, state=held, backend=backend, **SHAPE)[0]
        for held, backend in ((wider, "triton"), (twin, "pytorch"))
    ]
    assert relative_error(*outs) < 1e-5
    same(wider, twin)
    assert state.arrivals().shape == (2, 3) and wider.arrivals().shape == (4, 3)
    assert wider.arrivals() is wider.arrivals()


@torch.no_grad()
@pytest.mark.parametrize(
    "rows, heads, dim, dtype, one",
    [
        (4, 32, 64, torch.bfloat16, True),
        (5, 32, 64, torch.bfloat16, False),
        (1, 64, 256, torch.bfloat16, True),
        (1, 8, 128, torch.float32, True),
        (1, 8, 256, torch.float32, False),  # tiles that would not stay in registers
        (1, 8 * 64, 128, torch.bfloat16, False),  # sums
    ],
)
def test_large_heads_and_many_rows_take_two(monkeypatch, rows, heads, dim, dtype, one):
    made = []
    for name in ("_one_launch", "_two_launches"):
        monkeypatch.setattr(steps, name, lambda q, *_, name=name: made.append(name))
    layout = SlotLayout((888,) * 8, 128, 4)
    state = SparseKState.empty(rows, 8, dim, topk=2, window=2, sinks=1, dtype=dtype)
    token = torch.zeros(rows, 8, 1, dim, dtype=dtype)
    q = torch.zeros(rows, heads, 1, dim, dtype=dtype)
    steps.step(q, token, token, torch.zeros(rows, 8, 1), None, state, scale=1.0)
    assert made == ["_one_launch" if one else "_two_launches"]
    if one:
        group, size = heads // 8, dtype.itemsize
        splits, tile, blocks = steps._cut(layout.width, group, dim, size)
        assert splits * tile * blocks >= layout.width
        assert tile * dim * size <= 32768 and splits * group * dim <= 8192


def test_states_are_at_rest_only_where_it_is_promised():
    from sparsek_kernels.triton.launches.overlap import are_states_at_rest

    assert not are_states_at_rest()
    with states_at_rest():
        assert are_states_at_rest()
    assert not are_states_at_rest()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("count", [1, 5, 2048, 2049, 6000])
def test_the_likeliest_token_is_argmax(count, dtype):
    for logits in cases(count, dtype):
        assert torch.equal(likeliest(logits), logits.argmax(-1))


@pytest.mark.parametrize("ends", [[5], [0, 2, 5]], ids=len)
def test_rows_that_have_ended_get_padding(ends):
    """As torch does it: padding for rows that ended before, and a row ends with its end."""
    words = torch.tensor([5, 1, 2, 5, 0, 3])
    logits = torch.nn.functional.one_hot(words, 7).float()
    running, ends, pad = torch.tensor([1, 1, 1, 0, 0, 0]), torch.tensor(ends), torch.tensor(6)
    expected = words * running + pad * (1 - running)
    left = running * (expected[:, None] != ends).all(dim=1)
    assert torch.equal(likeliest(logits, (running, ends, pad)), expected)
    assert torch.equal(running, left) and left.tolist() != [1, 1, 1, 0, 0, 0]
