"""Every verb runs SparseK on a converted model of every family, and fails where it would not."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest
from sparse_path import counted_attention

SHAPE_OF = {
    "llama": "llama3",
    "mistral": "mistral_plain",
    "qwen2": "qwen2",
    "qwen3": "unigram",
    "gpt_neox": "neox",
    "gpt2": "gpt2_bare",
}


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> str:
    file = tmp_path_factory.mktemp("text") / "plain.txt"
    line = "Line {}: the harbour master counted {} crates and wrote them down.\n"
    file.write_text("".join(line.format(i, 7 * i) for i in range(400)))
    return str(file)


def words_of(verb: str, model, text: str, out) -> list[str]:
    """A short run of the verb."""
    return {
        "chat": ["chat", model, "--prompt", "Hello", "--max-new-tokens", "2", "--json"],
        "evaluate": ["evaluate", model, "-o", out, "--tasks", "ppl", "--lengths", "64", "--limit",
                     "1", "--text", text, "--baselines", "dense", "--json"],
        "finetune": ["finetune", model, out, "--data", text, "--steps", "1", "train=scorers",
                     "sequence_length=64", "batch_size=1", "evaluation.held_out=0", "--json"],
        "bench": ["bench", "generate", model, "--lengths", "24", "--tokens", "2", "--repeats", "1",
                  "--json"],
        "doctor": ["doctor", model, "--json"],
    }[verb]  # fmt: skip


@pytest.fixture
def run(capfd, monkeypatch, tmp_path) -> Callable:
    """`run(verb, model, text)` -> exit code, stdout and stderr of the command in this process."""
    monkeypatch.setenv("SPARSEK_STATE_DIR", str(tmp_path / "state"))
    monkeypatch.setenv("SPARSEK_CACHE_DIR", str(tmp_path / "cache"))

    def call(verb: str, model, text: str):
        from sparsek_cli.app import run as cli

        capfd.readouterr()
        words = [*words_of(verb, model, text, tmp_path / verb), "--device", "cpu"]
        code = cli([str(word) for word in words])
        return code, *capfd.readouterr()

    return call


VERBS = ("chat", "evaluate", "finetune", "bench", "doctor")


@pytest.mark.parametrize("verb", VERBS)
def test_the_sparse_path_runs(verb, some_family, pair, text, run):
    made = pair(some_family, SHAPE_OF[some_family])
    with counted_attention() as layers:
        code, out, err = run(verb, made.out, text)
    assert code == 0, err
    assert set(layers) == {0, 1}
    if verb == "doctor":
        rows = {row["name"]: row for row in json.loads(out)["checks"]}
        assert rows["sparse path"]["ok"] is True
        assert rows["sparse path"]["detail"] == (
            "2 calls of SparseK attention in 2 layers, SparseKCache"
        )


@pytest.mark.parametrize("verb", VERBS)
def test_a_model_that_attends_densely_is_not_passed_off(verb, pair, text, run, monkeypatch):
    """As if a loader had switched SparseK off without a word."""
    from sparsek_cli.models import config

    made = pair("llama", SHAPE_OF["llama"])
    monkeypatch.setattr(config, "own_attention", lambda name: "sdpa")
    with counted_attention() as layers:
        code, _, err = run(verb, made.out, text)
    assert layers == []
    assert code == 1, err
    assert "error: " in err and "hint: " in err and "Traceback" not in err
