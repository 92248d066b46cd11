"""The Triton backend on a CUDA device, at real sizes, against the PyTorch backend in float32."""

import pytest
import torch
from sparsek_kernels.attention import sparsek_attention
from sparsek_kernels.state import SparseKState, StateRows
from sparsek_kernels.triton import linears
from sparsek_kernels.triton.linears import Shape
from state_pool import strided_pool

pytestmark = pytest.mark.gpu

# Against float32: output and gradients carry the rounding of their own dtype only.
TOLERANCE = {torch.bfloat16: 8e-3, torch.float16: 1e-3, torch.float32: 2e-5}
CASES = [  # batch, heads, groups, n, dim, topk, window, sinks, gate, dtype
    (1, 32, 8, 4097, 128, 1024, 1024, 4, "straight_through", torch.bfloat16),
    (2, 4, 2, 3000, 64, 100, 77, 0, "log", torch.float16),
    (1, 4, 4, 2500, 80, 64, 33, 1, "kv", torch.float32),
    (1, 14, 2, 2111, 96, 200, 100, 3, "straight_through", torch.bfloat16),
    (1, 4, 1, 2500, 256, 300, 200, 0, "straight_through", torch.bfloat16),
    (1, 16, 1, 1500, 64, 1, 1, 0, "log", torch.float16),
    (1, 8, 2, 2300, 128, [256, 0], 128, 4, "kv", torch.bfloat16),
    (1, 1, 1, 127, 64, 5, 1, 0, "straight_through", torch.bfloat16),
    (2, 4, 4, 1999, 64, 150, 70, 2, "straight_through", torch.float16),
    (1, 16, 1, 1030, 128, 64, 1, 0, "straight_through", torch.float16),
    (1, 12, 2, 1500, 128, [700, 3], 31, 4, "straight_through", torch.bfloat16),
    (1, 8, 2, 5000, 128, 2000, 500, 0, "straight_through", torch.bfloat16),
]


def random_inputs(batch, heads, groups, n, dim, dtype, seed=0, offset=0.0):
    new = torch.Generator("cuda").manual_seed(seed)
    tensors = [
        torch.randn(batch, h, n, dim, generator=new, device="cuda", dtype=dtype)
        for h in (heads, groups, groups)
    ]
    scores = 2 * torch.randn(batch, groups, n, generator=new, device="cuda") + offset
    return [x.requires_grad_() for x in (*tensors, scores)]


@pytest.mark.parametrize("batch, heads, groups, n, dim, topk, window, sinks, gate, dtype", CASES)
@pytest.mark.parametrize("offset", [0.0, 1e4])
def test_forward_and_gradients(
    relative_error, batch, heads, groups, n, dim, topk, window, sinks, gate, dtype, offset
):
    inputs = random_inputs(batch, heads, groups, n, dim, dtype, offset=offset)
    options = dict(topk=topk, window=window, sinks=sinks, gate=gate)
    out = sparsek_attention(*inputs, backend="triton", **options)
    grad = torch.randn_like(out)
    mine = torch.autograd.grad(out, inputs, grad)
    wide = [x.detach().float().requires_grad_() for x in inputs]
    wanted = sparsek_attention(*wide, backend="pytorch", **options)
    theirs = torch.autograd.grad(wanted, wide, grad.float())
    assert relative_error(out, wanted) < TOLERANCE[dtype]
    for name, a, b in zip(("dq", "dk", "dv", "dscores"), mine, theirs, strict=True):
        # A gradient is a sum of terms of both signs: it loses more of its leading digits.
        assert relative_error(a, b) < 2 * TOLERANCE[dtype], name


