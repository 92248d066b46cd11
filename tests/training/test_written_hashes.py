"""Models that finetune writes whole say what was written; what changed since is found."""

from safetensors.torch import load_file, save_file
from verbs import finetune

import sparsek_cli as api
from sparsek_cli import hub
from sparsek_cli.diagnosis.model import _files
from sparsek_cli.sharing import push


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
