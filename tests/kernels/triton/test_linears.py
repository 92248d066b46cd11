"""Linear maps of a few rows against torch's own modules, which round where they round."""

import pytest
import torch
from sparsek_kernels.triton import linears
from sparsek_kernels.triton.linears import Norm, Scorer, Shape, launch
from torch import nn
from torch.nn import functional as F

pytestmark = pytest.mark.interpret
# Sums in another order. The interpreter multiplies tiles in float16 but not in bfloat16, and cuts
# bfloat16 off where a GPU rounds.
NEAR = {torch.float32: 1e-5, torch.float16: 3e-3, torch.bfloat16: 5e-2}
SHAPES = {
    "one row": Shape(pairs=4, columns=32, warps=4),
    "at once": Shape(pairs=3 + 1, columns=128, warps=4),
    "in turn": Shape(pairs=8, columns=32, warps=1, overlap=True),  # four rows of weights a warp
    "few rows": Shape(pairs=16, columns=16, warps=4, stages=2, dot=True),
    "few rows, held": Shape(pairs=16, columns=16, warps=4, stages=2, dot=True, held=True),
    "early": Shape(pairs=4, columns=32, warps=2, dot=True, early=True, overlap=True),
    "early, at once": Shape(pairs=8, columns=128, warps=4, dot=True, early=True, ahead=128),
}
CASES = [
    (1, "one row", torch.float32),
    (1, "one row", torch.bfloat16),
    (1, "at once", torch.float32),
    (2, "one row", torch.float32),
    (3, "in turn", torch.float32),
    (4, "in turn", torch.bfloat16),
    (4, "at once", torch.float16),
    (1, "few rows", torch.float32),
    (3, "few rows", torch.float32),
    (8, "few rows", torch.float16),
    (1, "early", torch.float32),
    (4, "early", torch.float16),
    (7, "early", torch.float32),
    (16, "early, at once", torch.float32),
]
cases = pytest.mark.parametrize("rows, name, dtype", CASES, ids=lambda value: str(value))


def new(*shape, dtype, seed=0):
    made = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    return (made / shape[-1] ** 0.5 if len(shape) > 1 else made).to(dtype)


def rms_norm(x, norm):
    """As transformers' Llama: rounded before the weight and after it."""
    wide = x.float()
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + norm.eps)
    return norm.weight * wide.to(x.dtype)


def turned(x, cos, sin):
    """Rotary positions of [M, heads, D]."""
    low, high = x.chunk(2, dim=-1)
    return x * cos[:, None] + torch.cat((-high, low), dim=-1) * sin[:, None]


def near(found, expected, dtype):
    assert found.dtype == expected.dtype and not found.isnan().any()
    scale = expected.float().abs().max()
    assert float((found.float() - expected.float()).abs().max() / scale) < NEAR[dtype]


@cases
@pytest.mark.parametrize("outputs, inputs", [(19, 70), (16, 128)])
def test_a_linear_map(rows, name, dtype, outputs, inputs):
    x, weight = new(rows, inputs, dtype=dtype), new(outputs, inputs, dtype=dtype, seed=1)
    bias, residual = new(outputs, dtype=dtype, seed=2), new(rows, outputs, dtype=dtype, seed=3)
    norm = Norm(1 + new(inputs, dtype=dtype, seed=4), 1e-5)
    shape = SHAPES[name]
    near(linears.linear(x, weight, shape=shape), F.linear(x, weight), dtype)
    found = linears.linear(x, weight, bias, norm=norm, residual=residual, shape=shape)
    near(found, residual + F.linear(rms_norm(x, norm), weight, bias), dtype)


def test_what_torch_multiplies_faster_is_left_to_it(monkeypatch):
    x, weight = new(3, 64, dtype=torch.float32), new(16, 64, dtype=torch.float32, seed=1)
    bias, residual = new(16, dtype=torch.float32, seed=2), new(3, 16, dtype=torch.float32, seed=3)
    monkeypatch.setattr(launch, "FASTER_IN_TORCH", {(4, 64, 16)})
    monkeypatch.setattr(launch, "_launch", None)  # not called
    expected = F.linear(x, weight, bias)
    assert torch.equal(linears.linear(x, weight, bias), expected)
    assert torch.equal(linears.linear(x, weight, bias, residual=residual), expected + residual)
    with pytest.raises(TypeError):  # one row, or a named shape, is launched
        linears.linear(x[:1], weight, bias)


