"""Bench measures what it says, on tiny shapes, and refuses what no layer has."""

import json

import pytest

SMALL = ["--device", "cpu", "--heads", "2/1", "--dim", "8", "--topk", "8", "--window", "8"]


@pytest.mark.parametrize("what", ["attention", "train"])
def test_rows(sparsek, what):
    words = ["--lengths", "32,64", "--repeats", "1", "--against", "sdpa,fla-nsa", "--json"]
    shown = sparsek("bench", what, *SMALL, *words)
    assert shown.code == 0
    data = json.loads(shown.out)
    assert [row["length"] for row in data["rows"]] == [32, 64]
    for row in data["rows"]:
        assert row["ms"]["sparsek"] > 0 and row["ms"]["sdpa"] > 0
        assert row["ratio"] == pytest.approx(row["ms"]["sdpa"] / row["ms"]["sparsek"])
        assert "fla-nsa" in row["missing"]
    wanted = {"out"} if what == "attention" else {"out", "dq", "dk", "dv", "dscores"}
    assert set(data["errors"]) == wanted


def test_decode_is_measured_once_the_slots_are_full(sparsek):
    words = ["--lengths", "12,64", "--repeats", "1", "--json"]
    shown = sparsek("bench", "decode", *SMALL, *words)
    assert shown.code == 0
    (row,) = json.loads(shown.out)["rows"]
    assert row["length"] == 64 and row["ms"]["sdpa"] > 0 and "12" in shown.err


def test_table_and_plot(sparsek, tmp_path):
    picture = tmp_path / "out.png"
    words = ["--lengths", "32,48", "--against", "sdpa", "--repeats", "1", "--plot", str(picture)]
    shown = sparsek("bench", "attention", *SMALL, *words)
    assert shown.code == 0
    assert [line.split()[0] for line in shown.out.splitlines()] == ["tokens", "32", "48"]
    assert picture.stat().st_size > 1000


@pytest.mark.parametrize(
    "words", [["everything"], ["--lengths", "many"], ["--lengths", "0"], ["--heads", "3/2"],
              ["--heads", "4"], ["--window", "0"], ["--topk", "some"], ["generate"],
              ["--device", "cpu", "--against", "magic"]],
)  # fmt: skip
def test_bad_requests(sparsek, words):
    assert sparsek("bench", *words).failed(2)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["generate", "{model}", "--topk", "8"], "takes no --topk: its shape is the model's"),
        (["generate", "{model}", "--heads", "2/1"], "takes no --heads"),
        (["attention", "{model}"], "takes no MODEL: its data are random"),
        (["train", "--tokens", "3"], "takes no --tokens"),
        (["decode", "--gate", "kv"], "not timed under gate kv"),
        (["decode", "--against", "sdpa,flex"], "no rival 'flex'"),
        (["decode"], "timed over full slots, and there are 2048"),
        (["attention", "--plot", "{model}/p.svg"], "lies inside"),
    ],
)
def test_what_would_not_count_is_refused(sparsek, tmp_path, make_checkpoint, words, said):
    """Flags of a layer did nothing to a model's figures; gate kv ended as a ValueError, and a step
    over slots that no length fills as an empty table."""
    model = make_checkpoint(tmp_path / "model")
    (model / "sparsek.yaml").write_text("topk: 3")
    line = [word.replace("{model}", str(model)) for word in words]
    shown = sparsek("bench", *line, "--device", "cpu", "--lengths", "64", "--repeats", "1")
    assert shown.failed(2) and said in shown.err
    assert not (model / "p.svg").exists()


def test_repeats_count_for_a_model(sparsek, tmp_path, make_checkpoint, monkeypatch):
    from sparsek_cli.benchmarks import generate

    asked = []
    monkeypatch.setattr(generate, "measure", lambda *_, repeats, **__: asked.append(repeats) or [])
    model = str(make_checkpoint(tmp_path / "model"))
    for words in ([], ["--repeats", "7"]):
        assert sparsek("bench", "generate", model, "--device", "cpu", *words).code == 0
    assert asked == [3, 7]


def test_a_step_is_timed_by_default_on_a_cpu(sparsek, monkeypatch):
    from sparsek_cli.benchmarks import decode

    asked = []
    monkeypatch.setattr(decode, "measure", lambda lengths, *_, **__: asked.extend(lengths) or [])
    assert sparsek("bench", "decode", "--device", "cpu").code == 0
    assert asked and min(asked) > 2048
