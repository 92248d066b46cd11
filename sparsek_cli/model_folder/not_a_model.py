"""What a path that holds no model in safetensors is instead, and what to do with it."""

import json
from pathlib import Path
from shlex import quote
from typing import Any

from sparsek_cli.checkpoint_files.weights_beside import PICKLES
from sparsek_cli.errors import UsageError
from sparsek_cli.gguf.recognise import gguf_files, is_gguf
from sparsek_cli.output.contents import SCORERS

SAVE = "from_pretrained(...).save_pretrained(FOLDER)"
MERGE = (
    "merge it: PeftModel.from_pretrained(base, FOLDER).merge_and_unload().save_pretrained(OUT), "
    "the tokenizer too, then name OUT"
)

# Kinds of PEFT that learn tokens or keys in front of a text: no weight could hold them.
_BESIDE_WEIGHTS = (
    "PROMPT_TUNING", "MULTITASK_PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING", "CPT",
    "ADAPTION_PROMPT",
)  # fmt: skip


def merge_hint(path: Path) -> str:
    """What to do about the PEFT adapter in a folder."""
    kind = json_or_nothing(path / "adapter_config.json").get("peft_type")
    if kind in _BESIDE_WEIGHTS:
        return (
            f"{kind} learns beside the weights and cannot be merged into them: train LoRA instead"
        )
    return MERGE


def file_error(file: Path) -> UsageError:
    """A single file is no model that can be named."""
    suffix = file.suffix.lower()
    if is_gguf(file):
        return UsageError(
            f"'{file}' is a GGUF file, which only convert reads",
            hint=unpack(file),
        )
    if suffix in PICKLES:
        return UsageError(
            f"'{file}' is a file of pickled weights, not a checkpoint folder",
            hint=f"pickles can run code and are not read: {SAVE} writes safetensors",
        )
    if suffix == ".safetensors" and (error := _scorers_error(file, str(file))):
        return error
    what = "safetensors file" if suffix == ".safetensors" else "file"
    return UsageError(
        f"'{file}' is a {what}, not a checkpoint folder",
        hint=f"name its folder, '{file.parent}', with config.json and the tokenizer beside it",
    )


def no_config(path: Path) -> UsageError:
    """What a folder without config.json is instead."""
    no = f"'{path}' is no checkpoint: it has no config.json"

    def holds(*patterns: str) -> bool:
        return any(any(path.glob(pattern)) for pattern in patterns)

    if holds("adapter_config.json"):
        base = json_or_nothing(path / "adapter_config.json").get("base_model_name_or_path")
        of = f" of {base}" if isinstance(base, str) and base else ""
        return UsageError(
            f"'{path}' is a PEFT adapter{of}, not a whole model", hint=merge_hint(path)
        )
    if holds("adapter_model.*"):
        return UsageError(
            f"'{path}' holds a PEFT adapter's weights, without its adapter_config.json",
            hint="fetch adapter_config.json, too: PEFT merges the adapter into its base by it",
        )
    if error := _scorers_error(path / SCORERS, str(path)):
        return error
    if packed := gguf_files(path):
        return UsageError(
            f"'{path}' holds GGUF files, of which convert reads one at a time",
            hint=unpack(packed[0]),
        )
    if holds("recipe.yaml") and path.name.endswith(".part"):
        return UsageError(
            f"'{path}' is an unfinished run of finetune",
            hint="finish it: the same finetune command with --resume"
            if holds("checkpoint-*")
            else "it has no checkpoint yet: wait for it, or run the same finetune command again",
        )
    if holds("run.json", "results.json"):
        return UsageError(
            f"'{path}' holds results of evaluate, not a model", hint="name the model's own folder"
        )
    if holds("params.json", "consolidated*"):
        return UsageError(
            f"'{path}' holds weights in their makers' own format, without a config.json",
            hint="name the same model's Hugging Face version (its folder has a config.json)",
        )
    if holds("model_index.json"):
        return UsageError(
            f"'{path}' is a diffusion pipeline, not a language model",
            hint="name a model that generates text left to right",
        )
    below = sorted(p.parent for p in path.glob("*/config.json"))
    below += sorted(p.parent for p in path.glob("snapshots/*/config.json"))
    if below:
        return UsageError(no, hint=f"did you mean '{below[0]}'?")
    if holds(*(f"*{suffix}" for suffix in (*PICKLES, ".safetensors"))):
        return UsageError(
            no, hint="the weights are there: fetch config.json and the tokenizer of the same model"
        )
    if not any(path.iterdir()):
        return UsageError(f"{no}; it is empty", hint="name the folder that holds the model")
    return UsageError(no, hint=f"name a folder with config.json and *.safetensors ({SAVE})")


def unpack(file: Path) -> str:
    return f"`sparsek convert {quote(str(file))} OUT` unpacks it; then name OUT"


def _scorers_error(file: Path, name: str) -> UsageError | None:
    """The refusal of scorers alone; None where the file holds none."""
    if not file.is_file():
        return None
    from sparsek_cli.output.scorers_file import header

    found = header(file)
    if found is None:
        return None
    base = found.base["name"]
    return UsageError(
        f"'{name}' holds scorers alone, made for {base}",
        hint=f"put them onto it: `sparsek merge {quote(base)} {quote(name)} OUT`, then name OUT",
    )


def json_or_nothing(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}
