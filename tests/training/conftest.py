"""A small corpus, small checkpoints and a way to train them, shared by the training tests."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

NAMES = ["Anna", "Bertha", "Clara", "Dora", "Emma"]
THINGS = ["boat", "house", "horse", "letter", "garden"]


@pytest.fixture(autouse=True)
def _own_folders(tmp_path_factory, monkeypatch):
    """Caches and the note of the last model stay inside the test run."""
    home = tmp_path_factory.getbasetemp()
    monkeypatch.setenv("SPARSEK_CACHE_DIR", str(home / "cache"))
    monkeypatch.setenv("SPARSEK_STATE_DIR", str(home / "state"))


@pytest.fixture(scope="session")
def text_file(tmp_path_factory) -> Path:
    """About 5,000 tokens of very regular text in 12 documents of different lengths."""
    import json

    file = tmp_path_factory.mktemp("text") / "text.jsonl"
    with file.open("w") as stream:
        for number in range(12):
            words = [
                f"{NAMES[(i * 7 + number) % 5]} saw the {THINGS[(i * 3 + number) % 5]}."
                for i in range(12 + 3 * number)
            ]
            stream.write(json.dumps({"text": " ".join(words)}) + "\n")
    return file


@pytest.fixture
def sparse_checkpoint(dense_checkpoint, tmp_path) -> Callable[..., Path]:
    """Converts a random model and gives it random scorers; returns the folder."""

    def make(family: str = "llama", *, topk: int = 8, window: int = 8, **options: Any) -> Path:
        import torch
        from safetensors.torch import load_file, save_file
        from verbs import convert

        from sparsek_cli.recipes.schema_convert import ConvertRecipe

        base = dense_checkpoint(family, max_shard_size="20KB", **options)
        out = tmp_path / "sparse"
        recipe = ConvertRecipe(
            model=str(base), out=str(out), calibrate="none", topk=topk, window=window, sinks=2
        )
        convert(recipe)
        scorers = load_file(out / "sparsek.safetensors")
        torch.manual_seed(1)
        for name, tensor in scorers.items():
            if name.endswith("weight"):
                scorers[name] = torch.randn_like(tensor) * tensor.shape[1] ** -0.5
        save_file(scorers, out / "sparsek.safetensors", metadata={"format": "pt"})
        return out

    return make


@pytest.fixture
def recipe(text_file, tmp_path) -> Callable[..., Any]:
    """A short recipe over the small text; dotted words change it."""

    def make(*words: str, model: Path | None = None, out: str = "out") -> Any:
        from sparsek_cli.recipes.load import load_recipe
        from sparsek_cli.recipes.schema_finetune import FinetuneRecipe

        base = [
            f"out={tmp_path / out}",
            f"data={{text: {{kind: text, files: {text_file}}}}}",
            "sequence_length=64",
            "batch_size=4",
            "micro_batch_size=2",
            "steps=3",
            "learning_rate=1e-3",
            "warmup=0",
            "evaluation.sequences=2",
            "evaluation.held_out=0.1",
            "device=cpu",
        ]
        if model is not None:
            base.append(f"model={model}")
        return load_recipe(FinetuneRecipe, None, [*base, *words])

    return make


@pytest.fixture
def scratch(tmp_path, tokenizer) -> list[str]:
    """Words for a tiny llama from scratch."""
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    return [
        "init=random",
        "train=all",
        f"tokenizer={tmp_path / 'tokenizer'}",
        "architecture={type: llama, settings: {hidden_size: 32, intermediate_size: 48, "
        "num_hidden_layers: 2, num_attention_heads: 4, num_key_value_heads: 2}}",
    ]


@pytest.fixture
def interrupted(monkeypatch) -> Callable[..., None]:
    """`interrupted(made, step)` trains in this process until Ctrl-C in the step after `step`."""

    def call(made: Any, step: int, **options: Any) -> None:
        from verbs import finetune

        from sparsek_cli.training.trainer import SparsekTrainer

        real = SparsekTrainer.training_step

        def training_step(self, *args, **kwargs):
            if self.state.global_step == step:
                raise KeyboardInterrupt
            return real(self, *args, **kwargs)

        with monkeypatch.context() as patch:
            patch.setattr(SparsekTrainer, "training_step", training_step)
            with pytest.raises(KeyboardInterrupt):
                finetune(made, **options)

    return call
