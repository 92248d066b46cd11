"""Folders and files that a stranger may call a model, each wrong in one way."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

Maker = Callable[[Path, Path], None]  # (a good dense folder, where to make the bad one)
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


def linked(good: Path, folder: Path, *without: str) -> None:
    """The good folder's files, linked; what is written into them first needs `rewritten`."""
    folder.mkdir()
    for file in good.iterdir():
        if file.name not in without:
            os.link(file, folder / file.name)


def rewritten(file: Path, content: str | bytes) -> None:
    """Another content under the same name, the good file untouched."""
    file.unlink(missing_ok=True)
    file.write_bytes(content if isinstance(content, bytes) else content.encode())


def config(**changes: Any) -> Maker:
    """config.json with other keys; None takes one out."""

    def make(good: Path, folder: Path) -> None:
        linked(good, folder)
        found = json.loads((good / "config.json").read_text()) | changes
        kept = {key: value for key, value in found.items() if value is not None}
        rewritten(folder / "config.json", json.dumps(kept))

    return make


def file(name: str, content: str | bytes | None) -> Maker:
    """One file with another content, or without it."""

    def make(good: Path, folder: Path) -> None:
        linked(good, folder, name)
        if content is not None:
            (folder / name).parent.mkdir(exist_ok=True)
            rewritten(folder / name, content)

    return make


def tensors(change: Callable[[dict[str, Any]], None]) -> Maker:
    """Weights changed by a function of their dictionary."""

    def make(good: Path, folder: Path) -> None:
        from safetensors.torch import load_file, save_file

        linked(good, folder, SINGLE)
        found = load_file(good / SINGLE)
        change(found)
        save_file(found, folder / SINGLE, metadata={"format": "pt"})

    return make


def alone(files: Mapping[str, str | bytes]) -> Maker:
    """A folder of these files."""

    def make(good: Path, folder: Path) -> None:
        folder.mkdir()
        for name, content in files.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            rewritten(folder / name, content)

    return make


def both(*makers: Maker) -> Maker:
    """One after the other, the later on what the earlier made."""

    def make(good: Path, folder: Path) -> None:
        for number, maker in enumerate(makers):
            last = number == len(makers) - 1
            target = folder if last else folder.with_name(f"{folder.name}-{number}")
            maker(good, target)
            good = target

    return make


def quantised(**block: Any) -> Maker:
    return config(quantization_config=block)


def _packed(found: dict[str, Any]) -> None:
    import torch

    name = "model.layers.0.mlp.up_proj"
    found.pop(f"{name}.weight")
    for part in ("qweight", "qzeros", "scales", "g_idx"):
        found[f"{name}.{part}"] = torch.zeros(4, 4, dtype=torch.int32)


def _integers(found: dict[str, Any]) -> None:
    import torch

    name = "model.layers.0.mlp.up_proj.weight"
    found[name] = found[name].to(torch.int8)


def _eight_bits(found: dict[str, Any]) -> None:
    import torch

    name = "model.layers.0.mlp.up_proj.weight"
    found[name] = found[name].to(torch.float8_e4m3fn)


def _nan(found: dict[str, Any]) -> None:
    found["model.layers.1.mlp.up_proj.weight"][0, 0] = float("nan")


def _adapter(found: dict[str, Any]) -> None:
    import torch

    found["base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"] = torch.zeros(2, 32)


def _within(wrapper: str) -> Callable[[dict[str, Any]], None]:
    def rename(found: dict[str, Any]) -> None:
        for name in [*found]:
            found[wrapper + name] = found.pop(name)

    return rename


def _base_layers(found: dict[str, Any]) -> None:
    for name in [*found]:
        if "q_proj" in name:
            found[name.replace("q_proj", "q_proj.base_layer")] = found.pop(name)


def _truncated(good: Path, folder: Path) -> None:
    linked(good, folder, SINGLE)
    (folder / SINGLE).write_bytes((good / SINGLE).read_bytes()[:-100])


def _marked(name: str) -> Maker:
    """One file with a byte order mark, as Windows' editors save it."""

    def make(good: Path, folder: Path) -> None:
        linked(good, folder, name)
        rewritten(folder / name, b"\xef\xbb\xbf" + (good / name).read_bytes())

    return make


def _index(content: str) -> Maker:
    def make(good: Path, folder: Path) -> None:
        linked(good, folder, SINGLE)
        os.link(good / SINGLE, folder / "model-00001-of-00002.safetensors")
        (folder / INDEX).write_text(content)

    return make


