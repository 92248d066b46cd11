"""Launch shapes: measured ones for common cases from tuning.json, safe ones for the rest."""

import json
from dataclasses import dataclass
from functools import lru_cache
from importlib import resources

import torch


@dataclass(frozen=True)
class Config:
    """rows: query rows (queries times packed heads) of a tile; heads: most heads packed; keys: keys
    per step; stages, masked_stages: software pipeline depth of the loops without and with masks;
    registers: most per thread (0: the compiler decides)."""

    rows: int
    heads: int
    keys: int
    warps: int
    stages: int
    masked_stages: int = 2
    registers: int = 0

    def options(self) -> dict[str, int]:
        """Launch options of the compiler."""
        options = dict(num_warps=self.warps, num_stages=self.stages)
        return options | ({"maxnreg": self.registers} if self.registers else {})


@lru_cache(maxsize=1)
def _table() -> list[dict]:
    text = resources.files("sparsek_kernels.triton").joinpath("tuning.json").read_text()
    return json.loads(text)["launches"]


@lru_cache(maxsize=256)
def launch_config(
    kind: str, capability: tuple[int, int], dim: int, group: int, bits: int
) -> Config:
    """Shape for kernel `kind` ("forward", "dq", "dkdv"); capability (0, 0) is the interpreter."""
    if capability == (0, 0):
        # Few programs, and steps small enough that short tests run every loop.
        rows, keys = (32, 32) if kind == "dkdv" else (64, 16)
        return Config(rows=rows, heads=2, keys=keys, warps=4, stages=1)
    dim = 64 if dim <= 64 else 128 if dim <= 128 else 256
    for entry in _table():
        if (
            entry["kind"] == kind
            and entry["capability"] == list(capability)
            and entry["dim"] == dim
            and entry["bits"] == bits
            and entry["group"][0] <= group <= entry["group"][1]
        ):
            names = (
                "rows",
                "heads",
                "keys",
                "warps",
                "stages",
                "masked_stages",
                "registers",
                "fused",
            )
            return Config(**{name: entry[name] for name in names if name in entry})
    return _default(kind, capability, dim, bits)


def _default(kind: str, capability: tuple[int, int], dim: int, bits: int) -> Config:
    """Fits 99 KiB of shared memory (the least among sm_80 and later) and 255 registers."""
    if bits == 32:
        return Config(rows=32, heads=4, keys=16 if dim == 256 else 32, warps=4, stages=1)
    if kind == "forward":
        big = capability[0] == 9
        if dim == 256:
            return Config(rows=64, heads=4, keys=32, warps=4, stages=2)
        return Config(
            rows=128, heads=4, keys=64 if big else 32, warps=4 if dim == 64 else 8, stages=2
        )
    if dim == 256:
        return Config(rows=64 if kind == "dq" else 32, heads=4, keys=32, warps=8, stages=1)
    if kind == "dq":
        return Config(rows=64, heads=4, keys=32, warps=4, stages=2)
    return Config(rows=32, heads=1, keys=64, warps=4, stages=2)


def device_capability(device: torch.device) -> tuple[int, int]:
    if device.type != "cuda":
        return (0, 0)
    return _capability(device.index if device.index is not None else torch.cuda.current_device())


@lru_cache(maxsize=16)
def _capability(index: int) -> tuple[int, int]:
    return torch.cuda.get_device_capability(index)
