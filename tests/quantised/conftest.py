"""Tiny checkpoints quantised in each way that is read; those whose package is missing are skipped.

FP8 and MXFP4 need none: their tensors are made here.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

SIZES = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
}  # fmt: skip


def saved_by_transformers(plain: Path, folder: Path, settings: Any) -> None:
    model = AutoModelForCausalLM.from_pretrained(
        plain, quantization_config=settings, dtype=torch.bfloat16, device_map={"": "cpu"}
    )
    model.save_pretrained(folder)
    for file in plain.glob("token*"):
        shutil.copy(file, folder)


def bitsandbytes_4(plain: Path, folder: Path) -> None:
    pytest.importorskip("bitsandbytes", reason="bitsandbytes quantises the base")
    from transformers import BitsAndBytesConfig

    settings = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    saved_by_transformers(plain, folder, settings)


def bitsandbytes_8(plain: Path, folder: Path) -> None:
    pytest.importorskip("bitsandbytes", reason="bitsandbytes quantises the base")
    from transformers import BitsAndBytesConfig

    saved_by_transformers(plain, folder, BitsAndBytesConfig(load_in_8bit=True))


def torchao(plain: Path, folder: Path) -> None:
    pytest.importorskip("torchao", reason="torchao quantises the base")
    from torchao.quantization import Int8WeightOnlyConfig
    from transformers import TorchAoConfig

    saved_by_transformers(plain, folder, TorchAoConfig(Int8WeightOnlyConfig()))


def rewritten(
    plain: Path,
    folder: Path,
    packed: Callable[[str, torch.Tensor], dict],
    block: dict,
    ends: str | tuple[str, ...] = "proj.weight",
    dtype: str | None = None,
) -> None:
    """The checkpoint with each tensor whose name `ends` so as what `packed` makes of it, others in
    `dtype` (None: as they are), and what config.json says of them."""
    shutil.copytree(plain, folder)
    found = {}
    for name, weight in load_file(folder / "model.safetensors").items():
        kept = weight if dtype is None else weight.to(getattr(torch, dtype))
        found |= packed(name, weight) if name.endswith(ends) else {name: kept}
    tensors = {name: tensor.contiguous() for name, tensor in found.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config |= {"quantization_config": block} | ({} if dtype is None else {"dtype": dtype})
    (folder / "config.json").write_text(json.dumps(config))


def fp8(plain: Path, folder: Path) -> None:
    """Blocks of 32 x 32 with a scale each, as DeepSeek and Qwen publish theirs (of 128 x 128)."""

    def packed(name: str, weight: torch.Tensor) -> dict:
        blocks = weight.float().unflatten(1, (-1, 32)).unflatten(0, (-1, 32))
        scale = blocks.abs().amax((1, 3)) / 448
        codes = (blocks / scale[:, None, :, None]).flatten(2, 3).flatten(0, 1)
        return {name: codes.to(torch.float8_e4m3fn), f"{name}_scale_inv": scale}

    block = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [32, 32]}
    rewritten(plain, folder, packed, block)


def compressed_tensors(plain: Path, folder: Path) -> None:
    """8-bit floats with a scale per row, as llm-compressor writes them."""
    pytest.importorskip("compressed_tensors", reason="transformers unpacks by compressed-tensors")

    def packed(name: str, weight: torch.Tensor) -> dict:
        scale = weight.float().abs().amax(1, keepdim=True) / 448
        codes = (weight.float() / scale).to(torch.float8_e4m3fn)
        return {name: codes, f"{name}_scale": scale.to(weight.dtype)}

    weights = {"num_bits": 8, "type": "float", "strategy": "channel", "symmetric": True}
    group = {"targets": ["Linear"], "weights": weights}
    block = {
        "quant_method": "compressed-tensors", "format": "float-quantized",
        "quantization_status": "compressed", "ignore": ["lm_head"],
        "config_groups": {"group_0": group},
    }  # fmt: skip
    rewritten(plain, folder, packed, block)


def mxfp4(plain: Path, folder: Path) -> None:
    """Experts in blocks of 32 numbers of 4 bits with a power of two each, as gpt-oss's."""
    generator = torch.Generator().manual_seed(0)

    def packed(name: str, weight: torch.Tensor) -> dict:
        experts, inner, outer = weight.shape
        shape = (experts, outer, inner // 32, 16)
        codes = torch.randint(256, shape, dtype=torch.uint8, generator=generator)
        scales = torch.full(shape[:3], 121, dtype=torch.uint8)
        return {f"{name}_blocks": codes, f"{name}_scales": scales}

    experts = ("experts.gate_up_proj", "experts.down_proj")
    rewritten(plain, folder, packed, {"quant_method": "mxfp4"}, experts)


def in_fours(numbers: torch.Tensor, order: tuple[int, ...]) -> torch.Tensor:
    """Eight neighbours in the last dimension, 4 bits each, as one int32, in this order."""
    parts = numbers.to(torch.int64).unflatten(-1, (-1, 8))[..., order]
    packed = sum(parts[..., place] << (4 * place) for place in range(8))
    return torch.where(packed >= 1 << 31, packed - (1 << 32), packed).to(torch.int32)


def in_groups(weight: torch.Tensor, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes [out, in] in 0 .. 15, of which 8 is zero, and scales [out, in / size]."""
    grouped = weight.float().unflatten(1, (-1, size))
    scale = grouped.abs().amax(-1) / 7
    return ((grouped / scale[..., None]).round() + 8).flatten(1), scale


def gptq(plain: Path, folder: Path) -> None:
    pytest.importorskip("gptqmodel", reason="transformers computes with GPTQ by gptqmodel")
    pytest.importorskip("optimum", reason="transformers loads GPTQ by optimum")
    plain_order = tuple(range(8))

    def packed(name: str, weight: torch.Tensor) -> dict:
        path, (codes, scale) = name.removesuffix(".weight"), in_groups(weight, 32)
        zeros = torch.full_like(scale.T, 7)  # one less, as the first format has it
        return {
            f"{path}.qweight": in_fours(codes, plain_order).T,
            f"{path}.qzeros": in_fours(zeros, plain_order),
            f"{path}.scales": scale.T.half(),
            f"{path}.g_idx": (torch.arange(weight.shape[1]) // 32).int(),
        }

    block = {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False, "sym": True}
    rewritten(plain, folder, packed, block, dtype="float16")


def awq(plain: Path, folder: Path) -> None:
    pytest.importorskip("gptqmodel", reason="transformers loads and computes with AWQ by gptqmodel")
    interleaved = (0, 2, 4, 6, 1, 3, 5, 7)

    def packed(name: str, weight: torch.Tensor) -> dict:
        path, (codes, scale) = name.removesuffix(".weight"), in_groups(weight, 32)
        return {
            f"{path}.qweight": in_fours(codes.T, interleaved),
            f"{path}.qzeros": in_fours(torch.full_like(scale.T, 8), interleaved),
            f"{path}.scales": scale.T.half(),
        }

    block = {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True,
             "version": "gemm"}  # fmt: skip
    rewritten(plain, folder, packed, block, dtype="float16")


WAYS: dict[str, Callable[[Path, Path], None]] = {
    way.__name__: way
    for way in (
        bitsandbytes_4,
        bitsandbytes_8,
        torchao,
        gptq,
        awq,
        fp8,
        compressed_tensors,
        mxfp4,
    )
}


@pytest.fixture(scope="session")
def base_of(tmp_path_factory, make_checkpoint) -> Callable[[str], Path]:
    """`base_of(way)`: the quantised checkpoint, made once."""
    made: dict[str, Path] = {}

    def make(way: str) -> Path:
        if way not in made:
            home = tmp_path_factory.mktemp(way)
            family, sizes = "llama", SIZES
            if way == "mxfp4":
                family, sizes = "gpt_oss", {"hidden_size": 64, "intermediate_size": 64}
            plain = make_checkpoint(home / "plain", family, dtype="bfloat16", **sizes)
            WAYS[way](plain, home / "base")
            made[way] = home / "base"
        return made[way]

    return make


@pytest.fixture(scope="session")
def converted_of(base_of) -> Callable[[str], Path]:
    """`converted_of(way)`: its conversion, calibrated on a little text."""
    made: dict[str, Path] = {}

    def make(way: str) -> Path:
        from verbs import convert

        from sparsek_cli.conversion.calibrate.method import Method
        from sparsek_cli.recipes.schema_convert import ConvertRecipe

        if way not in made:
            base = base_of(way)
            recipe = ConvertRecipe(
                model=str(base), out=str(base.with_name("out")), topk=12, window=8,
                calibrate_tokens=256, calibrate_length=64, device="cpu",
            )  # fmt: skip
            done = convert(recipe, method=Method(documents="none"))
            made[way] = Path(done.out)
        return made[way]

    return make