@pytest.mark.parametrize("dim, dtype", [(64, torch.bfloat16), (128, torch.float32)])
@pytest.mark.parametrize("gate", ["straight_through", "log", "kv"])
def test_capped_and_sink_logits(relative_error, dim, dtype, gate):
    inputs = random_inputs(1, 8, 2, 2100, dim, dtype)
    sinks = torch.linspace(-3, 9, 8, device="cuda").requires_grad_()
    options = dict(topk=[300, 60], window=100, sinks=4, gate=gate, softcap=1.5)
    out = sparsek_attention(*inputs, sink_logits=sinks, backend="triton", **options)
    grad = torch.randn_like(out)
    mine = torch.autograd.grad(out, [*inputs, sinks], grad)
    wide = [x.detach().float().requires_grad_() for x in (*inputs, sinks)]
    wanted = sparsek_attention(*wide[:4], sink_logits=wide[4], backend="pytorch", **options)
    theirs = torch.autograd.grad(wanted, wide, grad.float())
    assert relative_error(out, wanted) < TOLERANCE[dtype]
    for name, a, b in zip(("dq", "dk", "dv", "dscores", "dsinks"), mine, theirs, strict=True):
        assert relative_error(a, b) < 2 * TOLERANCE[dtype], name


@pytest.mark.parametrize("held", [torch.bfloat16, torch.int8])
def test_steps_with_capped_and_sink_logits(relative_error, held):
    q, k, v, scores = (x.detach() for x in random_inputs(2, 8, 2, 400, 64, torch.bfloat16))
    shape = dict(topk=[100, 40], window=64, sinks=4)
    options = shape | dict(softcap=1.5, sink_logits=torch.linspace(-3, 9, 8, device="cuda"))
    state = SparseKState.empty(2, 2, 64, dtype=held, device="cuda", **shape)
    other = state.clone()
    for first, last in ((0, 300), *((t, t + 1) for t in range(300, 400))):
        cut = [x[:, :, first:last] for x in (q, k, v, scores)]
        out, state = sparsek_attention(*cut, state=state, backend="triton", **options)
        same, other = sparsek_attention(*cut, state=other, backend="pytorch", **options)
        assert relative_error(out, same) < TOLERANCE[torch.bfloat16]
    assert torch.equal(state.positions, other.positions)


def stand_ins_of(heads: int, dim: int) -> torch.Tensor:
    pairs = torch.randn(heads, 2, 2 * dim + 2, device="cuda")
    pairs[..., -2] -= 2.0
    pairs[..., -1] += 5.0  # some limits are reached
    return pairs


@pytest.mark.parametrize(
    "dim, dtype, n, packed",
    [
        (64, torch.bfloat16, 2100, False),
        (128, torch.bfloat16, 20_001, False),
        (128, torch.bfloat16, 3001, True),
        (80, torch.float32, 2100, False),
    ],
)
def test_stand_ins(relative_error, dim, dtype, n, packed):
    inputs = random_inputs(1, 8, 2, n, dim, dtype)
    pairs = stand_ins_of(8, dim).requires_grad_()
    options = dict(topk=[300, 60], window=100, sinks=4)
    if packed:
        options["cu_seqlens"] = torch.tensor([0, 900, 903, n], dtype=torch.int32, device="cuda")
    out = sparsek_attention(*inputs, stand_ins=pairs, backend="triton", **options)
    plain = sparsek_attention(*inputs, backend="triton", **options)
    assert relative_error(out, plain) > 0.05
    grad = torch.randn_like(out)
    mine = torch.autograd.grad(out, [*inputs, pairs], grad)
    wide = [x.detach().float().requires_grad_() for x in (*inputs, pairs)]
    wanted = sparsek_attention(*wide[:4], stand_ins=wide[4], backend="pytorch", **options)
    theirs = torch.autograd.grad(wanted, wide, grad.float())
    assert relative_error(out, wanted) < TOLERANCE[dtype]
    for name, a, b in zip(("dq", "dk", "dv", "dscores", "pairs"), mine, theirs, strict=True):
        assert relative_error(a, b) < 2 * TOLERANCE[dtype], name


