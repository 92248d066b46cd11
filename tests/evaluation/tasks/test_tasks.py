"""The recall variants and the ppl passages say what their names promise."""

import copy
import json
import shutil

import pytest

import sparsek_cli as sparsek
from sparsek_cli.evaluation.tasks.catalogue import catalogue


@pytest.fixture
def load(checkpoints, data):
    def rows(name, length=1400, count=8, **settings):
        from sparsek_cli.evaluation.tasks import ppl, recall

        module = ppl if name == "ppl" else recall
        keys = {"tokenizer": str(checkpoints[0]), "data": str(data), "limit": count, "chat": True}
        block = catalogue()[name].extra
        found = module.dataset(**keys | settings, max_seq_lengths=[length], sparsek=block)
        return list(found["test"])

    return rows


def test_passages_have_their_length(load, tokenizer):
    for row in load("ppl", length=500, count=5):
        assert row["tokens"] == len(tokenizer(row["text"])["input_ids"])
        assert 484 <= row["tokens"] <= 500


def test_facts_stand_in_the_text_and_answers_do_not_follow_the_question(load):
    for row in load("recall_4"):
        document, question = row["prompt"].rsplit("\n\n", 1)
        assert question == row["question"]
        assert row["value"] in document
        assert row["value"] not in question
        assert len(row["prompt"]) <= 1400


def test_questions_of_one_document_share_all_of_it(load):
    rows = load("recall_4")
    assert len({row["document"] for row in rows}) == 2
    assert len({row["prompt"].rsplit("\n\n", 1)[0] for row in rows}) == 2


def test_limit_only_cuts(load):
    assert load("recall_4", count=3) == load("recall_4", count=8)[:3]


def test_start_puts_facts_at_the_start(load):
    assert all(row["depth"] <= 0.02 for row in load("recall_start"))


def test_unseen_uses_phrasings_nobody_saw(load):
    assert {row["split"] for row in load("recall_unseen")} == {"unseen"}


def test_turns_repeat_earlier_questions_with_their_answers(load):
    rows = load("recall_turns")[:4]
    assert [row["turn"] for row in rows] == [0, 1, 2, 3]
    for earlier, later in zip(rows, rows[1:], strict=False):
        assert earlier["answer"] in later["prompt"]
        assert later["prompt"].startswith(earlier["prompt"][: earlier["prompt"].rindex("user")])


