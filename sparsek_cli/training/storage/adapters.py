"""LoRA adapters on their own, as PEFT writes and loads them; the base stays where it is."""

from pathlib import Path
from typing import Any

import torch

from sparsek_cli import disk
from sparsek_cli.converted import is_converted
from sparsek_cli.hub import Checkpoint
from sparsek_cli.training.parameters import is_scorer

# How PeftModel names what it wraps.
_PREFIX = "base_model.model."


def save_adapters(
    model: Any,
    tuner: Any,
    folder: Path,
    *,
    base: Checkpoint,
    scorers: bool,
    state: dict[str, torch.Tensor] | None,
) -> None:
    """Writes adapter_config.json and adapter_model.safetensors, float32, into `folder`.

    `PeftModel.from_pretrained(model, folder)` loads them onto the model that was trained. Scorers
    that were trained too come as modules that PEFT replaces (`modules_to_save`).

    Args:
        tuner: PEFT's LoraModel around `model`.
        base: the checkpoint that was trained.
        scorers: whether they were trained together with the adapters.
        state: the full state dict where the model is sharded, else None.
    """
    from peft import TaskType
    from safetensors.torch import save_file

    scorers = scorers and is_converted(model.config)
    config = tuner.peft_config["default"]
    config.base_model_name_or_path = base.source if "/" in base.source else str(base.path)
    config.task_type = TaskType.CAUSAL_LM
    config.inference_mode = True
    config.modules_to_save = ["scorer"] if scorers else None
    config.save_pretrained(str(folder))
    named = dict(model.named_parameters()) if state is None else state
    tensors = {
        _PREFIX + name.replace(".default.", "."): value.detach().float().cpu().contiguous()
        for name, value in named.items()
        if ".lora_" in name or (scorers and is_scorer(name))
    }
    file = folder / "adapter_model.safetensors"
    save_file(tensors, file, metadata={"format": "pt"})
    disk.readable(file)
