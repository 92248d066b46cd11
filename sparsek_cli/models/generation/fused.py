"""A decoding step by fewer launches: modules whose weights our own kernels read, one row or a few.

A Llama-like layer becomes one launch for its norm, projections, positions and scores, insertion and
attention, and one each for the output projection, gate and up, and down; what stands alone (a head,
a norm, a map of another kind of layer) is taken by itself. Nothing is believed by name: a module is
taken if it has the parts, and then computes what the kernels compute on random rows, to rounding.
The rest runs as it is.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from sparsek_cli.models.attention.sparsek import SparseKAttentionMixin
from sparsek_cli.models.cache.slots import SparseKCache
from sparsek_cli.models.config import ATTENTION
from sparsek_cli.models.scorer import SparseKMlpScorer, SparseKScorer

_LOG = logging.getLogger("sparsek_cli")
# Relative error of what the kernels give; a module that computes something else is far beyond it.
_TOLERANCE = {torch.float32: 1e-4, torch.float16: 4e-3, torch.bfloat16: 2e-2}
# Rows are small, so that what a layer adds to them is not hidden by them.
_SPREAD = 0.05
_STEPS = 3  # that a layer is compared over: the first attends to itself alone
_HARMLESS = {"position_ids", "use_cache", "cache_position", "logits_to_keep", "return_dict"}

Forward = Callable[..., Any]


class FusedModules:
    """What replaces modules of a model during a decoding step of `rows` rows.

    Args:
        model: a causal LM with SparseK attention, in eval mode, where Triton runs.

    Attributes:
        taken: how many modules of each class are replaced.
        left: classes of those that could not be, with how many.
    """

    def __init__(self, model: nn.Module, rows: int):
        from sparsek_kernels.triton import linears

        self.taken: Counter[str] = Counter()
        self.left: Counter[str] = Counter()
        self._forwards: list[tuple[nn.Module, Forward]] = []
        if rows > linears.MOST_ROWS:
            self.left[f"all, for {rows} rows are more than {linears.MOST_ROWS}"] = 1
        elif model.dtype not in _TOLERANCE:
            self.left[f"all, for weights are {model.dtype}"] = 1
        else:
            with torch.no_grad():
                self._look(model, model, rows)
        counts = (
            ", ".join(f"{count} {name}" for name, count in sorted(some.items())) or "none"
            for some in (self.taken, self.left)
        )
        _LOG.info("fused for steps of %d rows: %s; as they are: %s", rows, *counts)

    def _look(self, model: nn.Module, module: nn.Module, rows: int) -> None:
        """Replaces a module, or what can be replaced below it."""
        for make, equal in ((_layer, _same_layer), (_mlp, _same), (_map, _same), (_norm, _same)):
            forward = make(module, rows)
            if forward is None:
                continue
            if _runs(equal, model, module, forward, rows):
                self._forwards.append((module, forward))
                self.taken[type(module).__name__] += 1
                return
            self.left[type(module).__name__] += 1
        for child in module.children():
            self._look(model, child, rows)

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Within the block the model's forward takes the replacements."""
        for module, forward in self._forwards:
            module.__dict__["forward"] = forward
        try:
            yield
        finally:
            for module, _ in self._forwards:
                module.__dict__.pop("forward", None)


def _runs(equal: Callable[..., bool], *given: Any) -> bool:
    """What a comparison says; False where the kernels do not compile or fit on this device."""
    try:
        return equal(*given)
    except Exception as error:  # Triton's, ptxas's or the driver's own: the module stays as it is
        _LOG.info("not fused: %s: %s", type(error).__name__, (str(error).splitlines() or [""])[0])
        return False


def _own(module: nn.Module) -> Forward:
    return type(module).forward.__get__(module)


def _plain(module: Any, *, below: bool = False) -> bool:
    """A module that is all there: no hooks, no wrapper around its forward."""
    return (
        isinstance(module, nn.Module)
        and not (module._forward_hooks or module._forward_pre_hooks)
        and "forward" not in vars(module)
        and (below or not list(module.children()))
    )


def _is_map(module: Any) -> bool:
    # torchao's layers are plain, and their weights are not.
    plain = type(module) is nn.Linear and type(module.weight) is nn.Parameter
    return plain and _plain(module) and module.weight.is_contiguous()


def _rows_of(x: torch.Tensor, weight: torch.Tensor, rows: int) -> torch.Tensor | None:
    """[rows, K] of one token of each row, or None for other inputs."""
    fits = x.ndim == 3 and x.shape[0] == rows and x.shape[1] == 1 and x.dtype == weight.dtype
    return x.reshape(rows, -1) if fits and not torch.is_grad_enabled() else None


