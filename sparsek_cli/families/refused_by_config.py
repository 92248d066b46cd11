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


_SHARED = (
    "its last layers have no keys and values of their own (num_kv_shared_layers): they attend to "
    "those of the last layer before them that has some, whole, so that a layer's slots would have "
    "to serve the queries of many layers, which its scores know nothing of"
)
_GEMMA4 = Reasons(((_SHARED, _shares(0)),))

REASONS: dict[str, Reasons] = {
    "gemma3n_text": Reasons(
        ((_SHARED, _shares(15)),),
        "its layers pass on several states of each token side by side, which calibration reads as "
        "one",
    ),
    "gemma4_text": _GEMMA4,
    "gemma4_unified_text": _GEMMA4,
}
