"""Families that cannot be converted for reasons of which a config.json says which hold."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

Config = Mapping[str, Any]


@dataclass(frozen=True)
class Reasons:
    """Of one family.

    Attributes:
        some: sentences that hold for some configs, each with what says so.
        always: the sentence that holds whatever the config says; "": others convert.
    """

    some: tuple[tuple[str, Callable[[Config], bool]], ...]
    always: str = ""

    def general(self) -> str:
        """What can be said without a config."""
        if not self.always:
            return "; ".join(f"by its config: {why}" for why, _ in self.some)
        return "; ".join([self.always, *(f"by its config also: {why}" for why, _ in self.some)])

    def of(self, config: Config) -> str | None:
        """What holds for a config.json dictionary; None: nothing stands against it."""
        found = [why for why, holds in self.some if holds(config)]
        return "; ".join([*found, *([self.always] if self.always else [])]) or None


def _shares(default: int) -> Callable[[Config], bool]:
    """Whether some layers have no keys and values of their own; default: of the config class."""
    return lambda config: config.get("num_kv_shared_layers", default) != 0


def _own_heads(config: Config) -> bool:
    """Whether layers that attend to everything have other KV heads than the rest, as Gemma 4's."""
    number, width = config.get("num_key_value_heads", 4), config.get("head_dim", 256)
    layers = config.get("per_layer_config")
    if isinstance(layers, Mapping):
        own = [layer for layer in layers.values() if isinstance(layer, Mapping)]
    else:
        own = [{"head_dim": config.get("global_head_dim", 512)}]
        given = config.get("num_global_key_value_heads")
        if given is not None and config.get("attention_k_eq_v"):
            own[0]["num_key_value_heads"] = given
    return any(
        layer.get("head_dim", width) != width or layer.get("num_key_value_heads", number) != number
        for layer in own
    )


_SHARED = (
    "its last layers have no keys and values of their own (num_kv_shared_layers): they attend to "
    "those of the last layer before them that has some, whole, so that a layer's slots would have "
    "to serve the queries of many layers, which its scores know nothing of"
)
_GEMMA4 = Reasons(
    (
        (
            "its layers that attend to everything have KV heads in a number or width of their own "
            "(num_global_key_value_heads, global_head_dim), where conversion reads one for the "
            "whole model",
            _own_heads,
        ),
        (
            "its layers that attend to everything have no values but their keys "
            "(attention_k_eq_v), where conversion looks for a projection of each",
            lambda config: bool(config.get("attention_k_eq_v")),
        ),
        (_SHARED, _shares(0)),
    ),
)

REASONS: dict[str, Reasons] = {
    "gemma3n_text": Reasons(
        ((_SHARED, _shares(15)),),
        "its layers pass on several states of each token side by side, which calibration reads as "
        "one",
    ),
    "gemma4_text": _GEMMA4,
    "gemma4_unified_text": _GEMMA4,
}
