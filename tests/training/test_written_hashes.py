"""Models that finetune writes whole say what was written; what changed since is found."""

import json

import pytest
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from verbs import finetune

import sparsek_cli as api
from sparsek_cli import hub
from sparsek_cli.checkpoint_files import samples
from sparsek_cli.checkpoint_files.shards import SEAL, read_shard
from sparsek_cli.diagnosis.model import _config, _files
from sparsek_cli.errors import SparsekError
from sparsek_cli.output.written_config import KEY as CONFIG
from sparsek_cli.sharing import push
from sparsek_cli.training.storage import whole_weights


def test_whole_models_say_what_was_written(recipe, sparse_checkpoint, tmp_path):
    out = tmp_path / "out"
    words = ("train=lora", "lora.rank=2", "steps=1", "evaluation.held_out=0")
    finetune(recipe(*words, model=sparse_checkpoint()))
    found = _files(hub.resolve(str(out)))
    assert found.ok and found.detail.startswith("1 of 1 files of weights are what was written")
    # A part of its tensors, in another file, is not all that was written.
    anew = api.convert(out, tmp_path / "anew", calibrate="none", again=True).out
    push.plan(anew, "me/anew")
    file = out / "model.safetensors"
    flipped = bytearray(file.read_bytes())
    flipped[-1] ^= 1
    file.write_bytes(flipped)
    found = _files(hub.resolve(str(out)))
    assert found.ok is False and "model.safetensors" in found.detail
    # Programs that write it again leave no hash of what it was.
    save_file(load_file(file), file, {"format": "pt"})
    assert _files(hub.resolve(str(out))).ok is None


WORDS = ("train=lora", "lora.rank=2", "steps=1", "evaluation.held_out=0")


def metadata_of(file):
    with safe_open(file, "np") as opened:
        return opened.metadata()


@pytest.mark.parametrize("soon", [0, 2**31])
def test_of_files_too_large_to_hash_samples_are_known(
    soon, recipe, sparse_checkpoint, tmp_path, monkeypatch
):
    """Above 2 GiB nothing said what they were, and whatever stood there was loaded."""
    monkeypatch.setattr(whole_weights, "SOON", soon)
    out = tmp_path / "out"
    finetune(recipe(*WORDS, model=sparse_checkpoint()))
    file = out / "model.safetensors"
    said = metadata_of(file)
    assert said[samples.KEY] == samples.sample_of(file) != samples.BLANK
    assert (SEAL in said) == bool(soon) and said["format"] == "pt"
    api.load(out, device="cpu")
    found = _files(hub.resolve(str(out)))
    assert found.ok and ("1 by some bytes" in found.detail) == (not soon)
    anew = api.convert(out, tmp_path / "anew", calibrate="none", again=True).out
    assert samples.KEY not in metadata_of(f"{anew}/base-00001.safetensors")  # a part of them
    api.load(anew, device="cpu")
    content = bytearray(file.read_bytes())
    largest = max(read_shard(file).tensors.values(), key=lambda entry: entry.end - entry.start)
    content[largest.start] ^= 1
    file.write_bytes(content)
    with pytest.raises(SparsekError, match="other weights than those that were written") as error:
        AutoModelForCausalLM.from_pretrained(out)
    assert "repeat its training" in error.value.hint
    with pytest.raises(SparsekError, match="not what was written|other weights than"):
        push.plan(str(out), "me/tuned")
    # Programs that write it again leave no sample of what it was.
    save_file(load_file(file), file, {"format": "pt"})
    AutoModelForCausalLM.from_pretrained(out)


def test_the_config_that_a_whole_model_was_written_with_is_known(
    recipe, sparse_checkpoint, tmp_path
):
    out = tmp_path / "out"
    finetune(recipe(*WORDS, model=sparse_checkpoint()))
    [row] = _config(hub.resolve(str(out)))
    assert row.ok is True
    file = out / "config.json"
    fields = json.loads(file.read_text())
    fields["rope_parameters"]["rope_theta"] = 500.0
    file.write_text(json.dumps(fields))
    [row] = _config(hub.resolve(str(out)))
    assert row.ok is False and "rope_theta 500.0" in row.detail
    assert row.hint.endswith(f"take '{CONFIG}' out of the metadata of model.safetensors")