@pytest.mark.parametrize("held", [torch.bfloat16, torch.int8])
@pytest.mark.parametrize("rows", [2, 6])
def test_steps_with_stand_ins(relative_error, held, rows):
    q, k, v, scores = (x.detach() for x in random_inputs(rows, 8, 2, 260, 64, torch.bfloat16))
    shape = dict(topk=[100, 40], window=64, sinks=4)
    options = shape | dict(stand_ins=stand_ins_of(8, 64))
    state = SparseKState.empty(rows, 2, 64, dtype=held, device="cuda", **shape)
    other = state.clone()
    for first, last in ((0, 100), (100, 160), *((t, t + 1) for t in range(160, 260))):
        cut = [x[:, :, first:last] for x in (q, k, v, scores)]
        out, state = sparsek_attention(*cut, state=state, backend="triton", **options)
        same, other = sparsek_attention(*cut, state=other, backend="pytorch", **options)
        assert relative_error(out, same) < TOLERANCE[torch.bfloat16]


def test_same_bits_twice_in_deterministic_mode():
    inputs = random_inputs(1, 8, 2, 8192, 128, torch.bfloat16)
    torch.use_deterministic_algorithms(True)
    try:
        runs = []
        for _ in range(2):
            out = sparsek_attention(*inputs, topk=512, window=256, sinks=4, backend="triton")
            runs.append((out, *torch.autograd.grad(out, inputs, out.detach())))
    finally:
        torch.use_deterministic_algorithms(False)
    for a, b in zip(*runs, strict=True):
        assert torch.equal(a, b)


def test_prefill_then_graphed_decode_equals_one_call(relative_error):
    n, prefix = 900, 800
    q, k, v, scores = (x.detach() for x in random_inputs(2, 8, 2, n, 128, torch.bfloat16))
    scores = scores.round()  # ties
    options = dict(topk=100, window=64, sinks=4)
    whole = sparsek_attention(q, k, v, scores, backend="triton", **options)
    state = SparseKState.empty(2, 2, 128, dtype=torch.bfloat16, device="cuda", **options)
    cut = [x[:, :, :prefix] for x in (q, k, v, scores)]
    _, state = sparsek_attention(*cut, state=state, **options)
    slot = [x[:, :, prefix : prefix + 1].clone() for x in (q, k, v, scores)]
    # Warm up on a copy, then capture: capturing does not run the step.
    sparsek_attention(*slot, state=state.clone(), **options)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, _ = sparsek_attention(*slot, state=state, **options)
    for t in range(prefix, n):
        for target, source in zip(slot, (q, k, v, scores), strict=True):
            target.copy_(source[:, :, t : t + 1])
        graph.replay()
        assert relative_error(out, whole[:, :, t : t + 1]) < TOLERANCE[torch.bfloat16]
    assert state.seen.tolist() == [n, n]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_query_sees_beyond_its_documents(relative_error, dtype):
    bounds = [0, 1, 2, 1500, 1500, 4000]
    inputs = random_inputs(1, 8, 2, 4000, 64, dtype)
    options = dict(topk=[100, 60], window=50, sinks=2, backend="triton")
    cu_seqlens = torch.tensor(bounds, dtype=torch.int32, device="cuda")
    out = sparsek_attention(*inputs, cu_seqlens=cu_seqlens, **options)
    mine = torch.autograd.grad(out, inputs, out.detach())
    parts = [
        sparsek_attention(*(x[:, :, a:b] for x in inputs), **options)
        for a, b in zip(bounds, bounds[1:], strict=False)
        if a < b
    ]
    alone = torch.cat(parts, 2)
    theirs = torch.autograd.grad(alone, inputs, out.detach())
    tolerance = TOLERANCE[dtype]
    assert relative_error(out, alone) < tolerance
    for a, b in zip(mine, theirs, strict=True):
        assert relative_error(a, b) < 4 * tolerance


