"""Folders that are checkpoints, and those that are not."""

import pytest
from bad_models import MODELS

from sparsek_cli import hub
from sparsek_cli.errors import UsageError


def test_folder(checkpoint):
    found = hub.resolve(checkpoint("my-model"))
    assert (found.name, found.source, found.revision) == ("my-model", "folder", None)
    assert found.config()["architectures"] == ["LlamaForCausalLM"]


@pytest.mark.parametrize(
    ("config", "files", "error"),
    [
        ({"architectures": ["BertForMaskedLM"]}, (), "not a causal language model"),
        ({"architectures": ["LlamaForCausalLM"]}, ("pytorch_model.bin",), "pickled weights"),
        ({"architectures": ["LlamaForCausalLM"]}, ("notes.txt",), "no .safetensors"),
        ({"architectures": ["LlamaForCausalLM"]}, ("tf_model.h5",), "tf_model.h5 is not read"),
        ({"architectures": ["LlamaForCausalLM"]}, ("model.onnx",), "model.onnx is not read"),
        ("{not json", (), "not valid JSON"),
        ("[1]", (), "no JSON object"),
    ],
)
def test_folders_that_are_no_causal_lm(checkpoint, config, files, error):
    with pytest.raises(UsageError, match=error):
        hub.resolve(checkpoint("base", config, *files))


def test_not_a_checkpoint_at_all(tmp_path):
    with pytest.raises(UsageError, match="no config.json"):
        hub.resolve(tmp_path)
    (tmp_path / "file.txt").touch()
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_model.safetensors").touch()
    with pytest.raises(UsageError, match="PEFT adapter's weights, without its adapter_config"):
        hub.resolve(tmp_path / "adapter")
    with pytest.raises(UsageError, match="is a file"):
        hub.resolve(tmp_path / "file.txt")


def test_revision_belongs_to_the_hub(checkpoint):
    with pytest.raises(UsageError, match="--revision"):
        hub.resolve(checkpoint(), "main")
    with pytest.raises(UsageError, match="--revision"):
        hub.resolve("tiny", "main")


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        ("adapter-within", "holds adapter weights .base_model.model"),
        ("peft-wrapped", "from within PEFT's wrapper.*such as base_model."),
        ("peft-layers", "from within PEFT's wrapper.*q_proj.base_layer"),
        ("parallel-wrapped", "from within torch's DataParallel.*such as module."),
        ("compiled", "from within torch.compile.*such as _orig_mod."),
    ],
)
def test_tensors_within_a_wrapper_are_told_as_such(make_checkpoint, tmp_path, kind, says):
    """Names with a prefix were told as weights that are lacking."""
    MODELS[kind](make_checkpoint(tmp_path / "good"), tmp_path / "bad")
    with pytest.raises(UsageError, match=says) as refused:
        hub.resolve(tmp_path / "bad")
    assert "save_pretrained(OUT)" in refused.value.hint
