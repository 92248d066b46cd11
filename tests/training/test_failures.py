"""NaN losses and full disks: what is said, and what is left to go on from."""

import shutil
from pathlib import Path

import pytest
from safetensors import SafetensorError
from verbs import finetune

import sparsek_cli as sparsek
from sparsek_cli.errors import SparsekError, UsageError
from sparsek_cli.reporter import Silent
from sparsek_cli.training.storage import checkpoints, output
from sparsek_cli.training.storage.resume import part_folder


def full_disk(*args, **kwargs):
    """What safetensors raises on a full disk: no OSError."""
    raise SafetensorError(
        "Error while serializing: I/O error: No space left on device (os error 28)"
    )


def test_nan_names_the_batch_and_leaves_nothing(recipe, dense_checkpoint, tmp_path):
    base = dense_checkpoint()
    made = recipe("train=all", "learning_rate=1e30", "max_grad_norm=0", "steps=8", model=base)
    with pytest.raises(SparsekError, match=r"loss became .* in sequences \d+ \(text\)"):
        finetune(made)
    assert not (tmp_path / "out").exists() and not part_folder(tmp_path / "out").exists()


def test_nan_before_anything_is_learnt_blames_the_weights(recipe, dense_checkpoint, tmp_path):
    """The hint was to lower the learning rate."""
    from safetensors.torch import load_file, save_file

    file = dense_checkpoint() / "model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.0.mlp.up_proj.weight"][0, 0] = float("inf")
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(SparsekError, match="loss is nan before anything is learnt") as caught:
        finetune(recipe("train=all", "steps=3", model=file.parent))
    assert "weights are damaged" in caught.value.hint and not (tmp_path / "out").exists()


def test_a_full_disk_keeps_the_last_checkpoint(recipe, scratch, tmp_path, monkeypatch):
    real, calls = checkpoints.save_trained, []

    def fails_the_second_time(*args, **kwargs):
        calls.append(1)
        if len(calls) == 2:
            full_disk()
        return real(*args, **kwargs)

    monkeypatch.setattr(checkpoints, "save_trained", fails_the_second_time)
    with pytest.raises(SparsekError, match="disk is full.*checkpoint-2 is kept"):
        finetune(recipe(*scratch, "save_steps=2", "steps=6"))
    part = part_folder(tmp_path / "out")
    assert sorted(p.name for p in part.iterdir()) == ["checkpoint-2", "inputs.json", "recipe.yaml"]
    done = finetune(recipe(*scratch, "save_steps=2", "steps=6"), resume=True)
    assert done.steps == 6


class Says(Silent):
    """A reporter that does something when it is told something."""

    def __init__(self, act=lambda: None):
        self.lines, self.act = [], act

    def say(self, text=""):
        self.lines.append(text)
        if "the disk is full" in text:
            self.act()


def test_a_finished_run_waits_for_room(recipe, scratch, tmp_path, monkeypatch):
    """No checkpoint to go back to: the end of the run is all there is."""
    real = output.staged
    monkeypatch.setattr(output, "_PAUSE", 0.01)
    monkeypatch.setattr(output, "staged", full_disk)
    report = Says(act=lambda: monkeypatch.setattr(output, "staged", real))
    done = finetune(recipe(*scratch), report)
    assert (tmp_path / "out" / "model.safetensors").is_file() and done.steps == 3
    assert sum("it is tried again for" in line for line in report.lines) == 1


def test_it_does_not_wait_for_ever(recipe, scratch, tmp_path, monkeypatch):
    monkeypatch.setattr(output, "PATIENCE", 0.0)
    monkeypatch.setattr(output, "staged", full_disk)
    with pytest.raises(SparsekError, match="No space left") as caught:
        finetune(recipe(*scratch))
    assert "with save_steps" in caught.value.hint and not part_folder(tmp_path / "out").exists()
    with pytest.raises(SparsekError, match="No space left") as caught:
        finetune(recipe(*scratch, "save_steps=1"))
    assert "--resume" in caught.value.hint
    monkeypatch.undo()
    # The last checkpoint is the end: nothing is trained again, and the report is the same.
    done = finetune(recipe(*scratch, "save_steps=1"), resume=True)
    whole = finetune(recipe(*scratch, out="whole"))
    assert done.steps == 3
    assert (done.loss, done.held_out_loss) == (whole.loss, whole.held_out_loss)


def test_a_disk_that_is_too_small_is_named_at_once(recipe, scratch, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    for words, hint in ([], "another OUT"), (["save_steps=1"], "save_steps=0"):
        with pytest.raises(SparsekError, match="will write .* KiB, and 0.98 KiB are free") as e:
            finetune(recipe(*scratch, *words))
        assert hint in e.value.hint
    assert not part_folder(tmp_path / "out").exists()


def test_a_base_that_cannot_be_linked_counts_as_written(
    recipe, sparse_checkpoint, tmp_path, monkeypatch
):
    """On another disk it was copied when all steps were done; scorers alone had been counted."""
    usage = shutil.disk_usage(tmp_path)._replace(free=60 << 10)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    made = recipe("train=scorers", "steps=1", model=sparse_checkpoint())
    assert finetune(made).steps == 1
    shutil.rmtree(tmp_path / "out")
    elsewhere = Path("/proc")  # another file system
    monkeypatch.setattr(output.disk, "existing_parent", lambda path: elsewhere)
    with pytest.raises(SparsekError, match="will write .* 60.0 KiB are free"):
        finetune(made)


def test_adapters_alone_need_no_room_for_the_model(
    recipe, sparse_checkpoint, tmp_path, monkeypatch
):
    """Of a model of 8B parameters 16 GB were asked for, and megabytes written."""
    model = sparse_checkpoint()
    usage = shutil.disk_usage(tmp_path)._replace(free=60 << 10)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    words = ("train=lora", "steps=1", "lora.rank=1", "lora.scorers=false")
    with pytest.raises(SparsekError, match="will write .* 60.0 KiB are free"):
        finetune(recipe(*words, model=model))
    assert finetune(recipe(*words, "lora.merge=false", model=model)).steps == 1


@pytest.mark.parametrize("train", ["all", "lora"])
def test_scores_that_diverge_say_what_to_lower(recipe, sparse_checkpoint, train):
    """It was a ValueError about the thresholds of gates."""
    words = ("learning_rate=1e10", "warmup=0", "steps=3", "keep_better=false", f"train={train}")
    with pytest.raises(SparsekError, match="after step 1 tokens have scores above") as refusal:
        finetune(recipe(*words, model=sparse_checkpoint()))
    assert "lower learning_rate and scorer_learning_rate" in refusal.value.hint


def test_without_a_chat_template_a_recipe_that_needs_none_is_named(
    sparse_checkpoint, text_file, tmp_path
):
    """The hint was to look at a schema, in which no template is; base models have none."""
    model = sparse_checkpoint()
    (model / "chat_template.jinja").unlink()
    small = {"steps": 1, "sequence_length": 64, "batch_size": 1, "data": text_file}
    with pytest.raises(UsageError, match="the tokenizer has no chat template") as refusal:
        sparsek.finetune(model, tmp_path / "tuned", recipe="demo", **small)
    assert "--recipe lora or scorers" in refusal.value.hint
    for name in ("lora", "scorers"):  # as the hint says
        sparsek.finetune(model, tmp_path / name, recipe=name, **small)