@pytest.mark.parametrize("scores", ["equal", "rising", "falling"])
def test_scores_that_move_the_set_at_every_step_or_never(relative_error, scores):
    """The lists are then all back or all front; in order, every new key evicts one."""
    q, k, v, u = (x.detach() for x in random_inputs(1, 4, 1, 2500, 128, torch.bfloat16))
    order = torch.arange(2500, device="cuda", dtype=torch.float32)
    u = {"equal": 0 * order, "rising": 0.01 * order, "falling": -0.01 * order}[scores]
    inputs = [x.requires_grad_() for x in (q, k, v, u.expand(1, 1, -1).contiguous())]
    options = dict(topk=300, window=100, sinks=4)
    out = sparsek_attention(*inputs, backend="triton", **options)
    grad = torch.randn_like(out)
    mine = torch.autograd.grad(out, inputs, grad)
    wide = [x.detach().float().requires_grad_() for x in inputs]
    wanted = sparsek_attention(*wide, backend="pytorch", **options)
    theirs = torch.autograd.grad(wanted, wide, grad.float())
    assert relative_error(out, wanted) < TOLERANCE[torch.bfloat16]
    for a, b in zip(mine[:3], theirs[:3], strict=True):
        assert relative_error(a, b) < 2 * TOLERANCE[torch.bfloat16]


def test_a_million_tokens_fit(relative_error):
    n = 1 << 20
    inputs = random_inputs(1, 8, 2, n, 128, torch.bfloat16)
    out = sparsek_attention(*inputs, topk=1024, window=1024, sinks=4, backend="triton")
    gradients = torch.autograd.grad(out.float().square().sum(), inputs)
    for g in gradients:
        assert torch.isfinite(g).all() and g.abs().max() > 0
    # A prefix does not know what follows it.
    short = [x.detach()[:, :, :20000] for x in inputs]
    head = sparsek_attention(*short, topk=1024, window=1024, sinks=4, backend="triton")
    assert relative_error(out[:, :, :20000], head) < TOLERANCE[torch.bfloat16]


def test_compiled_models_keep_one_graph():
    q, k, v, scores = random_inputs(1, 4, 2, 3000, 64, torch.bfloat16)

    @torch.compile(fullgraph=True)
    def step(q, k, v, scores):
        return sparsek_attention(q * 2, k, v, scores, topk=64, window=32, backend="triton") + 1

    out = step(q, k, v, scores)
    out.sum().backward()
    assert torch.isfinite(scores.grad).all()


def test_rows_of_a_pool_step_as_rows_of_their_own():
    """In place, in blocks that lie apart, and as one CUDA graph."""
    shape = dict(topk=(40, 90), window=32, sinks=4)
    sizes = dict(dtype=torch.bfloat16, device="cuda")
    pool = strided_pool(9, 2, 64, **sizes, **shape)
    alone = SparseKState.empty(3, 2, 64, **sizes, **shape)
    rows = torch.tensor([7, 2, 5], device="cuda")
    new = torch.Generator("cuda").manual_seed(0)

    def draw(n):
        parts = [torch.randn(3, h, n, 64, generator=new, **sizes) for h in (8, 2, 2)]
        return [*parts, torch.randn(3, 2, n, generator=new, device="cuda")]

    prompt = draw(200)
    fresh = StateRows(pool, rows, torch.ones(3, dtype=torch.bool, device="cuda"))
    sparsek_attention(*prompt, state=fresh, backend="triton", **shape)
    _, alone = sparsek_attention(*prompt, state=alone, backend="triton", **shape)
    held, token = StateRows(pool, rows), draw(1)
    sparsek_attention(*token, state=held, backend="triton", **shape)  # compiled before the capture
    sparsek_attention(*token, state=alone, backend="triton", **shape)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, _ = sparsek_attention(*token, state=held, backend="triton", **shape)
    for _ in range(50):
        for tensor, fresh_values in zip(token, draw(1), strict=True):
            tensor.copy_(fresh_values)
        graph.replay()
        expected, alone = sparsek_attention(*token, state=alone, backend="triton", **shape)
        assert torch.equal(out, expected)
    for name, tensor in held.take().slots.items():
        assert torch.equal(tensor, alone.slots[name]), name


