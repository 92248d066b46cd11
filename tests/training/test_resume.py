"""Ctrl-C or kill -9 at any moment, then --resume: the same model as if nothing had happened."""

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
import yaml
from patience import PATIENCE
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from verbs import finetune

from sparsek_cli.errors import SparsekError, UsageError
from sparsek_cli.reporter import Silent
from sparsek_cli.termination import Terminated
from sparsek_cli.training import run
from sparsek_cli.training.plan import plan
from sparsek_cli.training.storage.inputs import as_it_began
from sparsek_cli.training.storage.resume import begun, check_output, part_folder, remove
from sparsek_cli.training.trainer import SparsekTrainer

# Dropout, so that the state of the random generators matters; two micro-batches per step.
WORDS = ["steps=12", "save_steps=3", "architecture.settings.attention_dropout=0.1",
         "log_steps=1", "evaluation.every=4", "warmup=2"]  # fmt: skip


def start(made, folder: Path, *flags: str) -> subprocess.Popen:
    file = folder / "resume.yaml"
    file.write_text(yaml.safe_dump(made.model_dump(mode="json", exclude_none=True)))
    command = [sys.executable, "-m", "sparsek_cli", "finetune", "--recipe", str(file), *flags]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def kill_after_a_checkpoint(made, folder: Path) -> None:
    process = start(made, folder)
    until = time.monotonic() + PATIENCE
    while not list(part_folder(folder / "out").glob("checkpoint-[369]")) and process.poll() is None:
        assert time.monotonic() < until
        time.sleep(0.01)
    process.kill()
    process.wait()
    assert list(part_folder(folder / "out").glob("checkpoint-*")), process.stderr.read()


EVENTS = ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "shutil.")


def killed_at(event: int, work) -> bool:
    """Whether a process that does `work` has as many events of files, at the last of which it dies.

    Such as an audit hook sees: opened to write, renamed, removed.
    """
    child = os.fork()
    if child == 0:
        seen = []

        def count(name, found):
            flags = found[2] if name == "open" and isinstance(found[2], int) else 0
            if flags & (os.O_WRONLY | os.O_RDWR) or name.startswith(EVENTS):
                seen.append(name)
                if len(seen) == event:
                    os.kill(os.getpid(), signal.SIGKILL)  # an event, too

        sys.addaudithook(count)
        try:
            work()
        finally:
            os._exit(0)
    return os.WIFSIGNALED(os.waitpid(child, 0)[1])


def test_what_a_kill_leaves_of_a_run_s_folder_is_known_as_that(tmp_path):
    """Before its recipe was written, or once that was removed, OUT.part was somebody else's: the
    next run was refused, with --overwrite too."""
    out, part = tmp_path / "out", tmp_path / "out.part"

    def run():
        with begun({"steps": 1}, {"text": "a"}, part, resume=False):
            for folder in ("checkpoint-1", "writing"):
                (part / folder).mkdir()
                (part / folder / "trained.safetensors").write_text("x")
        remove(part)

    events = 0
    while killed_at(events + 1, run):
        events += 1
        check_output(out, resume=False, overwrite=True)
        with begun({"steps": 1}, {"text": "a"}, part, resume=False):
            pass
        assert remove(part) is None
    assert events > 12 and not part.exists()


