"""A generation_config.json that transformers refuses is told as that."""

from __future__ import annotations

import json

import pytest

from sparsek_cli import hub
from sparsek_cli.errors import UsageError
from sparsek_cli.loading import load_model


@pytest.mark.parametrize(
    "asked",
    [{"max_new_tokens": 0}, {"num_return_sequences": 3}, {"compile_config": {"mode": "default"}}],
    ids=lambda asked: next(iter(asked)),
)
def test_what_it_asks_for_is_no_fault_of_config_json(make_checkpoint, tmp_path, asked):
    """The hint was to correct config.json, or to fetch the model again."""
    import torch

    folder = make_checkpoint(tmp_path / "m")
    file = folder / "generation_config.json"
    file.write_text(json.dumps(asked))
    options = dict(device=torch.device("cpu"), dtype=torch.float32)
    with pytest.raises(UsageError, match="generation_config.json asks for what cannot") as refused:
        load_model(hub.resolve(folder), **options)
    assert "remove it" in refused.value.hint
    file.unlink()  # as hinted
    load_model(hub.resolve(folder), **options)
