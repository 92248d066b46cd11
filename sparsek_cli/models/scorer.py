"""Scores of KV pairs: from the token's own hidden state, or from its position alone.

A scorer is a module with `slopes` [G] and `forward(hidden_states, position_ids)` -> scores and
slopes, and stand-ins where it has some; whatever stands at `attention.scorer` decides what is kept,
and what stands in for the rest, so a policy is a scorer put in its place. Slopes and stand-ins are
handed out by `forward`, and read nowhere else while a model runs: where weights are offloaded they
are only there while their module's own forward runs.
"""

from __future__ import annotations

from typing import Any

import torch
from sparsek_kernels import dispatch
from torch import nn
from torch.nn import functional as F

from sparsek_cli.models.autocast import without_autocast
from sparsek_cli.models.config import head_dim, kv_heads

DEFAULT_SLOPE = 1e-3
FAINT = -8.0  # bias of stand-ins that have learned nothing yet: hardly any share, some gradient
NO_LIMIT = 30.0  # of the log of how many pairs are missing: more than any text has
MANY_ROWS = 1024  # of bf16, which fill tensor cores


class SparseKScorer(nn.Module):
    """u = W x + b per KV head, from the attention block's input; never from a query.

    arXiv 2406.16747 section 3 (the scoring network), with one linear map; `slopes` is the age
    preference of the derived form u_j + lambda j. Everything stays float32 whatever the model's
    dtype is: scores, slopes and tau lose their order in bf16.

    Args:
        hidden_size: width of the block's input.
        heads: number of KV heads G.
        stand_ins: shape of the pairs that stand in for evicted ones; None: there are none.

    Attributes:
        weight: [G, hidden_size] float32. bias: [G] float32. slopes: [G] float32, per token.
        stand_ins: [H, M, 2 D + 2] float32, as in `sparsek_attention`, or None.
        shapes_input: whether a gradient goes on into the hidden states, and so into the layers
            below; training sets it from random weights only.
    """

    shapes_input = True

    def __init__(self, hidden_size: int, heads: int, stand_ins: tuple[int, int, int] | None = None):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(heads, hidden_size, dtype=torch.float32))
        self.bias = nn.Parameter(torch.empty(heads, dtype=torch.float32))
        self.slopes = nn.Parameter(torch.empty(heads, dtype=torch.float32))
        pairs = None if stand_ins is None else torch.empty(stand_ins, dtype=torch.float32)
        self.register_parameter("stand_ins", None if pairs is None else nn.Parameter(pairs))

    def forward(
        self, hidden_states: torch.Tensor, position_ids: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, ...]:
        """Scores [B, G, N] float32 of hidden states [B, N, hidden_size], slopes [G], and stand-ins.

        The last are left out where there are none. Positions are unused.
        """
        if not self.shapes_input:
            hidden_states = hidden_states.detach()
        # Autocast would turn the product into bf16, whose steps are larger than score gaps.
        with without_autocast(hidden_states.device.type):
            found = self._scores(hidden_states).transpose(1, 2), self.slopes
        return found if self.stand_ins is None else (*found, self.stand_ins)

    def _scores(self, x: torch.Tensor) -> torch.Tensor:
        """[B, N, G] of x [B, N, hidden_size]."""
        weight, bias = self.weight.float(), self.bias.float()
        if _few_on_cuda(x):
            from sparsek_kernels.triton.linears import row_scores

            scores = row_scores(x.reshape(-1, x.shape[-1]), weight.contiguous(), bias)
            return scores.view(-1, *x.shape[:-1]).permute(1, 2, 0)
        return _product(x, weight) + bias

    def _apply(self, fn, recurse: bool = True):
        # `model.to(torch.bfloat16)` moves devices here, but leaves float32 as it is.
        def keep_dtype(tensor: torch.Tensor) -> torch.Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        return super()._apply(keep_dtype, recurse)

    def extra_repr(self) -> str:
        return f"hidden_size={self.weight.shape[1]}, heads={self.weight.shape[0]}"


class SparseKMlpScorer(SparseKScorer):
    """u = W x + b + W_2 gelu(W_1 x + b_1): a linear scorer and what a small MLP adds to it.

    With W_2 = 0, as after initialisation, it is the linear scorer.

    Attributes:
        hidden_weight: W_1 [width, hidden_size] float32. hidden_bias: b_1 [width] float32.
        out_weight: W_2 [G, width] float32.
    """

    def __init__(
        self,
        hidden_size: int,
        heads: int,
        width: int,
        stand_ins: tuple[int, int, int] | None = None,
    ):
        super().__init__(hidden_size, heads, stand_ins)
        self.hidden_weight = nn.Parameter(torch.empty(width, hidden_size, dtype=torch.float32))
        self.hidden_bias = nn.Parameter(torch.empty(width, dtype=torch.float32))
        self.out_weight = nn.Parameter(torch.empty(heads, width, dtype=torch.float32))

    def _scores(self, x: torch.Tensor) -> torch.Tensor:
        hidden = _product(x, self.hidden_weight.float()) + self.hidden_bias.float()
        return super()._scores(x) + _product(F.gelu(hidden), self.out_weight.float())

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, width={self.hidden_weight.shape[0]}"


