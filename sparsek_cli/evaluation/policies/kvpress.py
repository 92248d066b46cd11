"""NVIDIA's kvpress as rivals (`--baselines kvpress:NAME`), when that package is installed.

A press scores the pairs of a prompt; here its scores choose what stays in the cache of
snapkv_h2o.py, so that it holds as many pairs as everybody else and keeps the same window. Presses
that do more than score, read weights of their own from the hub, wrap other presses or need whole
attention matrices are refused.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import MISSING, dataclass, fields
from difflib import get_close_matches
from functools import lru_cache
from typing import Any, ClassVar

import torch

from sparsek_cli.errors import SparsekError, UsageError
from sparsek_cli.evaluation.policies.evicting_layer import EvictingLayer
from sparsek_cli.evaluation.policies.snapkv_h2o import DROPPED, Evicting, evict

NEEDS_WEIGHTS = ("ObservedAttentionPress",)  # [N, N] attention matrices, which nobody forms here


@lru_cache(maxsize=8)
def find(name: str) -> Any:
    """The press called `name` ("expected_attention"), made with its own defaults.

    Raises:
        UsageError: kvpress is not installed, or has no such press that only scores.
    """
    try:
        import kvpress
    except ImportError as error:
        raise UsageError(
            f"baseline 'kvpress:{name}' needs the package kvpress: {error}",
            hint="pip install kvpress (with --no-deps if it asks for an older transformers)",
        ) from error
    known = {
        _plain(key.removesuffix("Press")): kind
        for key, kind in vars(kvpress).items()
        if isinstance(kind, type) and _only_scores(kind, kvpress) and key not in NEEDS_WEIGHTS
    }
    wanted = _plain(name)
    if wanted not in known:
        near = get_close_matches(wanted, known, n=1)
        hint = f"did you mean 'kvpress:{near[0]}'?" if near else f"known: {', '.join(known)}"
        raise UsageError(f"kvpress has no press 'kvpress:{name}' that only scores pairs", hint=hint)
    return known[wanted]()


def _only_scores(kind: type, kvpress: Any) -> bool:
    """Whether a press is its `score` alone, ready without arguments, a model or a download."""
    base = kvpress.ScorerPress
    if not issubclass(kind, base) or kind is base:
        return False
    inherited = ("compress", "forward_hook", "post_init_from_model", "__call__")
    needed = [f for f in fields(kind) if f.default is MISSING and f.default_factory is MISSING]
    return not needed and all(getattr(kind, n) is getattr(base, n) for n in inherited)


def _plain(name: str) -> str:
    return name.replace("_", "").lower()


class PressLayer(EvictingLayer):
    """Keeps what a press scores highest; remembers the prompt's inputs until then.

    Attributes:
        hidden: inputs of the attention block, [B, N, hidden]; cos, sin: rotary factors [B, N, D].
    """

    fresh = DROPPED

    def __init__(self, slots: int, recent: int, sinks: int = 0):
        super().__init__(slots, recent, sinks)
        self.hidden: torch.Tensor | None = None
        self.cos: torch.Tensor | None = None
        self.sin: torch.Tensor | None = None

    def hear(self, hidden: torch.Tensor, rotary: tuple[torch.Tensor, torch.Tensor]) -> None:
        """Notes the next inputs of the prompt."""
        if self.bounded:
            return
        for name, new in zip(("hidden", "cos", "sin"), (hidden, *rotary), strict=True):
            old = getattr(self, name)
            new = new.expand(hidden.shape[0], *new.shape[1:])
            setattr(self, name, new if old is None else torch.cat([old, new], dim=1))

    def score(self, press: Any, attention: Any, cache: Any) -> None:
        """Orders the pairs by the press's scores; the window's come last, as they leave it.

        A prompt that fits is not scored (some presses refuse short ones): its oldest pairs go
        first.

        Raises:
            SparsekError: the press cannot score this model or a prompt this short.
        """
        held = self.keys.shape[2]
        if held <= self.slots:
            self.mass = torch.arange(held, device=self.keys.device).expand_as(self.mass).float()
        else:
            scores = self._scores(press, attention, cache)
            self.mass = scores.argsort(dim=-1).argsort(dim=-1).float()
            self.mass[:, :, -self.recent :] = DROPPED
        self.hidden = self.cos = self.sin = None

    def _scores(self, press: Any, attention: Any, cache: Any) -> torch.Tensor:
        context = {"position_embeddings": (self.cos, self.sin), "past_key_values": cache}
        try:
            return press.score(attention, self.hidden, self.keys, self.values, None, context)
        except (AssertionError, NotImplementedError) as error:
            raise SparsekError(
                f"{type(press).__name__} of kvpress: {error}", hint="leave that baseline out"
            ) from error

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Row i becomes what row `beam_idx[i]` was."""
        super().reorder_cache(beam_idx)
        for name in ("hidden", "cos", "sin"):
            old = getattr(self, name)
            if old is not None:
                setattr(self, name, old.index_select(0, beam_idx.to(old.device)))


@contextmanager
def heard_inputs(model: Any) -> Iterator[None]:
    """Within the block press layers note what goes into every attention block of `model`.

    Raises:
        SparsekError: the family has no rotary positions, which presses rely on.
    """
    from sparsek_cli.models import sparsek_attentions

    rotary = getattr(model.base_model, "rotary_emb", None)
    if rotary is None:
        raise SparsekError(
            f"kvpress does not know {model.config.model_type}", hint="leave that baseline out"
        )

    def note(attention: Any, args: tuple, kwargs: dict[str, Any]) -> None:
        cache = kwargs.get("past_key_values")
        layer = None if cache is None else cache.layers[attention.layer_idx]
        if isinstance(layer, PressLayer):
            hidden = args[0] if args else kwargs["hidden_states"]
            layer.hear(hidden, kwargs["position_embeddings"])

    attentions = sparsek_attentions(model)
    hooks = [a.register_forward_pre_hook(note, with_kwargs=True) for a in attentions]
    for attention in attentions:  # as kvpress does; past nn.Module, so that nothing is registered
        object.__setattr__(attention, "rotary_emb", rotary)
    try:
        yield
    finally:
        for attention in attentions:
            object.__delattr__(attention, "rotary_emb")
        for hook in hooks:
            hook.remove()


@dataclass(frozen=True)
class Press(Evicting):
    """A press of kvpress chooses what stays of a prompt.

    Attributes:
        press: its name there, "expected_attention" for instance.
    """

    press: str = ""
    layer: ClassVar[type[EvictingLayer]] = PressLayer

    @property
    def name(self) -> str:
        """As users write it."""
        return f"kvpress:{self.press}"

    @contextmanager
    def rule(self, model: Any) -> Iterator[None]:
        """Layers hear what goes into their blocks."""
        with super().rule(model), heard_inputs(model):
            yield

    @torch.no_grad()
    def end_prompt(self, model: Any, cache: Any) -> None:
        """Lets the press choose what every layer keeps of the prompt."""
        from sparsek_cli.models import sparsek_attentions

        press = find(self.press)
        for attention in sparsek_attentions(model):
            layer = cache.layers[attention.layer_idx]
            layer.score(press, attention, cache)
        evict(cache.layers, shared=self.shared)
