"""Two processes train the model that one process trains, and continue what one began."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from patience import PATIENCE
from safetensors.torch import load_file
from verbs import finetune

from sparsek_cli.errors import UsageError
from sparsek_cli.training.plan import plan
from sparsek_cli.training.storage.resume import part_folder

WORDS = ["steps=4", "save_steps=2", "batch_size=4", "micro_batch_size=1", "learning_rate=1e-2",
         "data.copies={kind: copies, filler: text, passage: [8, 16], document_length: 32}",
         "objective.answer_weight=0.5"]  # fmt: skip
SPARSE = "sparsek={topk: 8, window: 8}"


TORCHRUN = ("torch.distributed.run", "--nproc-per-node=2", "--master-addr=127.0.0.1",
            "--master-port={port}")  # fmt: skip
# Without a GPU too: its own launcher of CPU processes asks for MPI.
ACCELERATE = ("accelerate.commands.launch", "--multi_gpu", "--num_processes=2",
              "--num_machines=1", "--mixed_precision=no", "--dynamo_backend=no",
              "--main_process_port={port}")  # fmt: skip

SCRIPT = """
import os, pathlib, sys
from sparsek_cli.app import run
name = "rank-{RANK}-of-{WORLD_SIZE}".format(**os.environ)
pathlib.Path(__file__).with_name(name).touch()
sys.exit(run(sys.argv[1:]))
"""


def launch(*program: str, by: tuple[str, ...] = TORCHRUN) -> str:
    """What the program prints when two processes run it."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", *(word.format(port=port) for word in by), *program]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    ran = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, env=environment)
    assert ran.returncode == 0, ran.stderr[-12_000:]
    return ran.stdout


def words_for(made, file: Path, *flags: str) -> list[str]:
    """The command line that trains a recipe."""
    file.write_text(yaml.safe_dump(made.model_dump(mode="json", exclude_none=True)))
    return ["finetune", "--recipe", str(file), "-q", *flags]


def same_tensors(file, other, *, within: float):
    ours, theirs = load_file(file), load_file(other)
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert ours[name].dtype == tensor.dtype
        assert torch.allclose(ours[name].float(), tensor.float(), atol=within), name


@pytest.mark.slow
def test_two_processes_continue_the_run_of_one(recipe, scratch, tmp_path, interrupted):
    one = finetune(recipe(*scratch, *WORDS, SPARSE, out="one"))
    made = recipe(*scratch, *WORDS, SPARSE)
    interrupted(made, 3)
    assert (part_folder(tmp_path / "out") / "checkpoint-2").is_dir()
    words = words_for(made, tmp_path / "launch.yaml", "--resume", "--json")
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    two = json.loads(launch(str(script), *words, by=ACCELERATE))
    assert {file.name for file in tmp_path.glob("rank-*")} == {"rank-0-of-2", "rank-1-of-2"}
    assert two["loss"] == pytest.approx(one.loss, abs=1e-4)
    assert two["held_out_loss"] == pytest.approx(one.held_out_loss, abs=1e-4)
    names = (tmp_path / n / "model.safetensors" for n in ("out", "one"))
    same_tensors(*names, within=2e-3)


