"""Callers of the kernel: arguments checked by whoever recognises a model's modules."""

import functools
from typing import NamedTuple

import torch
import triton
from torch.nn import functional as F
from triton.runtime import driver

from sparsek_kernels.triton.launches.launch import launch
from sparsek_kernels.triton.launches.overlap import launch_options, may_overlap
from sparsek_kernels.triton.linears import kernel, norms, segments
from sparsek_kernels.triton.linears.scores import add_hidden
from sparsek_kernels.triton.linears.shapes import FASTER_IN_TORCH, Shape, rows_class, shape_of

MOST_ROWS = 16
_SCORE_COLUMNS = 1024
_MOST_COLUMNS = 4096  # of a norm, at a time


class Norm(NamedTuple):
    """A root-mean-square norm: weight [K], and what is added to the mean square."""

    weight: torch.Tensor
    eps: float


class Scorer(NamedTuple):
    """A linear scorer, and what an MLP adds to it: weight [G, K], bias [G], hidden_weight
    [width, K], hidden_bias [width] and out_weight [G, width], all float32."""

    weight: torch.Tensor
    bias: torch.Tensor
    hidden_weight: torch.Tensor | None = None
    hidden_bias: torch.Tensor | None = None
    out_weight: torch.Tensor | None = None

    @property
    def width(self) -> int:
        """Numbers inside of the MLP."""
        return 0 if self.hidden_weight is None else self.hidden_weight.shape[0]


Map = tuple[torch.Tensor, torch.Tensor | None]  # weight [N, K], bias [N] or None


def linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    norm: Norm | None = None,
    residual: torch.Tensor | None = None,
    shape: Shape | None = None,
) -> torch.Tensor:
    """norm(x) W^T + b + residual.

    Args:
        x: [M, K], rows contiguous, M at most `MOST_ROWS`. weight: [N, K]. residual: [M, N].
        shape: how the work is cut; None for the usual one.

    Returns:
        [M, N] in x's dtype.
    """
    key = (rows_class(x.shape[0]), x.shape[1], weight.shape[0])
    if shape is None and norm is None and key in FASTER_IN_TORCH:
        made = F.linear(x, weight, bias)
        return made if residual is None else made + residual
    out = _like(x, weight.shape[0])
    pairs = (weight.shape[0] + 1) // 2
    _launch(
        x, norm, [(weight, bias)], [out], [weight.shape[0]], [pairs], segments.PLAIN.value,
        residual=residual, shape=shape,
    )  # fmt: skip
    return out


def gated(
    x: torch.Tensor,
    gate: Map,
    up: Map,
    *,
    norm: Norm | None = None,
    shape: Shape | None = None,
) -> torch.Tensor:
    """silu(gate(norm(x))) * up(norm(x)): [M, N] of x [M, K] and two maps of N outputs."""
    n = gate[0].shape[0]
    out = _like(x, n)
    _launch(x, norm, [gate, up], [out], [n], [n], segments.GATED.value, shape=shape)
    return out