def _product(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """x W^T in float32 accuracy, whatever x is."""
    if _splits(x):
        # Without a node of autograd, which takes the CPU longer than all of the product.
        learns = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
        return SplitProduct.apply(x, weight) if learns else _split_product(x, weight)
    if x.device.type == "cpu" and not torch.is_grad_enabled():
        # Rounded once: one row alone then scores what it scores among others, so that a token ties
        # with its like whether it is read in a prompt or written.
        return F.linear(x.double(), weight.double()).float()
    return F.linear(x.float(), weight)


def _few_on_cuda(hidden_states: torch.Tensor) -> bool:
    """Whether one launch makes the scores: few rows on CUDA, as of a decoding step, no gradient."""
    if not hidden_states.is_cuda or torch.is_grad_enabled() or torch.compiler.is_compiling():
        return False
    return 0 < hidden_states.shape[:-1].numel() < MANY_ROWS and (
        dispatch.explain(hidden_states.device, hidden_states.dtype)[0] == "triton"
    )


def _splits(hidden_states: torch.Tensor) -> bool:
    """Whether tensor cores can make the float32 product: bf16 on CUDA, and rows to fill them."""
    rows = hidden_states.shape[:-1].numel()
    return hidden_states.is_cuda and hidden_states.dtype == torch.bfloat16 and rows >= MANY_ROWS


def _bf16_parts(x: torch.Tensor, count: int) -> list[torch.Tensor]:
    """bf16 tensors whose sum is the float32 `x` to 8 * count bits."""
    parts = [x.to(torch.bfloat16)]
    while len(parts) < count:
        x = x - parts[-1].float()
        parts.append(x.to(torch.bfloat16))
    return parts


def _stacked_parts(weight: torch.Tensor) -> torch.Tensor:
    """bf16 [3 G, C], whose three blocks of rows add up to float32 weight [G, C].

    Made anew by every call, in one launch where that can be: weights may change in place unseen.
    """
    on_triton = dispatch.explain(weight.device, torch.bfloat16)[0] == "triton"
    if on_triton and not torch.compiler.is_compiling():
        from sparsek_kernels.triton.linears import bf16_parts

        return bf16_parts(weight)
    return torch.cat(_bf16_parts(weight, 3))


def _split_product(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """See `SplitProduct`."""
    sums = torch.mm(x.flatten(0, -2), _stacked_parts(weight).T, out_dtype=torch.float32)
    return sums.view(*x.shape[:-1], 3, weight.shape[0]).sum(-2)


class SplitProduct(torch.autograd.Function):
    """x W^T in float32 for bf16 x [..., C] and float32 W [G, C], without a float32 copy of x.

    A float32 number is the sum of three bf16 numbers, products of bf16 numbers are exact in
    float32, and that is where the tensor cores add: the result is a float32 product's. Gradients
    keep 16 bits of each factor, more than the bf16 that x's gradient is rounded to.
    """

    @staticmethod
    def forward(ctx, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        return _split_product(x, weight)

    @staticmethod
    def backward(ctx, grad: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        x, weight = ctx.saved_tensors
        high, low = _bf16_parts(grad.flatten(0, -2), 2)
        d_x = d_weight = None
        if ctx.needs_input_grad[0]:
            weight_high, weight_low = _bf16_parts(weight, 2)
            rows = torch.cat((high, low, high), 1)
            d_x = (rows @ torch.cat((weight_high, weight_high, weight_low))).view_as(x)
        if ctx.needs_input_grad[1]:
            sums = torch.mm(torch.cat((high, low), 1).T, x.flatten(0, -2), out_dtype=torch.float32)
            d_weight = sums[: weight.shape[0]] + sums[weight.shape[0] :]
        return d_x, d_weight


class RandomScorer(nn.Module):
    """A policy that keeps random pairs: a hash of (position, head, layer, seed) in [0, 1).

    A pure function of the absolute position, so that decoding token by token, prefilling in
    chunks and one forward pass agree, and so that eviction is final as with learned scores.

    Attributes:
        reads_positions: scores are made of positions, also where a family hands attention none.
    """

    reads_positions = True

    def __init__(self, heads: int, *, layer: int, seed: int):
        super().__init__()
        self.heads, self.layer, self.seed = heads, layer, seed
        self.register_buffer("slopes", torch.zeros(heads), persistent=False)

    def forward(
        self, hidden_states: torch.Tensor, position_ids: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Scores [B, G, N] float32 for positions [B or 1, N], and slopes [G], which are 0."""
        if position_ids is None:
            raise ValueError("random scores need the tokens' position_ids")
        batch, tokens = hidden_states.shape[:2]
        positions = position_ids.expand(batch, tokens).to(torch.int64)[:, None, :]
        heads = torch.arange(self.heads, device=positions.device)[None, :, None]
        # Multiplicative mixing in wrapping int64; the constants are odd and unrelated.
        mixed = positions * 6364136223846793005 + heads * 1442695040888963407
        offset = self.layer * 3935559000370003845 + self.seed * 2691343689449507681
        # Python's integers do not wrap by themselves.
        mixed = mixed + ((offset + (1 << 63)) % (1 << 64) - (1 << 63))
        for shift in (29, 32, 31):
            mixed = (mixed ^ ((mixed >> shift) & ((1 << (64 - shift)) - 1))) * 5536775847593249645
        top = (mixed >> 40) & 0xFFFFFF  # 24 bits: exact in float32
        return top.to(torch.float32) / float(1 << 24), self.slopes


def new_scorer(config: Any, layer: int) -> nn.Module:
    """The scorer that a config's `sparsek` block asks for; weights are not initialised."""
    heads, asked = kv_heads(config), config.sparsek["scorer"]
    if asked["type"] == "random":
        return RandomScorer(heads, layer=layer, seed=0)
    pairs = None
    if asked.get("stand_ins"):
        pairs = (config.num_attention_heads, asked["stand_ins"], 2 * head_dim(config) + 2)
    if asked["type"] == "mlp":
        return SparseKMlpScorer(config.hidden_size, heads, asked["width"], pairs)
    return SparseKScorer(config.hidden_size, heads, pairs)