def _pickle(good: Path, folder: Path) -> None:
    linked(good, folder, SINGLE)
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x02cos\nsystem\n.")


def _pickle_beside(good: Path, folder: Path) -> None:
    _pickle(good, folder)
    os.link(good / SINGLE, folder / "other.safetensors")


def _loop(good: Path, folder: Path) -> None:
    folder.symlink_to(folder)


def _dangling(good: Path, folder: Path) -> None:
    linked(good, folder, SINGLE)
    (folder / SINGLE).symlink_to(folder / "blobs" / "gone")


def special(name: str, make: Callable[[Path], Any]) -> Maker:
    """One file that is none: a pipe, a socket, a link to nothing."""

    def made(good: Path, folder: Path) -> None:
        linked(good, folder, name)
        (folder / name).parent.mkdir(exist_ok=True)
        make(folder / name)

    return made


def bind(path: Path) -> None:
    """A socket, whose path from here must be short."""
    here = Path.cwd()
    os.chdir(path.parent)
    with socket.socket(socket.AF_UNIX) as opened:
        opened.bind(path.name)
    os.chdir(here)


def _fifo(good: Path, folder: Path) -> None:
    os.mkfifo(folder)


def _tokenizer(change: Callable[[dict[str, Any]], Any]) -> Maker:
    def make(good: Path, folder: Path) -> None:
        linked(good, folder, "tokenizer.json")
        found = json.loads((good / "tokenizer.json").read_text())
        change(found)
        (folder / "tokenizer.json").write_text(json.dumps(found))

    return make


def tokenizer_config(**changes: Any) -> Maker:
    """tokenizer_config.json with other keys."""

    def make(good: Path, folder: Path) -> None:
        found = json.loads((good / "tokenizer_config.json").read_text())
        file("tokenizer_config.json", json.dumps(found | changes))(good, folder)

    return make


def template(text: str) -> Maker:
    return file("chat_template.jinja", text)


WRONG_TYPES: dict[str, dict[str, Any]] = {
    "class-number": {"tokenizer_class": 3},
    "class-of-models": {"tokenizer_class": "LlamaForCausalLM"},
    "class-other": {"tokenizer_class": "T5Tokenizer"},
    "end-number": {"eos_token": 3},
    "side": {"padding_side": "up"},
    "length-word": {"model_max_length": "many"},
    "added-list": {"added_tokens_decoder": [1]},
}
ENDLESS = {
    "nested": "{% for a in range(9999) %}{% for b in range(9999) %}{% endfor %}{% endfor %}",
    "macro": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}"
    "{{ f(60) }}",
    "doubling": "{% set n = namespace(x='a') %}{% for i in range(60) %}{% set n.x = n.x ~ n.x %}"
    "{% endfor %}",
    "power": "{{ 9 ** 9 ** 9 ** 9 }}",
}
# What transformers' `get_text_config` takes.
TEXT_PARTS = ("text_config", "decoder", "generator", "text_encoder")
LAYER = "model.layers.0.mlp.up_proj.weight"
ESCAPE = "\x1b]0;title\x07"
ADAPTER = json.dumps({"base_model_name_or_path": f"someone/base{ESCAPE}", "peft_type": "LORA"})
AUTO_MAP = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}

