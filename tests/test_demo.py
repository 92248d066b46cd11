"""What `make demo` reads, runs and returns; the four long commands themselves are left out."""

import json

import pytest

import demo
from sparsek_cli import hub


@pytest.fixture
def ran(monkeypatch, tmp_path):
    """`ran(reply)` -> exit code and the commands, the last of which answers `reply`."""
    monkeypatch.chdir(tmp_path)

    def call(reply=None):
        commands = []

        def run(title, *words, capture=False):
            commands.append([str(word) for word in words])
            return reply or ""

        monkeypatch.setattr(demo, "_run", run)
        return demo.main(), commands

    return call


def test_the_answer_decides(ran, capsys):
    code, commands = ran("It is nothing of the sort.")
    shown = capsys.readouterr().out
    assert code == 1 and "NOT FOUND" in shown
    assert [words[0] for words in commands] == ["convert", "finetune", "evaluate", "chat"]
    expected = shown.split("expected: ")[1].split()[0]
    assert ran(f"It is {expected}.")[0] == 0
    shown = capsys.readouterr().out
    assert "found" in shown and shown.count("  sparsek ") == 4


def test_the_document_is_as_long_as_the_context_and_its_fact_stands_early(ran, tmp_path):
    from transformers import AutoTokenizer

    _, commands = ran()
    question = commands[-1][commands[-1].index("--prompt") + 1]
    key = question.rstrip("?").split()[-1]
    document = (tmp_path / "runs/demo/document.txt").read_text(encoding="utf-8")
    assert document.count(key) == 1 and document.index(key) < 0.2 * len(document)
    length = len(AutoTokenizer.from_pretrained(hub.bundled().path)(document).input_ids)
    assert 0.95 * demo.LENGTHS[-1] < length < demo.LENGTHS[-1]


def test_what_is_measured_was_not_trained_on(ran, tmp_path):
    ran()
    train, [measured] = (
        [json.loads(line)["text"] for line in (tmp_path / f"runs/demo/{name}.jsonl").open()]
        for name in ("train", "validation")
    )
    sentences = {s for text in train for s in text.split(". ") if len(s) > 60}
    assert len(train) > 30 and len(sentences) > 300
    assert not [s for s in sentences if s in measured]
