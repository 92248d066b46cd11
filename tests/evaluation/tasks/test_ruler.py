"""RULER samples: they fit, hold their answers, come back from the cache, and are scored."""

import json
import shutil

import pytest

from sparsek_cli.errors import SparsekError
from sparsek_cli.evaluation.tasks.catalogue import catalogue, expand
from sparsek_cli.evaluation.tasks.ruler import process_results

LENGTH = 1500  # characters, for the tests' tokenizer


@pytest.fixture
def load(checkpoints, data, tmp_path, monkeypatch):
    from sparsek_cli.evaluation.tasks import ruler

    monkeypatch.setenv("SPARSEK_CACHE_DIR", str(tmp_path / "cache"))
    words = {
        name: catalogue()[name].extra for name in catalogue() if "maker" in catalogue()[name].extra
    }

    def rows(name, count=3, length=LENGTH, **settings):
        keys = {"tokenizer": str(checkpoints[0]), "data": str(data), "limit": count, "seed": 0}
        sparsek = {"questions": 100} | words[name]
        found = ruler.dataset(**keys | settings, max_seq_lengths=[length], sparsek=sparsek)
        return list(found["test"])

    return rows


@pytest.mark.parametrize("name", [e.name for e in expand(["niah", "ruler_vt", "ruler_fwe"])])
def test_samples_fit_and_hold_their_answers(load, name):
    length = 2600 if name == "ruler_vt" else LENGTH
    answer = catalogue()[name].extra["answer"]
    rows = load(name, length=length)
    assert len({row["input"] for row in rows}) == 3
    for row in rows:
        used = len(row["input"]) + 1 + len(row["gen_prefix"]) + answer
        assert length * 0.6 < used <= length
        assert all(text in row["input"] for text in row["outputs"])
        assert process_results(row, [" ".join(row["outputs"])]) == {"score": 1.0}
        assert process_results(row, ["none of it"]) == {"score": 0.0}


def test_common_words_are_the_most_common(load):
    from collections import Counter

    [row] = load("ruler_cwe", count=1, length=4000)
    counts = Counter(word for word in row["input"].split() if word.isalpha())
    listed = [word for word, _ in counts.most_common() if word in row["outputs"]]
    assert len(row["outputs"]) == 10
    assert {counts[word] for word in listed} <= {6, 7}


def test_the_chain_leads_back_to_the_value(load):
    [row] = load("ruler_vt", count=1, length=2600)
    text = row["input"].rsplit("Memorize and track", 1)[1]
    first, *rest = row["outputs"]
    value = row["gen_prefix"].split("value ")[1].split(",")[0]
    assert f"VAR {first} = {value}" in text
    for name, before in zip(rest, row["outputs"], strict=False):
        assert f"VAR {name} = VAR {before}" in text


def test_needle_depth_is_where_it_stands(load):
    for row in load("ruler_niah_single_2"):
        assert row["input"].index(row["outputs"][0]) / len(row["input"]) == pytest.approx(
            row["depth"], abs=0.25
        )


def test_second_time_comes_from_the_cache(load, monkeypatch):
    from sparsek_cli.evaluation.tasks import ruler

    first = load("ruler_niah_multivalue")
    monkeypatch.setattr(ruler, "_haystack", None)  # making samples would now fail
    assert load("ruler_niah_multivalue") == first
    assert load("ruler_niah_multivalue", count=2) == first[:2]


def test_more_samples_keep_the_first_ones(load):
    assert load("ruler_niah_single_1", count=4)[:2] == load("ruler_niah_single_1", count=2, seed=0)


def test_samples_are_those_of_one_thread(load, tmp_path, monkeypatch):
    from sparsek_cli.evaluation.tasks import ruler

    many = load("ruler_niah_multikey_1", count=12)
    monkeypatch.setattr(ruler, "MAKERS_AT_ONCE", 1)
    monkeypatch.setenv("SPARSEK_CACHE_DIR", str(tmp_path / "another"))
    assert load("ruler_niah_multikey_1", count=12) == many
    with pytest.raises(SparsekError, match="64 tokens are too short for a sample") as caught:
        load("ruler_niah_multikey_1", length=64)
    assert caught.value.hint == "name larger --lengths"