# What every verb refuses.
MODELS: dict[str, Maker] = {
    # quantised elsewhere
    "gptq": quantised(quant_method="gptq", bits=4),
    "gptq-without-config": both(file("quantize_config.json", '{"bits": 4}'), tensors(_packed)),
    "gptq-packed-only": tensors(_packed),
    "gptq-other-config-name": file("quant_config.json", '{"zero_point": true, "w_bit": 4}'),
    "awq": quantised(quant_method="awq", bits=4),
    "fp8": quantised(quant_method="fp8", weight_block_size=[128, 128]),
    "fp8-weights-only": tensors(_eight_bits),
    "bitsandbytes": quantised(load_in_4bit=True, quant_method="bitsandbytes"),
    "quantised-by-a-word": config(quantization_config="int4"),
    "compressed": config(compression_config={"format": "pack-quantized"}),
    "int8-weights": tensors(_integers),
    # adapters
    "adapter": alone({"adapter_config.json": ADAPTER, "adapter_model.safetensors": b""}),
    "adapter-beside": file("adapter_config.json", ADAPTER),
    "adapter-within": tensors(_adapter),
    "peft-wrapped": tensors(_within("base_model.model.")),
    "peft-layers": tensors(_base_layers),
    "parallel-wrapped": tensors(_within("module.")),
    "compiled": tensors(_within("_orig_mod.")),
    # other formats
    "pickle": _pickle,
    "pickle-beside-other-names": _pickle_beside,
    "gguf-folder": alone({"a.gguf": b"GGUF\x00"}),
    "consolidated": alone({"params.json": "{}", "consolidated.00.pth": b""}),
    "diffusion": alone({"model_index.json": "{}"}),
    "results": alone({"run.json": "{}", "results.json": "{}"}),
    "unfinished.part": alone({"recipe.yaml": "steps: 1"}),
    "empty": alone({}),
    "no-config": file("config.json", None),
    "below": alone({"model/config.json": "{}"}),
    # config.json
    "config-empty": file("config.json", ""),
    "config-cut": file("config.json", '{"model_type": "llama", '),
    "config-list": file("config.json", "[]"),
    "config-bytes": file("config.json", b"\xff\xfe\x00{"),
    "config-twice": lambda good, path: file(
        "config.json", (good / "config.json").read_text().replace("{", '{"vocab_size": 9,', 1)
    )(good, path),
    "generation-twice": file("generation_config.json", '{"top_k": 1, "top_k": 2}'),
    "index-twice": _index('{"weight_map": {"a": "b", "a": "c"}}'),
    "config-long": lambda good, path: config(**{f"k{i}": i for i in range(400_000)})(good, path),
    "config-deep": file("config.json", '{"a":' * 100_000),
    "type-number": config(model_type=3),
    "type-unknown": config(model_type=f"nobody{ESCAPE}"),
    "type-gone": config(model_type=None),
    "classes-number": config(architectures=7),
    "classes-mixed": config(architectures=[1, None]),
    "classifier": config(architectures=["LlamaForSequenceClassification"]),
    "seeing": config(architectures=["LlavaForConditionalGeneration"], vision_config={}),
    **{f"nested-{key}": config(**{key: {"num_hidden_layers": 2}}) for key in TEXT_PARTS},
    "remote-code": config(model_type="evil", auto_map=AUTO_MAP),
    "layers-negative": config(num_hidden_layers=-2),
    "heads-none": config(num_attention_heads=0),
    "context-none": config(max_position_embeddings=0),
    "layers-many": config(num_hidden_layers=3),
    "layers-thousands": config(num_hidden_layers=200_000),  # minutes, if they were built
    "heads-odd": config(num_attention_heads=5),
    "hidden-a-word": config(hidden_size="wide"),
    "vocabulary-smaller": config(vocab_size=100),
    "pad-beyond": config(pad_token_id=10**6),
    "vocabulary-absurd": config(vocab_size=10**9),
    "sizes-absurd": config(intermediate_size=10**13),
    "kv-heads-absurd": config(num_key_value_heads=10**6),  # minutes, if they were drawn
    "width-absurd": config(hidden_size=32 * 10**5),
    "dropout-nan": config(attention_dropout=float("nan")),
    "eps-endless": config(rms_norm_eps=float("inf")),
    "theta-nan": config(rope_parameters={"rope_type": "default", "rope_theta": float("nan")}),
    "sizes-other": config(intermediate_size=49),
    "dtype-of-integers": config(dtype="int8"),
    "dtype-unknown": config(dtype=None, torch_dtype="float7"),
    "dtype-auto": config(dtype="auto"),
    "dtype-of-torch": config(dtype="torch.bfloat16"),  # an AttributeError of transformers
    "end-a-word": config(eos_token_id="</s>"),
    "activation-unknown": config(hidden_act="sily"),
    "rope-unknown": config(rope_parameters={"rope_type": "who", "rope_theta": 1e4}),
    "sparsek-block-alone": config(sparsek={"topk": 3}),
    "sparsek-block-cut": config(model_type="sparsek_llama", sparsek={"topk": 3}),
    # files of the tokenizer that are no JSON objects
    "tokenizer-config-cut": file("tokenizer_config.json", '{"model_max_length": '),
    "tokenizer-config-list": file("tokenizer_config.json", "[]"),
    "special-tokens-cut": file("special_tokens_map.json", "{"),
    "added-tokens-list": file("added_tokens.json", "[1]"),
    "ends-beyond": file("generation_config.json", '{"eos_token_id": [2, 1000000]}'),
    "pad-of-generation-beyond": file("generation_config.json", '{"pad_token_id": 1000000}'),
    "ends-of-config-beyond": both(config(eos_token_id=10**6), file("generation_config.json", None)),
    "config-marked": _marked("config.json"),  # "not a valid JSON file" of transformers
    "tokenizer-marked": _marked("tokenizer_config.json"),
    "ends-below": file("generation_config.json", '{"eos_token_id": -1}'),
    "outputs-as-tuples": config(return_dict=False),
    "ends-are-words": file("generation_config.json", '{"eos_token_id": ["</s>"]}'),
    # weights
    "weights-linked-nowhere": _dangling,
    "head-gone": both(
        config(tie_word_embeddings=False), tensors(lambda t: t.pop("lm_head.weight"))
    ),
    "mlp-gone": tensors(lambda t: t.pop(LAYER)),
    "mlp-turned": tensors(lambda t: t.update({LAYER: t[LAYER].T.contiguous()})),
    "one-too-many": tensors(lambda t: t.update({f"model.extra{ESCAPE}": t[LAYER].clone()})),
    "cut-short": _truncated,
    "weights-empty": file(SINGLE, b""),
    "weights-text": file(SINGLE, "version https://git-lfs.github.com/spec/v1\nsize 1\n"),
    "weights-gone": file(SINGLE, None),
    "index-null": _index("null"),
    "index-number": _index('{"weight_map": 3}'),
    "index-elsewhere": _index('{"weight_map": {"a": "../../x.safetensors"}}'),
    "shard-gone": _index('{"weight_map": {"a": "model-00002-of-00002.safetensors"}}'),
    "index-gone": both(_index("{}"), file(INDEX, None)),
    "both-kinds": file(INDEX, '{"weight_map": {"a": "model-00001-of-00002.safetensors"}}'),
    # odd files where small ones are read; each would count as not there
    "fifo-config": special("config.json", os.mkfifo),
    "fifo-tokenizer": special("tokenizer.json", os.mkfifo),
    "fifo-ends": special("generation_config.json", os.mkfifo),
    "fifo-adapter": special("adapter_config.json", os.mkfifo),
    "fifo-weights": special(SINGLE, os.mkfifo),
    "bytes-template": file("chat_template.jinja", b"\xff\xfe{"),
    "socket-template": special("chat_template.jinja", bind),
    "socket-named-template": special("additional_chat_templates/tools.jinja", bind),
    "device-index": special(INDEX, lambda path: path.symlink_to("/dev/null")),
    "folder-tokenizer": special("tokenizer.json", Path.mkdir),
    "gone-tokenizer": special("tokenizer_config.json", lambda path: path.symlink_to("nowhere")),
    # odd places
    "link-to-itself": _loop,
    "fifo": _fifo,
    "text-file": lambda good, path: rewritten(path, "hello"),
    "weights.safetensors": lambda good, path: os.link(good / SINGLE, path),
    "weights.bin": lambda good, path: rewritten(path, b"\x80\x02"),
    "weights.gguf": lambda good, path: rewritten(path, b"GGUF\x03\x00\x00\x00"),
}
# What only reading text or weights shows; `doctor` and `bench generate` need no tokenizer.
TOKENIZERS: dict[str, Maker] = {
    "tokenizer-gone": both(file("tokenizer.json", None), file("tokenizer_config.json", None)),
    "tokenizer-half": file("tokenizer.json", None),
    "tokenizer-cut": file("tokenizer.json", '{"version": '),
    "tokenizer-list": file("tokenizer.json", "[]"),
    **{f"tokenizer-{name}": tokenizer_config(**changes) for name, changes in WRONG_TYPES.items()},
    "template-doubling": template(ENDLESS["doubling"]),
    "template-power": template(ENDLESS["power"]),
    "tokenizer-beyond": _tokenizer(lambda t: t["model"]["vocab"].update({"<far>": 10**6})),
}
# What is no name of any model.
NAMES = (
    "", " ", "no/such/folder", "./nowhere", "tinny", "nobody/nothing", "a\0b", "x" * 5000,
    "https://huggingface.co/a/b", "a\\b", "../..", f"named{ESCAPE}", "/dev/null", "~nobody/model",
    "caf\udce9", "./caf\udce9/model",
)  # fmt: skip
