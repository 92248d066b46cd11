"""A little text for toy runs of the experiments."""

import json

import numpy as np
import pytest

from sparsek_cli.data.generated_text import generated_text


@pytest.fixture(autouse=True)
def _own_folders(tmp_path_factory, monkeypatch):
    """Caches and the note of the last model stay inside the test run."""
    home = tmp_path_factory.getbasetemp()
    monkeypatch.setenv("SPARSEK_CACHE_DIR", str(home / "cache"))
    monkeypatch.setenv("SPARSEK_STATE_DIR", str(home / "state"))


@pytest.fixture
def novels(tmp_path):
    """Files of text to train on and to measure."""
    files = []
    for number, name in enumerate(("train", "held-out")):
        file = tmp_path / f"{name}.jsonl"
        rng = np.random.default_rng(number)
        rows = [json.dumps({"text": generated_text(rng, 300)}) for _ in range(3)]
        file.write_text("\n".join(rows) + "\n")
        files.append(str(file))
    return files


@pytest.fixture(scope="session")
def two_layers(tmp_path_factory) -> str:
    """A model with the tokenizer of `tiny` and random weights, for toy runs."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from sparsek_cli.hub import bundled
    from sparsek_cli.loading import load_tokenizer

    folder = tmp_path_factory.mktemp("two-layers")
    tiny = bundled()
    config = AutoConfig.from_pretrained(tiny.path)
    config.num_hidden_layers, config.layer_types = 2, config.layer_types[:2]
    config.hidden_size, config.intermediate_size, config.head_dim = 64, 64, 16
    config.num_attention_heads, config.num_key_value_heads = 4, 2
    with torch.random.fork_rng():
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    load_tokenizer(tiny).save_pretrained(folder)
    return str(folder)