@cases
def test_a_gated_map(rows, name, dtype):
    x, norm = 3 * new(rows, 70, dtype=dtype), Norm(1 + new(70, dtype=dtype, seed=4), 1e-6)
    gate, up = (
        (new(13, 70, dtype=dtype, seed=i), new(13, dtype=dtype, seed=i + 2)) for i in (1, 2)
    )
    found = linears.gated(x, gate, up, norm=norm, shape=SHAPES[name])
    inner = rms_norm(x, norm)
    near(found, F.silu(F.linear(inner, *gate)) * F.linear(inner, *up), dtype)
    found = linears.gated(x, (gate[0], None), (up[0], None), shape=SHAPES[name])
    near(found, F.silu(F.linear(x, gate[0])) * F.linear(x, up[0]), dtype)


@cases
@pytest.mark.parametrize("dim, biased, together", [(8, True, True), (6, False, False)])
def test_projections_with_positions_and_scores(rows, name, dtype, dim, biased, together):
    heads, groups, inputs = 2, 1, 70
    x, norm = new(rows, inputs, dtype=dtype), Norm(1 + new(inputs, dtype=dtype, seed=4), 1e-6)
    maps = tuple(
        (new(count * dim, inputs, dtype=dtype, seed=count + i),
         new(count * dim, dtype=dtype, seed=i) if biased else None)
        for i, count in enumerate((heads, groups, groups))
    )  # fmt: skip
    angle = new(rows if together else 1, dim // 2, dtype=torch.float32, seed=9).repeat(1, 2) * 9
    turn = angle.cos().to(dtype), angle.sin().to(dtype)
    scorer = Scorer(*(new(*s, dtype=torch.float32, seed=7) for s in ((groups, inputs), (groups,))))
    options = {"norm": norm, "scorer": scorer, "shape": SHAPES[name]}
    q, k, v, scores = linears.project(x, maps, dim, turn=turn, **options)
    inner = rms_norm(x, norm)
    plain = [F.linear(inner, *one).unflatten(1, (-1, dim)) for one in maps]
    near(q, turned(plain[0], *turn), dtype)
    near(k, turned(plain[1], *turn), dtype)
    near(v, plain[2], dtype)
    expected = F.linear(inner.float(), scorer.weight, scorer.bias)
    near(scores, expected, torch.float32 if dtype == torch.float32 else torch.bfloat16)
    unturned = linears.project(x, maps, dim, norm=norm, shape=SHAPES[name])
    for found, expected in zip(unturned[:3], plain, strict=True):
        near(found, expected, dtype)
    assert unturned[3] is None


@pytest.mark.parametrize("rows", [1, 3])
def test_scores_of_an_mlp(rows):
    inputs, heads, width = 33, 3, 5
    shapes = ((heads, inputs), (heads,), (width, inputs), (width,), (heads, width))
    scorer = Scorer(*(new(*s, dtype=torch.float32, seed=i) for i, s in enumerate(shapes)))
    x = 3 * new(rows, inputs, dtype=torch.float32)
    maps = ((new(heads * 2, inputs, dtype=torch.float32), None),) * 3
    scores = linears.project(x, maps, 2, scorer=scorer)[3]
    hidden = F.gelu(F.linear(x, scorer.hidden_weight, scorer.hidden_bias))
    expected = F.linear(x, scorer.weight, scorer.bias) + F.linear(hidden, scorer.out_weight)
    near(scores, expected, torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("rows, dim", [(1, 16), (5, 10)])
def test_norms_alone_and_over_heads(dtype, rows, dim):
    x, norm = new(rows, 70, dtype=dtype), Norm(1 + new(70, dtype=dtype, seed=4), 1e-6)
    near(linears.rms_norm(x, norm), rms_norm(x, norm), dtype)
    q, k = new(rows, 3, dim, dtype=dtype), new(rows, 2, dim, dtype=dtype, seed=1)
    weights = [1 + new(dim, dtype=dtype, seed=i) for i in (2, 3)]
    angle = new(rows, dim // 2, dtype=torch.float32, seed=9).repeat(1, 2) * 9
    turn = angle.cos().to(dtype), angle.sin().to(dtype)
    pairs = zip((q, k), weights, strict=True)
    expected = [turned(rms_norm(part, Norm(weight, 1e-6)), *turn) for part, weight in pairs]
    linears.norm_rotate(q, k, *weights, 1e-6, turn)
    near(q, expected[0], dtype)
    near(k, expected[1], dtype)


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("inputs, outputs", [(70, 11), (2500, 3)])
def test_the_usual_shapes(rows, inputs, outputs):
    """No shape named: whole rows of narrow inputs, several steps of wide ones."""
    layer = nn.Linear(inputs, outputs)
    x = new(rows, inputs, dtype=torch.float32)
    with torch.no_grad():
        near(linears.linear(x, layer.weight, layer.bias), layer(x), torch.float32)


@pytest.mark.parametrize("name, most", [("one row", 4), ("early", 16)])
def test_every_number_of_rows_up_to_what_a_shape_takes(name, most):
    weight = new(11, 40, dtype=torch.float32, seed=1)
    for rows in range(1, most + 1):
        x = new(rows, 40, dtype=torch.float32)
        near(linears.linear(x, weight, shape=SHAPES[name]), F.linear(x, weight), torch.float32)
    x = new(most + 1, 40, dtype=torch.float32)
    with pytest.raises(ValueError, match=f"{most + 1} rows, and this shape takes {most}"):
        linears.linear(x, weight, shape=SHAPES[name])


@pytest.mark.parametrize("rows, name", [(4, "in turn"), (4, "early")])
def test_rows_that_are_no_whole_lines(rows, name):
    """Rows of a larger tensor, and more outputs than programs of whole tiles give."""
    x = new(rows, 90, dtype=torch.float32)[:, :70]
    weight = new(37, 70, dtype=torch.float32, seed=1)
    norm = Norm(1 + new(70, dtype=torch.float32, seed=4), 1e-5)
    found = linears.linear(x, weight, norm=norm, shape=SHAPES[name])
    near(found, F.linear(rms_norm(x, norm), weight), torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("half", [4, 5, 32])
def test_rotary_positions_are_torchs(dtype, half):
    """Near and far: angles are rounded to float32 as torch rounds them."""
    frequencies = 1.0 / 10000.0 ** (torch.arange(half) / half)
    places = torch.tensor([0, 1, 2, 777, 65_536, 1_048_575, 16_000_000])
    angles = (places[:, None].float() * frequencies).repeat(1, 2)
    found = linears.rotary(places, frequencies, 0.75, dtype)
    for part, wanted in zip(found, (angles.cos() * 0.75, angles.sin() * 0.75), strict=True):
        atol = 2e-7 if dtype == torch.float32 else 4e-3
        torch.testing.assert_close(part, wanted.to(dtype), atol=atol, rtol=0)


@pytest.mark.parametrize("shared, stages", [(232448, 4), (101376, 3), (65536, 2), (1024, 1)])
def test_a_shape_has_the_stages_that_fit(monkeypatch, shared, stages):
    """Gate and up of a 1B model take 115,456 bytes, more than some devices have."""
    monkeypatch.setattr(launch, "_shared", lambda device: shared)
    made = []
    taken = {"__getitem__": lambda self, grid: lambda *_, **options: made.append(options)}
    monkeypatch.setattr(launch.kernel, "linears", type("Taken", (), taken)())
    x = torch.zeros(4, 2048, dtype=torch.bfloat16)
    weight = torch.zeros(8192, 2048, dtype=torch.bfloat16)
    linears.gated(x, (weight, None), (weight, None))
    assert made[0]["STAGES"] == made[0]["num_stages"] == stages
    early = Shape(8, 1024, 8, dot=True, early=True)
    assert early.within(2, 0) == early


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_scores_by_themselves(dtype):
    """Rows that lie apart, a size that no block divides; a row alone is what it is among others."""
    x = new(5, 130, dtype=dtype)[:, :100]
    weight, bias = new(3, 100, dtype=torch.float32, seed=1), new(3, dtype=torch.float32, seed=2)
    scores = linears.row_scores(x, weight, bias)
    assert scores.shape == (3, 5) and scores.dtype == torch.float32
    near(scores, F.linear(x.float(), weight, bias).T, torch.float32)
    assert torch.equal(linears.row_scores(x[3:4], weight, bias), scores[:, 3:4])


def test_weights_of_scores_are_cut_in_parts_that_add_up():
    """Whichever way they are rounded: a bf16 number has 8 bits of 24, and its own sign."""
    weight = new(3, 700, dtype=torch.float32) * torch.logspace(-9, 9, 700)
    parts = linears.bf16_parts(weight)
    assert parts.shape == (9, 700) and parts.dtype == torch.bfloat16
    assert torch.equal(parts.double().view(3, 3, 700).sum(0).float(), weight)
