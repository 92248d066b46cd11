"""A base that another program wrote after it was converted is told from the one that was."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM

import sparsek_cli as sparsek
from sparsek_cli import hub
from sparsek_cli.checkpoint_files import samples
from sparsek_cli.checkpoint_files.samples import KEY
from sparsek_cli.errors import SparsekError
from sparsek_cli.serving.plan import plan as serving_plan
from sparsek_cli.sharing import push

INDEX = "model.safetensors.index.json"


@pytest.fixture
def pair(llama, tmp_path, convert):
    """A base and its conversion, whose files are the base's own."""
    base = shutil.copytree(llama[0], tmp_path / "base")
    return base, convert(base, tmp_path / "out")


def written_in_place(file, change) -> None:
    """As a program that opens the file to write it: every link to it changes."""
    beside = file.with_name("beside")
    tensors = {name: change(tensor) for name, tensor in load_file(file).items()}
    save_file(tensors, beside, metadata={"format": "pt", "by": "another program"})
    file.write_bytes(beside.read_bytes())
    beside.unlink()


def first_of(folder):
    return sorted(folder.glob("*.safetensors"))[0]


def shuffled(tensor):
    return tensor.flatten().flip(0).reshape(tensor.shape).contiguous() + 0.01


def forget_hashes(folder, *keys):
    index = json.loads((folder / INDEX).read_text())
    for key in keys:
        del index["metadata"][key]
    (folder / INDEX).write_text(json.dumps(index))


def test_weights_of_another_training_are_refused_and_the_hint_works(pair, convert, tmp_path):
    base, out = pair
    written_in_place(first_of(base), shuffled)
    words = "holds other weights than those that were converted"
    with pytest.raises(SparsekError, match=words) as refused:
        sparsek.load(out)
    assert "base-00001.safetensors" in str(refused.value)
    assert "convert the base again" in refused.value.hint
    for kind in (AutoModelForCausalLM, AutoModel):
        with pytest.raises(SparsekError, match=words):
            kind.from_pretrained(pretrained_model_name_or_path=str(out))
    forget_hashes(out, "sha256")  # as of a large model, whose files are not hashed whole
    with pytest.raises(SparsekError, match=words):
        push.plan(out, "me/toy")
    sparsek.load(convert(base, tmp_path / "again"))
    forget_hashes(out, KEY)  # what the hint says of a change that is meant, and of older models
    sparsek.load(out)


def test_it_is_refused_before_a_server_starts(pair):
    base, out = pair
    written_in_place(first_of(base), shuffled)
    with pytest.raises(SparsekError, match="holds other weights"):
        serving_plan(hub.resolve(out), engine="transformers")


def test_the_same_tensors_saved_by_another_program_are_the_same(pair):
    base, out = pair
    before = {name: t.clone() for name, t in sparsek.load(out)[0].state_dict().items()}
    written_in_place(first_of(base), lambda tensor: tensor)
    after = sparsek.load(out)[0].state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_trained_scorers_keep_what_is_known_of_the_base(pair, tmp_path):
    base, out = pair
    text = tmp_path / "text.txt"
    text.write_text("Who walks at night? A quiet man. " * 200)
    settings = {"steps": 1, "sequence_length": 64, "batch_size": 1, "data": text, "save_steps": 0}
    tuned = Path(sparsek.finetune(out, tmp_path / "tuned", recipe="scorers", **settings).out)
    written = [json.loads((f / INDEX).read_text())["metadata"][KEY] for f in (out, tuned)]
    assert written[0] == written[1]
    written_in_place(first_of(base), shuffled)
    with pytest.raises(SparsekError, match="holds other weights"):
        sparsek.load(tuned)


def test_of_very_many_tensors_some_are_looked_into(tmp_path, monkeypatch):
    monkeypatch.setattr(samples, "_MOST", 4)
    tensors = {f"t{n:02}": torch.zeros(8) for n in range(10)}
    save_file(tensors, tmp_path / "a")
    found = {samples.sample_of(tmp_path / "a")}
    for changed, count in (("t00", 2), ("t01", 2), ("t03", 3), ("t09", 4)):  # each third one
        save_file(tensors | {changed: torch.ones(8)}, tmp_path / "b")
        found.add(samples.sample_of(tmp_path / "b"))
        assert len(found) == count, changed
    save_file(tensors | {"t10": torch.zeros(8)}, tmp_path / "b")  # the names of all count
    assert samples.sample_of(tmp_path / "b") not in found