@pytest.mark.slow
def test_sharded_processes_train_the_model_of_one(
    recipe, scratch, sparse_checkpoint, tmp_path, interrupted
):
    """All weights, in bf16, scorers alone; and a run that is whole, sharded twice, whole again."""
    sharded = "launch.strategy=fsdp"
    all_weights = [*scratch, *WORDS, SPARSE, "save_steps=0"]
    cases = {
        "distill": [*all_weights, "objective={lm: 1, distill: 0.5, answer_weight: 0.5}"],
        "bf16": [*all_weights, "dtype=bf16", "checkpointing=true"],
        "scorers": ["objective={lm: 0, distill: 1}", "keep_better=false", "micro_batch_size=1",
                    "scorer_learning_rate=1e-2"],
        "long": [*scratch, *WORDS, SPARSE, "steps=5", "save_steps=1"],
    }  # fmt: skip
    model = {"model": sparse_checkpoint()}
    models = dict.fromkeys(cases, {}) | {"scorers": model}
    one, jobs = {}, []

    def job(name: str, stop_at: int | None, *flags: str) -> None:
        made = recipe(*cases[name], sharded, out=f"{name}-two", **models[name])
        file = tmp_path / f"{name}.yaml"
        words = words_for(made, file, "--json", *flags)
        jobs.append({"words": words, "stop_at": stop_at, "result": str(tmp_path / f"{name}.json")})

    for name, words in cases.items():
        one[name] = finetune(recipe(*words, out=f"{name}-one", **models[name]))
        if name != "long":
            job(name, None)
    whole = recipe(*cases["long"], out="long-two")
    interrupted(whole, 2)
    job("long", 3, "--resume")
    job("long", 4, "--resume")
    (tmp_path / "jobs.json").write_text(json.dumps(jobs))
    launch(str(Path(__file__).with_name("fsdp_on_cpu.py")), str(tmp_path / "jobs.json"))

    # Adam turns a gradient's last bits into steps of up to the learning rate (1e-2) where the
    # gradient is next to nothing, and those bits differ between processors: losses are held closer.
    for name, file, close, apart in (
        ("distill", "model.safetensors", 1e-4, 2e-3),
        ("bf16", "model.safetensors", 5e-3, 0.05),
        ("scorers", "sparsek.safetensors", 1e-4, 2e-3),
    ):
        two = json.loads((tmp_path / f"{name}.json").read_text())
        assert two["loss"] == pytest.approx(one[name].loss, abs=close), name
        assert two["held_out_loss"] == pytest.approx(one[name].held_out_loss, abs=close), name
        files = (tmp_path / f"{name}-{n}" / file for n in ("two", "one"))
        same_tensors(*files, within=apart)

    part = part_folder(tmp_path / "long-two")
    assert (part / "checkpoint-4").is_dir()
    assert not list(part.glob("*/*.bin")) and not list(part.glob("*/*.pt"))
    done = finetune(whole, resume=True)
    assert done.loss == pytest.approx(one["long"].loss, abs=1e-4)
    files = (tmp_path / f"long-{n}" / "model.safetensors" for n in ("two", "one"))
    same_tensors(*files, within=2e-3)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_a_base_and_its_scorers_adapt_together_on_two(
    recipe, sparse_model, tokenizer, tmp_path, strategy
):
    """The scores' own loss, stand-ins, drawn budgets, the teacher's copy; whole and sharded."""
    model = tmp_path / "sparse"
    sparse_model("llama", topk=8, window=8, sinks=2, stand_ins=1).save_pretrained(model)
    tokenizer.save_pretrained(model)
    words = ["train=all", "objective={lm: 0.1, distill: 1}", "scorer_training=concurrent",
             "budgets=[8, 4]", "batch_size=4", "micro_batch_size=1"]  # fmt: skip
    one = finetune(recipe(*words, model=model, out="one"))
    made = recipe(*words, f"launch.strategy={strategy}", model=model, out="two")
    line = words_for(made, tmp_path / "two.yaml", "--json")
    if strategy == "ddp":
        two = json.loads(launch("sparsek_cli", *line, by=(*TORCHRUN, "-m")))
    else:
        result = tmp_path / "two.json"
        jobs = [{"words": line, "stop_at": None, "result": str(result)}]
        (tmp_path / "jobs.json").write_text(json.dumps(jobs))
        launch(str(Path(__file__).with_name("fsdp_on_cpu.py")), str(tmp_path / "jobs.json"))
        two = json.loads(result.read_text())
    assert two["loss"] == pytest.approx(one.loss, abs=1e-4)
    assert two["held_out_loss"] == pytest.approx(one.held_out_loss, abs=1e-4)
    # Adam makes steps of the last bits of a small gradient, as above.
    same_tensors(*(tmp_path / n / "model.safetensors" for n in ("two", "one")), within=2e-3)
    before = load_file(model / "model.safetensors")
    after = load_file(tmp_path / "two" / "model.safetensors")
    for part in ("scorer.weight", "scorer.stand_ins"):
        moved = [not torch.equal(before[n], after[n]) for n in before if n.endswith(part)]
        assert len(moved) == 2 and any(moved)


@pytest.mark.parametrize(
    ("words", "world", "message"),
    [
        (["launch.strategy=fsdp"], "1", "there is one"),
        (["launch.strategy=fsdp"], "2", "needs GPUs"),
        (["launch.offload=true"], "1", "needs something sharded"),
    ],
)
def test_what_cannot_run_is_refused(recipe, scratch, monkeypatch, words, world, message):
    launched = {"WORLD_SIZE": world, "RANK": "0", "LOCAL_RANK": "0"}
    for name, value in {**launched, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UsageError, match=message):
        plan(recipe(*scratch, *words))
