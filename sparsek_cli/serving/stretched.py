"""transformers' server with positions stretched, for which it has no flag of its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

YARN = "--yarn"  # how this package tells its own process, before transformers reads the rest


def take_factor(words: list[str]) -> float | None:
    """The number behind `YARN`, both of which are taken out of `words`; None where it is not."""
    if YARN not in words:
        return None
    place = words.index(YARN)
    _, factor = words[place : place + 2]
    del words[place : place + 2]
    return float(factor)


def stretch_what_it_loads(manager: type, factor: float) -> None:
    """Has the server load its model with a config that `loading.positions.stretch` changed.

    Args:
        manager: transformers' `ModelManager`, which takes no config.
    """
    from transformers import AutoModelForCausalLM

    from sparsek_cli.loading import load_config
    from sparsek_cli.loading.positions import stretch

    def load(self: Any, model_id_and_revision: str, *_rest: Any, **_named: Any) -> Any:
        name = model_id_and_revision.rpartition("@")[0]  # a folder: `plan.py` sees to that
        config = load_config(Path(name), name)
        stretch(config, factor)
        return AutoModelForCausalLM.from_pretrained(
            name,
            config=config,
            attn_implementation=self.attn_implementation,
            dtype=self.dtype,
            device_map=self.device,
            quantization_config=self.get_quantization_config(),
            trust_remote_code=False,
        )

    manager._load_model = load