def _norm_of(module: Any):
    """A root-mean-square norm's weight and epsilon, or None where there are not just these."""
    from sparsek_kernels.triton.linears import Norm

    if not _plain(module):
        return None
    weights, eps = list(module.parameters()), getattr(module, "variance_epsilon", None)
    eps = getattr(module, "eps", None) if eps is None else eps
    if len(weights) != 1 or weights[0].ndim != 1 or not isinstance(eps, float):
        return None
    return Norm(weights[0], eps)


def _norm(module: nn.Module, rows: int) -> Forward | None:
    from sparsek_kernels.triton import linears

    norm, own = _norm_of(module), _own(module)
    if norm is None:
        return None

    def forward(x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        part = None if args or kwargs else _rows_of(x, norm.weight, rows)
        if part is None or part.shape[1] != norm.weight.shape[0]:
            return own(x, *args, **kwargs)
        return linears.rms_norm(part, norm).view_as(x)

    return forward


def _map(module: nn.Module, rows: int) -> Forward | None:
    from sparsek_kernels.triton import linears

    if not _is_map(module):
        return None
    own = _own(module)

    def forward(x: torch.Tensor) -> torch.Tensor:
        part = _rows_of(x, module.weight, rows)
        if part is None:
            return own(x)
        return linears.linear(part, module.weight, module.bias)[:, None]

    return forward


def _gated_parts(module: Any) -> tuple[nn.Linear, nn.Linear, nn.Linear] | None:
    parts = [getattr(module, name, None) for name in ("gate_proj", "up_proj", "down_proj")]
    if not all(map(_is_map, parts)) or not _plain(module, below=True):
        return None
    if not _is_silu(getattr(module, "act_fn", None)):
        return None
    return tuple(parts) if (parts[0].bias is None) == (parts[1].bias is None) else None


def _is_silu(activation: Any) -> bool:
    """By its values: near 0, where rows that are compared may lie, all such functions agree."""
    at = torch.linspace(-4, 4, 33)
    return callable(activation) and torch.allclose(activation(at), F.silu(at), atol=1e-6)


def _mlp(module: nn.Module, rows: int) -> Forward | None:
    from sparsek_kernels.triton import linears

    parts, own = _gated_parts(module), _own(module)
    if parts is None:
        return None
    gate, up, down = parts

    def forward(x: torch.Tensor) -> torch.Tensor:
        part = _rows_of(x, gate.weight, rows)
        if part is None:
            return own(x)
        inner = linears.gated(part, (gate.weight, gate.bias), (up.weight, up.bias))
        return linears.linear(inner, down.weight, down.bias)[:, None]

    return forward


def _layer(module: nn.Module, rows: int) -> Forward | None:
    """The whole of a decoder layer: norm, attention, residual, norm, gated MLP, residual."""
    if not isinstance(getattr(module, "self_attn", None), SparseKAttentionMixin):
        return None
    layer = _Layer.of(module)
    if layer is None:
        return None
    own = _own(module)

    def forward(hidden_states: torch.Tensor, *args: Any, **kwargs: Any):
        cache, turn = kwargs.get("past_key_values"), kwargs.get("position_embeddings")
        others = (
            value
            for name, value in kwargs.items()
            if name not in _HARMLESS and name not in ("past_key_values", "position_embeddings")
        )
        x = _rows_of(hidden_states, layer.first.weight, rows)
        if (
            args
            or x is None
            or not isinstance(cache, SparseKCache)
            or not isinstance(turn, tuple)
            or any(part.shape[-1] != layer.head_dim or part.shape[1] != 1 for part in turn)
            or any(value is not None and value is not False for value in others)
        ):
            return own(hidden_states, *args, **kwargs)
        return layer(x, cache, tuple(part[:, 0] for part in turn))[:, None]

    return forward


class _Layer:
    """The launches of one decoder layer."""

    def __init__(self, attention: Any, first: Any, second: Any, mlp: tuple, scorer: Any):
        self.attention, self.first, self.second, self.mlp = attention, first, second, mlp
        self.scorer = scorer
        self.head_dim = attention.head_dim
        projections = (attention.q_proj, attention.k_proj, attention.v_proj)
        self.maps = tuple((part.weight, part.bias) for part in projections)
        norms = [_norm_of(getattr(attention, name, None)) for name in ("q_norm", "k_norm")]
        self.head_norms = None if None in norms else norms

    @classmethod
    def of(cls, module: Any) -> _Layer | None:
        """None where a part is missing or of another kind."""
        attention = module.self_attn
        names = ("q_proj", "k_proj", "v_proj", "o_proj")
        maps = [getattr(attention, name, None) for name in names]
        first = _norm_of(getattr(module, "input_layernorm", None))
        second = _norm_of(getattr(module, "post_attention_layernorm", None))
        mlp, scorer = _gated_parts(getattr(module, "mlp", None)), _scorer_of(attention.scorer)
        if None in (first, second, mlp, scorer) or not all(map(_is_map, maps)):
            return None
        if not (_plain(module, below=True) and _plain(attention, below=True)):
            return None
        if len({part.bias is None for part in maps[:3]}) > 1:
            return None
        if getattr(attention, "attn_logit_softcapping", None) or hasattr(attention, "sinks"):
            return None  # too small a difference to show in what is compared
        dim = getattr(attention, "head_dim", None)
        if not isinstance(dim, int) or dim % 2 or any(part.out_features % dim for part in maps[:3]):
            return None
        return cls(attention, first, second, mlp, scorer)

    def __call__(self, x: torch.Tensor, cache: SparseKCache, turn: tuple) -> torch.Tensor:
        """[rows, K] after the layer, of [rows, K] before it; the token enters the cache."""
        from sparsek_kernels.triton import linears

        attention, (gate, up, down) = self.attention, self.mlp
        q, k, v, scores = linears.project(
            x, self.maps, self.head_dim, norm=self.first, scorer=self.scorer,
            turn=None if self.head_norms else turn,
        )  # fmt: skip
        if self.head_norms:
            of_q, of_k = self.head_norms
            linears.norm_rotate(q, k, of_q.weight, of_k.weight, of_q.eps, turn)
        q, k, v = (part[:, :, None] for part in (q, k, v))
        k, v = cache.update(k, v, attention.layer_idx)
        out, _ = ALL_ATTENTION_FUNCTIONS[ATTENTION](
            attention, q, k, v, None, scaling=attention.scaling,
            sparsek_scores=scores[:, :, None], sparsek_slopes=attention.scorer.slopes,
            sparsek_cache=cache.layers[attention.layer_idx],
        )  # fmt: skip
        last = attention.o_proj
        x = linears.linear(out.flatten(1), last.weight, last.bias, residual=x)
        inner = linears.gated(x, (gate.weight, gate.bias), (up.weight, up.bias), norm=self.second)
        return linears.linear(inner, down.weight, down.bias, residual=x)


def _scorer_of(scorer: Any):
    from sparsek_kernels.triton.linears import Scorer

    if not _plain(scorer):
        return None
    if type(scorer) is SparseKScorer:
        return Scorer(scorer.weight, scorer.bias)
    if type(scorer) is SparseKMlpScorer:
        hidden = scorer.hidden_weight, scorer.hidden_bias, scorer.out_weight
        return Scorer(scorer.weight, scorer.bias, *hidden)
    return None


def _near(found: Any, expected: Any) -> bool:
    if not torch.is_tensor(expected) or found.shape != expected.shape:
        return False
    if found.dtype != expected.dtype:
        return False
    found, wanted = found.float(), expected.float()
    error = float((found - wanted).norm() / wanted.norm())
    return error < _TOLERANCE[expected.dtype]


def _draws(model: nn.Module, width: int, rows: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    made = _SPREAD * torch.randn(rows, 1, width, generator=generator)
    return made.to(model.device, model.dtype)


def _same(model: nn.Module, module: nn.Module, forward: Forward, rows: int) -> bool:
    """Whether a module without a state computes on random rows what its replacement does."""
    weights = list(module.parameters())
    if any(weight.dtype != model.dtype for weight in weights):
        return False
    x = _draws(model, weights[0].shape[-1], rows, 0)
    return _near(forward(x), _own(module)(x))


def _same_layer(model: nn.Module, module: Any, forward: Forward, rows: int) -> bool:
    """The same for a layer, over several tokens, with what both leave in the cache."""
    rotary = getattr(model.base_model, "rotary_emb", None)
    scorers = {id(weight) for weight in module.self_attn.scorer.parameters()}
    others = (weight for weight in module.parameters() if id(weight) not in scorers)
    if rotary is None or any(weight.dtype != model.dtype for weight in others):
        return False
    width, index = module.input_layernorm.weight.shape[0], module.self_attn.layer_idx
    caches = [SparseKCache(model.config) for _ in range(2)]
    places = torch.arange(rows, device=model.device)[:, None] * 5  # rows stand at several
    for step in range(_STEPS):
        x = _draws(model, width, rows, step)
        positions = places + step
        turn = rotary(x, position_ids=positions)
        if not isinstance(turn, tuple):
            return False
        given = {"position_ids": positions, "use_cache": True, "position_embeddings": turn}
        outs = [
            call(x, attention_mask=None, past_key_values=cache, **given)
            for call, cache in zip((forward, _own(module)), caches, strict=True)
        ]
        if not _near(*outs):
            return False
    found, wanted = (cache.layers[index].state.scores for cache in caches)
    held = wanted.isfinite()
    return torch.equal(held, found.isfinite()) and bool(
        ((found - wanted).abs() <= _TOLERANCE[model.dtype] * (1 + wanted.abs()))[held].all()
    )