def test_partial_answers_score_in_part():
    doc = {"outputs": ["Alpha", "beta"]}
    assert process_results(doc, ["it is ALPHA\nand gamma"]) == {"score": 0.5}


def test_questions_from_local_files(checkpoints, tmp_path):
    import json

    from sparsek_cli.evaluation.tasks.ruler_qa import dataset
    from sparsek_cli.evaluation.tasks.ruler_qa import process_results as score

    (tmp_path / "squad").mkdir()
    rows = [
        {"question": f"Who is {i}?", "answers": [f"n{i}", "x"], "documents": [f"n{i} " * 20]}
        for i in range(30)
    ]
    lines = "\n".join(map(json.dumps, rows))
    (tmp_path / "squad" / "validation.jsonl").write_text(lines, encoding="utf-8")
    block = catalogue()["ruler_qa_squad"].extra
    keys = {"tokenizer": str(checkpoints[0]), "data": str(tmp_path), "limit": 3, "sparsek": block}
    made = list(dataset(**keys, max_seq_lengths=[LENGTH])["test"])
    assert [row["outputs"][0] for row in made] == ["n0", "n1", "n2"]
    for number, row in enumerate(made):
        assert f"n{number} n{number}" in row["input"]
        assert LENGTH * 0.6 < len(row["input"]) <= LENGTH - 32
    assert score(made[1], ["It is N1."]) == {"score": 1.0}
    assert score(made[1], ["It is n2."]) == {"score": 0.0}
    for bad, why in [
        ("[" * 10**5, "not valid JSON"),
        (json.dumps(rows[0] | {"documents": "one text"}), "'documents' is no list of texts"),
        (json.dumps(rows[0] | {"question": None}), "not a question"),
        (json.dumps(rows[0] | {"answers": ["\ud83d"]}), "half a surrogate pair"),
    ]:
        (tmp_path / "squad" / "validation.jsonl").write_text(bad, encoding="utf-8")
        with pytest.raises(SparsekError, match=rf"validation.jsonl:1: .*{why}"):
            dataset(**keys, max_seq_lengths=[LENGTH])


def test_needles_are_measured_end_to_end(recipe, console, tmp_path, monkeypatch, figures):
    from verbs import evaluate

    monkeypatch.setenv("SPARSEK_CACHE_DIR", str(tmp_path / "cache"))
    settings = {"tasks": ["ruler_niah_single_2"], "baselines": ["dense"], "lengths": [LENGTH]}
    report = evaluate(recipe(**settings, limit=2), console)
    assert [unit["policy"] for unit in report["units"]] == ["dense", "sparsek"]
    assert all(len(unit["by_depth"]) == unit["samples"] == 2 for unit in report["units"])
    assert (tmp_path / "out" / "recall_by_depth.png").is_file()


def test_text_that_was_changed_since_is_read_again(load, tmp_path):
    """In one process samples of the text before were measured, and kept on disk as of the new."""
    text = tmp_path / "text.txt"
    for word in ("boat", "goat"):
        text.write_text(f"The {word} is here. " * 300)
        [row] = load("ruler_niah_single_2", count=1, text=[str(text)])
        assert f"The {word} is here." in row["input"]


def test_a_tokenizer_that_was_changed_since_is_another(load, checkpoints, tmp_path):
    """Prompts were as long as another's ids; of the same words it had the same file on disk."""
    model = shutil.copytree(checkpoints[0], tmp_path / "model")
    kept = {"tokenizer": str(model), "count": 1}
    [short] = load("ruler_niah_single_1", **kept)
    file = model / "tokenizer.json"
    found = json.loads(file.read_text())
    found["pre_tokenizer"] = {"type": "Split", "pattern": {"String": "e"}, "behavior": "Removed",
                              "invert": False}  # fmt: skip
    file.write_text(json.dumps(found))
    [long] = load("ruler_niah_single_1", **kept)
    assert len(long["input"]) > len(short["input"])