@pytest.mark.parametrize("baselines", [["snapkv"], ["kvzip"]])
def test_turns_stand_in_the_chat_template_once_or_not_at_all(
    checkpoints, tokenizer, tmp_path, baselines
):
    """With chat_template=on the whole conversation was one turn of another, with off it stayed."""
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = (
        "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] | trim }}{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    shutil.copytree(checkpoints[1], tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    settings = {"tasks": ["recall_turns"], "lengths": [900], "limit": 2, "device": "cpu"}
    settings |= {"baselines": baselines, "max_new_tokens": 2}
    ends = {}
    for wanted in ("auto", "on", "off"):
        out = tmp_path / wanted
        done = sparsek.evaluate(tmp_path / "model", out, chat_template=wanted, **settings)
        assert {u["chat_template"] for u in done.report["units"]} == {wanted != "off"}
        lines = (out / "samples" / "sparsek" / "recall_turns@900.jsonl").read_text().splitlines()
        ends[wanted] = [json.loads(line)["prompt_end"] for line in lines]
    assert ends["auto"] == ends["on"] and ends["on"][1].count("[assistant]") == 2
    assert not any("[" in end for end in ends["off"])


def test_turns_without_a_chat_template(load, checkpoints, tmp_path):
    from transformers import AutoTokenizer

    plain = AutoTokenizer.from_pretrained(checkpoints[0])
    plain.chat_template = None
    plain.save_pretrained(tmp_path)
    rows = load("recall_turns", tokenizer=str(tmp_path), chat=False)
    assert rows[1]["prompt"].endswith(f"Question: {rows[1]['question']}\nAnswer: It is")
    assert f"Answer: It is {rows[0]['value']}." in rows[1]["prompt"]


@pytest.mark.parametrize(
    ("reply", "exact", "contains"),
    [
        ("It is anchor.", 1.0, 1.0),
        (" anchor.\nmore", 1.0, 1.0),
        ("It is the anchor, surely.", 0.0, 1.0),
        ("It is anchors.", 0.0, 0.0),
        ("", 0.0, 0.0),
    ],
)
def test_recall_scores(reply, exact, contains):
    from sparsek_cli.evaluation.tasks.recall import process_results

    doc = {"answer": "It is anchor.", "value": "anchor", "split": "unseen"}
    scores = process_results(doc, [reply])
    assert scores == {"exact": exact, "contains": contains, "exact_heldout": exact}
    assert process_results(doc | {"split": "calibration"}, [reply])["exact_heldout"] is None


def test_mean_of_given_leaves_out_what_is_not_there():
    from sparsek_cli.evaluation.tasks.recall import mean_of_given

    assert mean_of_given([1.0, None, 0.0, None]) == 0.5
    assert mean_of_given.standard_error([1.0, None, 0.0]) == 0.5
    assert mean_of_given([None]) != mean_of_given([None])


def test_scrolls_metric_takes_the_best_reference():
    from sparsek_cli.evaluation.tasks.scrolls import LocalMetric

    metric = LocalMetric("qasper")
    both = metric.compute(predictions=["the red car"], references=[["A blue bus", "red car!"]])
    assert both == {"f1": 100.0}
    half = metric.compute(predictions=["red bus", ""], references=[["red car"], ["x"]])
    assert half == {"f1": 25.0}
    rouge = LocalMetric("qmsum").compute(predictions=["a b c d"], references=[["a b c d"]])
    assert rouge == {"rouge/rouge1": 100.0, "rouge/rouge2": 100.0, "rouge/rougeL": 100.0}


def test_transformers_is_left_as_it_was():
    import sys

    import sparsek_cli.evaluation.tasks.scrolls  # noqa: F401

    assert "transformers.data.metrics.squad_metrics" not in sys.modules


@pytest.mark.parametrize("words", [1600, 4000])
def test_passages_of_a_short_document_differ(words, tokenizer, checkpoints, tmp_path):
    """A document of one and a half passages was once cut at its start every time."""
    from sparsek_cli.evaluation.tasks import ppl

    text = " ".join(f"{'word' if n % 3 else 'other'} {n}" for n in range(words))
    file = tmp_path / "one.jsonl"
    file.write_text(json.dumps({"text": text}) + "\n", encoding="utf-8")
    tokens = len(tokenizer(text)["input_ids"])
    length = int(tokens / 1.5)
    name = str(checkpoints[0])
    rows = ppl.dataset(
        tokenizer=name, max_seq_lengths=[length], text=[str(file)], limit=3,
        sparsek={"documents": 3},
    )["test"]  # fmt: skip
    assert len(rows) == 3
    assert len(set(rows["text"])) == 3
    assert all(length - 16 <= count <= length for count in rows["tokens"])


def test_a_passage_as_long_as_its_document_counts_once(tokenizer, checkpoints, tmp_path):
    from sparsek_cli.evaluation.tasks import ppl

    text = " ".join(f"word {n}" for n in range(900))
    (tmp_path / "one.txt").write_text(text, encoding="utf-8")
    length = len(tokenizer(text)["input_ids"])
    rows = ppl.dataset(
        tokenizer=str(checkpoints[0]), max_seq_lengths=[length], limit=4,
        text=[str(tmp_path / "one.txt")], sparsek={"documents": 4},
    )["test"]  # fmt: skip
    assert rows["text"] == [text]


def test_facts_are_hidden_in_the_text_as_it_is_now(load, tmp_path):
    """In one process it was the text as it had been at first."""
    text = tmp_path / "text.txt"
    for word in ("boat", "goat"):
        text.write_text(f"The {word} is here. " * 300)
        [row] = load("recall_1", count=1, text=[str(text)])
        assert f"The {word} is here." in row["prompt"]