def project(
    x: torch.Tensor,
    maps: tuple[Map, Map, Map],
    head_dim: int,
    *,
    norm: Norm | None = None,
    turn: tuple[torch.Tensor, torch.Tensor] | None = None,
    scorer: Scorer | None = None,
    shape: Shape | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Queries, keys, values and scores of norm(x) in one launch; scores by an MLP need another.

    Args:
        x: [M, K]. maps: to queries, keys and values.
        turn: cosines and sines [M or 1, head_dim] of rotary positions; None leaves queries and
            keys as they are.

    Returns:
        [M, H, D], [M, G, D] and [M, G, D] in x's dtype, and scores [M, G] float32 or None.
    """
    rows = x.shape[0]
    sizes = [weight.shape[0] for weight, _ in maps]
    outs = [_like(x, size // head_dim, head_dim) for size in sizes]
    scores = hidden = None
    if scorer is not None:
        wide = {"dtype": torch.float32, "device": x.device}
        scores = torch.empty(rows, scorer.weight.shape[0], **wide)
        hidden = torch.empty(rows, scorer.width, **wide) if scorer.width else None
    _launch(
        x, norm, maps, outs, sizes, [(size + 1) // 2 for size in sizes],
        segments.PLAIN.value if turn is None else segments.ROTARY.value,
        turn=turn, half=head_dim // 2, scorer=scorer, scores=(scores, hidden), shape=shape,
    )  # fmt: skip
    if hidden is not None:
        overlap = (shape or shape_of(rows, x.shape[1], sum(sizes))).overlap
        _add_hidden(scores, hidden, scorer, overlap and may_overlap(x.device))
    return *outs, scores


def _like(x: torch.Tensor, *shape: int) -> torch.Tensor:
    return torch.empty(x.shape[0], *shape, dtype=x.dtype, device=x.device)


def _add_hidden(scores, hidden, scorer: Scorer, overlap: bool) -> None:
    heads = scores.shape[1]
    launch(
        add_hidden, (scores.shape[0],),
        scores, hidden, scorer.out_weight, heads, scorer.width,
        G=triton.next_power_of_2(heads), W=triton.next_power_of_2(scorer.width), WAITS=overlap,
        num_warps=4, **launch_options(overlap),
    )  # fmt: skip


@functools.cache
def _shared(device: torch.device) -> int:
    """Bytes of shared memory that Triton gives a program there."""
    if device.type != "cuda":
        return 1 << 30
    return driver.active.utils.get_device_properties(device.index)["max_shared_mem"]


def _ahead(shape: Shape, device: torch.device) -> int:
    """Columns that go to the L2 cache: elsewhere there is no such instruction."""
    return shape.ahead if device.type == "cuda" else 0


def _launch(
    x, norm, maps, outs, sizes, pairs, kind, *, residual=None, turn=None, half=1, scorer=None,
    scores=(None, None), shape=None,
) -> None:  # fmt: skip
    rows, columns = x.shape
    if shape is None:
        shape = shape_of(rows, columns, sum(weight.shape[0] for weight, _ in maps))
        shape = shape.within(x.element_size(), _shared(x.device))
    overlap = shape.overlap and may_overlap(x.device)
    if rows > shape.most_rows:
        raise ValueError(f"{rows} rows, and this shape takes {shape.most_rows}")
    padded = shape.padded(rows)
    spare = [(x, None)] * (3 - len(maps))  # never read
    weights, biases = zip(*maps, *spare, strict=True)
    outs = [*outs, *[x] * (3 - len(outs))]
    sizes, tiles = ([*given, *[0] * (3 - len(given))] for given in (sizes, pairs))
    tiles = [triton.cdiv(count, shape.pairs) for count in tiles]
    heads = 0 if scorer is None else scorer.weight.shape[0]
    cos, sin = (x, x) if turn is None else turn
    biased = biases[0] is not None
    width = 0 if scorer is None else scorer.width
    launch(
        kernel.linears, (sum(tiles) + heads + width,),
        x, x if norm is None else norm.weight, *weights,
        *(x if bias is None else bias for bias in biases), *outs,
        x if residual is None else residual, cos, sin,
        *((x, x, x) if scorer is None else (scorer.weight, scorer.bias, scores[0])),
        *((scorer.hidden_weight, scorer.hidden_bias, scores[1]) if width else (x, x, x)),
        x.stride(0), cos.stride(0) if cos.shape[0] > 1 else 0, *sizes, *tiles, heads, width,
        0.0 if norm is None else norm.eps,
        K=columns, M=rows, BM=padded, BN=shape.pairs, BK=shape.columns,
        BX=shape.norm_columns(rows, columns),
        BS=min(_SCORE_COLUMNS, triton.next_power_of_2(columns)), KIND=kind, HALF=half,
        SEGMENTS=3 if len(maps) == 3 else 1, NORM=norm is not None, BIASED=biased,
        RESIDUAL=residual is not None, BESIDE=shape.beside, DOT=shape.dot, EARLY=shape.early,
        STAGES=shape.stages, AHEAD=_ahead(shape, x.device), HELD=shape.held, WAITS=overlap,
        DEEP=width > 0, num_warps=shape.warps, num_stages=shape.stages, **launch_options(overlap),
    )  # fmt: skip


def rms_norm(x: torch.Tensor, norm: Norm, *, overlap: bool = False) -> torch.Tensor:
    """The norm of x [M, K], in x's dtype."""
    out = _like(x, x.shape[1])
    columns = x.shape[1]
    launch(
        norms.normalise, (x.shape[0],),
        x, norm.weight, out, x.stride(0), norm.eps, K=columns,
        BK=min(_MOST_COLUMNS, triton.next_power_of_2(columns)), WAITS=overlap,
        num_warps=4, **launch_options(overlap),
    )  # fmt: skip
    return out


def norm_rotate(
    q: torch.Tensor,
    k: torch.Tensor,
    q_norm: torch.Tensor,
    k_norm: torch.Tensor,
    eps: float,
    turn: tuple[torch.Tensor, torch.Tensor],
    *,
    overlap: bool = False,
) -> None:
    """Norms over each head's numbers, then rotary positions, in place.

    Args:
        q: [M, H, D]. k: [M, G, D]. q_norm, k_norm: [D]. turn: cosines and sines [M or 1, D].
    """
    rows, q_heads, dim = q.shape
    cos, sin = turn
    launch(
        norms.turn_heads, (rows, q_heads + k.shape[1]),
        q, k, q_norm, k_norm, cos, sin, q_heads, k.shape[1],
        cos.stride(0) if cos.shape[0] > 1 else 0, eps, D=dim,
        HALF=triton.next_power_of_2(dim // 2), WAITS=overlap, num_warps=1,
        **launch_options(overlap),
    )  # fmt: skip
