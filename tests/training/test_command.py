"""`sparsek finetune` as a user types it."""

import json

import pytest
from typer.testing import CliRunner

from sparsek_cli.app import app
from sparsek_cli.errors import UsageError


def run(*words):
    return CliRunner().invoke(app, ["finetune", *map(str, words)])


def refused(message, *words):
    """The command stops with a usage error that says `message`."""
    result = run(*words)
    assert isinstance(result.exception, UsageError), result.exception
    assert message in f"{result.exception.message} {result.exception.hint}"


def test_a_run_with_flags_and_words(text_file, sparse_checkpoint, tmp_path):
    model, out = sparse_checkpoint(), tmp_path / "out"
    words = ["sequence_length=64", "batch_size=2", "evaluation.sequences=1", "--device", "cpu"]
    plan = run(model, out, "--data", text_file, "--steps", 2, "--dry-run", *words)
    assert "2 of 128 tokens" in plan.stdout and not out.exists()
    done = run(model, out, "--data", text_file, "--steps", 2, "--json", *words)
    assert done.exit_code == 0, done.exception
    result = json.loads(done.stdout)
    assert result["steps"] == 2 and result["out"] == str(out)
    assert "tokens/s" in done.stderr and "left" in done.stderr
    refused("exists", model, out, "--data", text_file, *words)


@pytest.mark.parametrize(
    ("steps", "warmup", "said"),
    [
        (1, 2, "the warm-up takes 2 steps: the one step has rate 0, and nothing is learnt"),
        (4, 6, "the warm-up takes 6 steps: the rate reaches 50% of learning_rate"),
        (4, 3, None),
        (1, 0.03, None),
    ],
)
def test_a_warm_up_as_long_as_the_run_is_told(
    steps, warmup, said, text_file, sparse_checkpoint, tmp_path
):
    """`--steps 1` of the recipe `demo` learnt nothing, and said nothing."""
    words = ["--steps", steps, "--dry-run", "sequence_length=64", f"warmup={warmup}"]
    done = run(sparse_checkpoint(), tmp_path / "out", "--data", text_file, *words)
    assert done.exit_code == 0, done.exception
    assert ("warm-up" in done.stderr) == (said is not None) and (said or "") in done.stderr


@pytest.mark.parametrize(
    ("family", "size"), [("gpt2", "n_positions"), ("opt", "max_position_embeddings"),
                         ("llama", "max_position_embeddings")],
)  # fmt: skip
def test_sequences_beyond_the_model_s_positions(
    family, size, text_file, sparse_checkpoint, tmp_path
):
    """Beyond a table they were an IndexError; of rotary ones nothing was said."""
    model = sparse_checkpoint(family, **{size: 64})

    def said(length, *words):
        words = ["--steps", "1", f"sequence_length={length}", "batch_size=1", *words]
        return run(model, tmp_path / "out", "--data", text_file, *words)

    beyond = said(65, "--dry-run")
    if family == "llama":
        assert beyond.exit_code == 0
        assert "sequence_length 65 is beyond the 64 tokens that the model was" in beyond.stderr
        assert "is beyond" not in said(64, "--dry-run").stderr
        return
    assert isinstance(beyond.exception, UsageError)
    assert f"beyond the 64 positions that this {family} has learned" in str(beyond.exception)
    assert "sequence_length=64" in beyond.exception.hint
    done = said(64, "evaluation.sequences=1")  # as hinted
    assert done.exit_code == 0, done.exception


@pytest.mark.parametrize(
    ("train", "how", "again"),
    [("scorers", "gates", False), ("all", "gates", True), ("all", "concurrent", False)],
)
def test_what_moved_the_base_alone_is_followed_by_fitting_scorers(
    train, how, again, text_file, sparse_checkpoint, tmp_path
):
    words = ["sequence_length=64", "batch_size=1", "evaluation.held_out=0", f"train={train}",
             f"scorer_training={how}"]  # fmt: skip
    done = run(sparse_checkpoint(), tmp_path / "out", "--data", text_file, "--steps", 1,
               "--device", "cpu", *words)  # fmt: skip
    assert done.exit_code == 0, done.exception
    assert ("--again" in done.stderr) == again


def test_data_may_be_a_hub_dataset(sparse_checkpoint, monkeypatch):
    import datasets

    asked = []

    def load(hub_id, name, **options):
        asked.append(hub_id)
        return [{"text": "a few words and a few more. " * 300}]

    monkeypatch.setattr(datasets, "load_dataset", load)
    model = sparse_checkpoint()
    for recipe in ([], ["--recipe", "demo"]):
        done = run(model, "out", *recipe, "--data", "owner/name", "--dry-run",
                   "sequence_length=64", "lora.rank=2")  # fmt: skip
        assert done.exit_code == 0, done.exception
    assert asked and set(asked) == {"owner/name"}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "MODEL is missing"),
        (("nowhere/at/all", "out"), "no such folder"),
        (("--recipe", "scorrers"), "did you mean 'scorers.finetune'"),
        (("tiny", "out", "learning_rat=1"), "did you mean 'learning_rate'"),
        (("tiny", "out", "steps=many"), "'steps'"),
    ],
)
def test_mistakes_are_explained(words, message):
    refused(message, *words)
