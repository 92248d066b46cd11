"""Which files of a folder hold its weights: exactly one set, where transformers looks for it."""

from collections.abc import Iterable
from pathlib import Path

from sparsek_cli.checkpoint_files.shards import INDEX, SINGLE, Shard
from sparsek_cli.checkpoint_files.weights_beside import PICKLES
from sparsek_cli.errors import UsageError
from sparsek_cli.gguf.recognise import gguf_files
from sparsek_cli.model_folder.not_a_model import MERGE, SAVE, json_or_nothing, unpack

# What names begin with, what wrapped the model, and how it comes out of there; PEFT's are first.
_WRAPPERS = (
    ("base_model.", "PEFT's wrapper", "model.merge_and_unload()"),
    ("module.", "torch's DataParallel", "model.module"),
    ("_orig_mod.", "torch.compile", "model._orig_mod"),
)
# Weights of TensorFlow, Flax, ONNX, and of a training run's processes (FSDP, DeepSpeed).
_FOREIGN = (".h5", ".msgpack", ".onnx", ".distcp", "_model_states.pt")


def check_weights(path: Path, name: str) -> None:
    """Exactly one set of weights, where transformers looks for it."""
    single, index = (path / SINGLE).is_file(), (path / INDEX).is_file()
    if (
        single
        and index
        and set(json_or_nothing(path / INDEX).get("weight_map", {}).values()) != {SINGLE}
    ):
        raise UsageError(
            f"'{name}' holds both {SINGLE} and {INDEX}: it is not clear which weights count",
            hint="move one of them away",
        )
    if single or index:
        return
    others = sorted(p.name for p in path.glob("*.safetensors") if p.is_file())
    pickled = any(p.suffix in PICKLES for p in path.iterdir())
    foreign = [p for end in _FOREIGN for at in ("*", "*/*") for p in sorted(path.glob(at + end))]
    if others:
        raise UsageError(
            f"'{name}' holds {others[0]}, but neither {SINGLE} nor {INDEX}",
            hint=f"name a whole file {SINGLE}, or fetch the missing {INDEX}",
        )
    if packed := gguf_files(path):
        raise UsageError(
            f"'{name}' holds no .safetensors weights, but {packed[0].name}, which only convert "
            "reads",
            hint=unpack(packed[0]),
        )
    if foreign and not pickled:
        raise UsageError(
            f"'{name}' holds no .safetensors weights; {foreign[0].relative_to(path)} is not read",
            hint="fetch the same model's .safetensors files, or write some from what is there",
        )
    raise UsageError(
        f"'{name}' holds no .safetensors weights"
        + ("; pickled weights (.bin, .pt) are refused: they can run code" if pickled else ""),
        hint=f"save it again from transformers: {SAVE} writes safetensors"
        if pickled
        else "fetch the model again: its weights are missing",
    )


def check_no_adapters(shards: Iterable[Shard], name: str) -> None:
    """No tensor is an adapter's, or called as within something that wraps a model."""
    for shard in shards:
        for tensor in shard.tensors:
            if ".lora_A." in tensor or ".lora_B." in tensor:
                raise UsageError(
                    f"'{name}' holds adapter weights ({tensor}) among its own", hint=MERGE
                )
            for begin, wrapper, inner in _WRAPPERS:
                if tensor.startswith(begin) or ".base_layer." in tensor:
                    raise UsageError(
                        f"'{name}' was saved from within {wrapper}: its tensors have names such "
                        f"as {tensor}",
                        hint=f"save what is in there: {inner}.save_pretrained(OUT), the tokenizer "
                        "too, then name OUT",
                    )


def method_apart(path: Path) -> str | None:
    """The method of quantisation that an older file beside config.json stands for."""
    for file, method in (("quantize_config.json", "gptq"), ("quant_config.json", "awq")):
        if (path / file).is_file():
            return method
    return None
