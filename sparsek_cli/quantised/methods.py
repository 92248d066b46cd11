"""The methods that are read, those that are refused and why, and what a config says of its own."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

# Scales of activations, which unpacked weights have no use for.
ACTIVATION_SCALES = (".input_scale", ".input_zero_point", ".input_global_scale",
                     ".activation_scale", ".k_scale", ".v_scale")  # fmt: skip


@dataclass(frozen=True)
class Method:
    """A method whose checkpoints are read.

    Attributes:
        needs: packages by their name on PyPI, with the oldest version that transformers takes.
        marks: one of these ends the name of a tensor of every such checkpoint.
        unpacked: weights are unpacked while they load.
        families: families whose checkpoints hold more than transformers loads, and are refused.
    """

    needs: Mapping[str, str]
    marks: tuple[str, ...]
    unpacked: bool = False
    families: tuple[str, ...] = ()


METHODS: dict[str, Method] = {
    "bitsandbytes": Method({"bitsandbytes": "0.46.1"}, (".SCB", ".absmax")),
    "torchao": Method({"torchao": "0.15.0"}, ("._weight_qdata", "._weight_scale")),
    "gptq": Method({"gptqmodel": "1.4.3", "optimum": "1.24.0"}, (".qweight",)),
    "awq": Method(
        {"gptqmodel": "1.4.3"},
        (".qweight",),
        families=("gpt_bigcode", "gpt_neox", "starcoder2"),  # activations are scaled, too
    ),
    "fp8": Method({}, (".weight_scale_inv",), unpacked=True),
    "mxfp4": Method({}, ("_proj_blocks",), unpacked=True),
    "compressed-tensors": Method(
        {"compressed-tensors": "0.15.0"}, (".weight_scale",), unpacked=True
    ),
}  # fmt: skip

_NOT_SAVED = "transformers cannot load what it quantised so and saved"
_UNTRIED = "no such checkpoint was ever tried here"
REFUSED: dict[str, str] = {
    **dict.fromkeys(("quanto", "hqq"), _NOT_SAVED),
    **dict.fromkeys(
        ("aqlm", "auto-round", "bitnet", "eetq", "fbgemm_fp8", "fouroversix", "fp_quant", "gemma",
         "gguf", "higgs", "metal", "mxfp8", "nvfp4", "quark", "sinq", "spqr", "vptq"),
        _UNTRIED,
    ),
}  # fmt: skip


def method_of(config: Any) -> str | None:
    """The name of the method by which a checkpoint is quantised; None: it is not, or unknown.

    Args:
        config: the content of config.json, or transformers' config object.
    """
    block = block_of(config)
    if not block:
        return None
    if block.get("load_in_4bit") or block.get("load_in_8bit"):
        return "bitsandbytes"
    method = block.get("quant_method")
    return str(getattr(method, "value", method)) if method else None


def stays_packed(config: Any) -> bool:
    """Whether weights are quantised in memory, too."""
    method = METHODS.get(method_of(config) or "")
    return method is not None and not method.unpacked


def described(config: Any) -> str:
    """Method and bits in words, "bitsandbytes, 4 bits"; "" where nothing is quantised."""
    method, block = method_of(config), block_of(config)
    if method is None:
        return ""
    bits = block.get("bits") or {"fp8": 8, "mxfp4": 4}.get(method)
    if method == "bitsandbytes":
        bits = 4 if block.get("load_in_4bit") else 8
    if method == "compressed-tensors":
        bits = {group["weights"]["num_bits"] for group in groups_of(block)}.pop()
    if method == "torchao":
        kind = block.get("quant_type")
        kind = next(iter(kind.values()), {}) if isinstance(kind, Mapping) else {}
        name = kind.get("_type", "") if isinstance(kind, Mapping) else ""
        return f"torchao, {name}" if name else "torchao"
    return f"{method}, {bits} bits" if bits else method


def block_of(config: Any) -> dict[str, Any]:
    """`quantization_config` as a dictionary; empty: there is none."""
    if isinstance(config, Mapping):
        found = config.get("quantization_config")
    else:
        found = getattr(config, "quantization_config", None)
    if hasattr(found, "to_dict"):
        found = found.to_dict()
    return dict(found) if isinstance(found, Mapping) else {}


def groups_of(block: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What compressed-tensors' block says of each kind of weights; empty: it cannot be read."""
    groups = block.get("config_groups")
    groups = list(groups.values()) if isinstance(groups, Mapping) else []
    known = (isinstance(g, Mapping) and isinstance(g.get("weights"), Mapping) for g in groups)
    return groups if all(known) else []