@pytest.mark.parametrize("kept", [torch.bfloat16, torch.int8])
@torch.no_grad()
def test_rows_read_pieces_of_any_lengths_in_one_launch(relative_error, kept):
    """As each alone, and nobody asks the device how long they are."""
    shape = dict(topk=(40, 90), window=32, sinks=4)
    options = dict(**shape, slopes=torch.tensor([0.0, 0.02], device="cuda"), backend="triton")
    sizes = dict(dtype=kept, device="cuda")
    pool = strided_pool(9, 2, 64, **sizes, **shape)
    alone = [SparseKState.empty(1, 2, 64, **sizes, **shape) for _ in range(4)]
    rows = torch.tensor([7, 2, 5, 0], device="cuda")
    fresh = torch.ones(4, dtype=torch.bool, device="cuda")
    new = torch.Generator("cuda").manual_seed(0)
    # Beyond 1024 packed tokens key lists are built in two steps: sums come in another order.
    for lengths in ([300, 17, 467, 64], [3, 200, 64, 500], [1500, 17, 467, 64]):
        n = sum(lengths)
        bf16 = dict(generator=new, device="cuda", dtype=torch.bfloat16)
        tensors = [torch.randn(1, h, n, 64, **bf16) for h in (8, 2, 2)]
        tensors.append(torch.randn(1, 2, n, generator=new, device="cuda"))
        bounds = torch.tensor([0, *lengths], device="cuda").cumsum(0).int()
        held = StateRows(pool, rows, fresh)
        kept_before = held.take()
        warm = [x.clone() for x in tensors]
        sparsek_attention(*warm, cu_seqlens=bounds, state=kept_before, **options)
        torch.cuda.set_sync_debug_mode("error")
        try:
            out, _ = sparsek_attention(*tensors, cu_seqlens=bounds, state=held, **options)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        fresh, first = None, 0
        for row, length in enumerate(lengths):
            cut = [x[:, :, first : first + length] for x in tensors]
            expected, alone[row] = sparsek_attention(*cut, state=alone[row], **options)
            found = out[:, :, first : first + length]
            if n <= 1024:
                assert torch.equal(found, expected)
            assert relative_error(found, expected) < TOLERANCE[torch.bfloat16]
            first += length
    for name, tensor in StateRows(pool, rows).take().slots.items():
        assert torch.equal(tensor, torch.cat([state.slots[name] for state in alone])), name


@pytest.mark.parametrize(
    "rows, shape",
    [
        (1, Shape(2, 2048, 4, overlap=True, ahead=1024)),
        (3, Shape(8, 256, 4, overlap=True)),
        (4, Shape(8, 512, 8, overlap=True, ahead=1024)),
        (4, Shape(16, 256, 4, stages=3, dot=True, overlap=True, ahead=2048)),
        (4, Shape(8, 512, 4, dot=True, early=True, overlap=True)),
        (13, Shape(4, 1024, 8, dot=True, early=True, overlap=True, ahead=2048)),
    ],
    ids=str,
)
def test_maps_of_a_few_rows_one_after_another(relative_error, rows, shape):
    """Launches that begin early read what the one before them wrote; always to the same bits."""
    new = torch.Generator("cuda").manual_seed(0)
    first, second = (
        torch.randn(n, k, generator=new, device="cuda").div(k**0.5).bfloat16()
        for n, k in ((3000, 2000), (2000, 3000))
    )
    x = torch.randn(rows, 2000, generator=new, device="cuda").bfloat16()
    runs = []
    for _ in range(3):
        y = x
        for _ in range(4):
            y = linears.linear(
                linears.linear(y, first, shape=shape), second, residual=y, shape=shape
            )
        runs.append(y)
    wanted = x
    for _ in range(4):
        wanted = wanted + wanted @ first.T @ second.T
    assert relative_error(runs[0], wanted) < 2e-2  # rounded after every map
    assert all(torch.equal(run, runs[0]) for run in runs[1:])