@pytest.mark.parametrize("kill", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_stopped_and_resumed_equals_uninterrupted(recipe, scratch, tmp_path, interrupted, kill):
    whole = finetune(recipe(*scratch, *WORDS, out="whole"))
    made = recipe(*scratch, *WORDS)
    part = part_folder(tmp_path / "out")
    kill_after_a_checkpoint(made, tmp_path) if kill else interrupted(made, 5)
    kept = sorted(part.glob("checkpoint-*"))
    assert {file.suffix for file in kept[0].iterdir()} == {".safetensors", ".json"}
    with pytest.raises(UsageError, match="an unfinished run"):
        finetune(made)
    with pytest.raises(UsageError, match="learning_rate"):
        finetune(made.model_copy(update={"learning_rate": 1.0}), resume=True)
    done = finetune(made, resume=True)
    assert done.loss == whole.loss and done.held_out_loss == whole.held_out_loss
    ours, theirs = (load_file(tmp_path / n / "model.safetensors") for n in ("out", "whole"))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert not part.exists()


@pytest.mark.slow
def test_killed_again_and_again(recipe, scratch, tmp_path):
    """While a checkpoint is written, right after one, in a step, and while the model is written."""
    words = [*WORDS, "steps=30", "evaluation.every=10"]
    whole = finetune(recipe(*scratch, *words, out="whole"))
    made = recipe(*scratch, *words)
    out, part = tmp_path / "out", part_folder(tmp_path / "out")

    def newest() -> int:
        return max((int(p.name.rsplit("-", 1)[1]) for p in part.glob("checkpoint-*")), default=0)

    moments = [
        lambda: newest() >= 3 and (part / "writing").is_dir() and any((part / "writing").iterdir()),
        lambda: newest() >= 12,
        lambda: newest() >= 18 and not time.sleep(0.03),
        lambda: any(tmp_path.glob(".out.*.part")),
    ]
    reached = []
    for number, moment in enumerate(moments):
        process = start(made, tmp_path, *(["--resume"] if number else []))
        until = time.monotonic() + PATIENCE
        while not moment() and process.poll() is None:
            assert time.monotonic() < until
        process.kill()
        process.wait()
        reached.append(newest())
        # The last kill may come too late by a moment: the rename is quick.
        assert reached[-1] or out.is_dir(), process.stderr.read()
    assert reached[1] < 30  # where others run beside it, a kill comes some steps later
    if not out.is_dir():
        done = finetune(made, resume=True)
        assert done.loss == whole.loss and done.held_out_loss == whole.held_out_loss
    ours, theirs = (load_file(tmp_path / n / "model.safetensors") for n in ("out", "whole"))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize("fails", [False, True])
def test_what_others_lay_into_a_run_s_folder_stays(recipe, scratch, tmp_path, monkeypatch, fails):
    part, said = part_folder(tmp_path / "out"), []

    class Listening(Silent):
        def say(self, message: str) -> None:
            said.append(message)

    def written(*args, **kwargs):
        (part / "notes.txt").write_text("mine")
        if fails:
            raise SparsekError("it fails", hint="nothing")

    monkeypatch.setattr(run, "write_model", written)
    with pytest.raises(SparsekError) if fails else nullcontext():
        finetune(recipe(*scratch, "steps=1"), Listening())
    assert [file.name for file in part.iterdir()] == ["notes.txt"]
    assert f"{part} stays: it holds notes.txt" in said[-1]


def test_half_written_checkpoints_are_not_taken(recipe, scratch, tmp_path):
    with pytest.raises(UsageError, match="nothing to resume"):
        finetune(recipe(*scratch), resume=True)
    part = part_folder(tmp_path / "out")
    (part / "writing" / "checkpoint-2").mkdir(parents=True)
    (part / "recipe.yaml").write_text("seed: 0")
    with pytest.raises(UsageError, match="nothing to resume"):
        finetune(recipe(*scratch), resume=True)
    assert finetune(recipe(*scratch)).steps == 3


def test_another_text_or_model_is_not_resumed(recipe, sparse_checkpoint, tmp_path, interrupted):
    """It went on with them, and compared losses of two held-out texts."""
    model, text = sparse_checkpoint(), tmp_path / "own.jsonl"
    rows = [json.dumps({"text": f"Anna saw the boat, and {n} more. " * 9}) for n in range(12)]
    text.write_text("\n".join(rows))
    data = f'data.text={{"kind": "text", "files": "{text}"}}'
    made = recipe("steps=4", "save_steps=2", data, model=model)
    interrupted(made, 3)
    text.write_text("\n".join([*rows, rows[0]]))
    with pytest.raises(UsageError, match="text of data.text has changed") as caught:
        finetune(made, resume=True)
    assert "--overwrite" in caught.value.hint
    text.write_text("\n".join(rows))
    config = (model / "config.json").read_text()
    (model / "config.json").write_text(config.replace('"topk": 8', '"topk": 9'))
    with pytest.raises(UsageError, match="the model has changed"):
        finetune(made, resume=True)
    (model / "config.json").write_text(config)
    file = max(model.glob("*.safetensors"), key=lambda file: file.stat().st_size)
    bytes_before = file.read_bytes()
    save_file({name: 1.1 * t for name, t in load_file(file).items()}, file, {"format": "pt"})
    with pytest.raises(SparsekError, match="the model has changed|holds other weights"):
        finetune(made, resume=True)
    file.write_bytes(bytes_before)
    assert finetune(made, resume=True).steps == 4


def test_on_another_device_a_run_goes_on_in_its_own_number_format(
    recipe, sparse_checkpoint, tmp_path, interrupted
):
    """`dtype: auto` is bfloat16 on a GPU and float32 elsewhere: it changed format in silence."""
    made = recipe("steps=4", "save_steps=2", model=sparse_checkpoint())
    interrupted(made, 3)
    file, heard = part_folder(tmp_path / "out") / "inputs.json", []
    began = json.loads(file.read_text())
    assert (began["device"], began["number format"]) == ("cpu", "float32")

    class Heard(Silent):
        def say(self, text=""):
            heard.append(text)

    assert not plan(made, Heard(), resume=True).bf16 and not any("run" in said for said in heard)
    file.write_text(json.dumps({**began, "device": "cuda", "number format": "bfloat16"}))
    heard.clear()
    assert not as_it_began(file.parent, "cpu", bf16=False, auto=False, say=heard.append)
    assert heard.pop().startswith("the run began on cuda and goes on on cpu, in float32")
    planned = plan(made, Heard(), resume=True)
    assert planned.bf16 and "dtype        bfloat16" in planned.text()
    told = "the run began on cuda and goes on on cpu, in bfloat16"
    assert any(said.startswith(told) for said in heard)
    assert run.run(planned, Silent()).steps == 4
    file.parent.mkdir()
    file.write_text("[]")
    assert not as_it_began(file.parent, "cpu", bf16=False, auto=True, say=heard.append)


def test_scorers_resume_without_copying_the_base(recipe, sparse_checkpoint, tmp_path, interrupted):
    model = sparse_checkpoint()
    words = ["objective={lm: 0, distill: 1}", "steps=4", "save_steps=2", "keep_better=false"]
    whole = finetune(recipe(*words, model=model, out="whole"))
    interrupted(recipe(*words, model=model), 3)
    saved = part_folder(tmp_path / "out") / "checkpoint-2"
    assert all(".scorer." in name for name in load_file(saved / "trained.safetensors"))
    done = finetune(recipe(*words, model=model), resume=True)
    assert done.loss == whole.loss and done.held_out_loss == whole.held_out_loss


@pytest.mark.parametrize("save", [0, 1])
def test_sigterm_leaves_what_ctrl_c_leaves(recipe, scratch, tmp_path, monkeypatch, save):
    """A checkpoint to resume, which is named, or nothing."""

    def training_step(self, *args, **kwargs):
        if self.state.global_step == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(self, *args, **kwargs)

    real = SparsekTrainer.training_step
    monkeypatch.setattr(SparsekTrainer, "training_step", training_step)
    said, reporter = [], Silent()
    reporter.say = said.append
    with pytest.raises(Terminated):
        finetune(recipe(*scratch, f"save_steps={save}"), reporter)
    kept = ["checkpoint-1", "inputs.json", "recipe.yaml"] if save else []
    assert sorted(path.name for path in (tmp_path / "out.part").glob("*")) == kept
    assert (tmp_path / "out.part").exists() == bool(save)
    assert any("checkpoint-1 is kept, --resume" in line for line in said) == bool(save)
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


@pytest.fixture
def stopped(recipe, scratch, tmp_path, interrupted):
    """(recipe, its checkpoint of two steps)."""
    made = recipe(*scratch, "steps=4", "save_steps=1")
    interrupted(made, 2)
    return made, tmp_path / "out.part" / "checkpoint-2"


def flat(file: Path, change) -> None:
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    save_file({k: change(v).contiguous() for k, v in load_file(file).items()}, file, metadata)


DAMAGE = {
    "gone": lambda file: file.unlink(),
    "cut": lambda file: file.write_bytes(file.read_bytes()[: file.stat().st_size // 2]),
    "empty": lambda file: file.write_bytes(b""),
    "list": lambda file: file.write_text("[]"),
    "deep": lambda file: file.write_text("[" * 100_000),
    "object": lambda file: file.write_text("{}"),
    "nothing": lambda file: save_file({}, file),
    "shapes": lambda file: flat(file, lambda t: t.flatten()[:1] if t.dim() else t),
    "numbers": lambda file: flat(
        file, lambda t: t * float("nan") if t.is_floating_point() else t[:1]
    ),
}


def test_damaged_checkpoints_are_named_and_kept(stopped):
    """They ended as errors of libraries; moments that were gone, and wrong shapes, in silence."""
    made, checkpoint = stopped
    said, reporter = [], Silent()
    reporter.say = said.append
    whole = {file: file.read_bytes() for file in checkpoint.iterdir()}
    assert len(whole) == 6
    for file, content in whole.items():
        free = {"loss.json", "generators-0.safetensors"} & {file.name}  # absent in some
        for name, damage in DAMAGE.items():
            text = name in ("list", "deep", "object")
            if (name == "gone" and free) or (file.suffix == ".json") != text and name not in (
                "gone", "cut", "empty"
            ):  # fmt: skip
                continue
            damage(file)
            with pytest.raises(SparsekError) as refused:
                finetune(made, reporter, resume=True)
            assert file.name in refused.value.message or "does not fit" in refused.value.message
            assert "start" in refused.value.hint and checkpoint.is_dir(), (file.name, name)
            file.write_bytes(content)
    settings = json.loads(whole[checkpoint / "optimizer.json"])
    for key, value in (("groups", []), ("groups", 3), ("scheduler", {}), ("numbers", [1])):
        (checkpoint / "optimizer.json").write_text(json.dumps(settings | {key: value}))
        with pytest.raises(SparsekError, match=r"optimizer\.json is damaged"):
            finetune(made, reporter, resume=True)
    (checkpoint / "optimizer.json").write_bytes(whole[checkpoint / "optimizer.json"])
    state = json.loads(whole[checkpoint / "trainer_state.json"])
    for key, value in (
        ("total_flos", None), ("total_flos", []), ("train_batch_size", "x"),
        ("train_batch_size", None), ("stateful_callbacks", 3), ("best_model_checkpoint", {}),
    ):  # fmt: skip
        (checkpoint / "trainer_state.json").write_text(json.dumps(state | {key: value}))
        with pytest.raises(SparsekError, match=rf"trainer_state\.json is damaged: its {key} is"):
            finetune(made, reporter, resume=True)
    (checkpoint / "trainer_state.json").write_bytes(whole[checkpoint / "trainer_state.json"])
    checkpoint.rename(checkpoint.with_name("checkpoint-3"))
    with pytest.raises(SparsekError, match="it is of step 2"):
        finetune(made, reporter, resume=True)
    checkpoint.with_name("checkpoint-3").rename(checkpoint)
    assert said and not any("is kept, --resume" in line for line in said)
    assert finetune(made, resume=True).steps == 4
