"""Ctrl-C in every verb: exit 130, one message, no traceback."""

import importlib

import pytest


@pytest.mark.parametrize(
    ("place", "words"),
    [
        ("sparsek_cli.hub.resolve", ["convert", "tiny"]),
        ("sparsek_cli.hub.resolve", ["finetune", "base", "out"]),
        ("sparsek_cli.last_model.model_or_default", ["evaluate", "--tasks", "ppl"]),
        ("sparsek_cli.hub.resolve", ["chat", "tiny", "--prompt", "x"]),
        ("sparsek_cli.hub.resolve", ["doctor", "tiny"]),
        ("sparsek_cli.benchmarks.layer.measure", ["bench", "--device", "cpu"]),
        ("sparsek_cli.commands.recipes.recipe_names", ["recipes", "list"]),
    ],
)
def test_interrupted(sparsek, monkeypatch, tmp_path, place, words):
    def stop(*args, **options):
        raise KeyboardInterrupt

    monkeypatch.chdir(tmp_path)
    module, name = place.rsplit(".", 1)
    monkeypatch.setattr(importlib.import_module(module), name, stop)
    shown = sparsek(*words)
    assert shown.failed(130), shown
    assert not [path for path in tmp_path.rglob("*") if path.name != "state"]
