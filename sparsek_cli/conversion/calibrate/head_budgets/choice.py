"""The outcome for one layer: the map, slope and budget of each KV head."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Choice:
    """What the KV heads of one layer get: names of maps, slopes per token, selected keys."""

    maps: tuple[str, ...]
    slopes: tuple[float, ...]
    topk: tuple[int, ...]
