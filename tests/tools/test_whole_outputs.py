"""What tools/kill_runs.py calls whole of what a killed run left."""

import json

import pytest

from kill_runs import Verb, wrong_with
from whole_outputs import digest_of_results, whole_results

UNIT = {"task": "ppl", "metrics": {"perplexity": float("nan")}}


@pytest.fixture
def out(tmp_path):
    return tmp_path / "out"


def write(folder, *units, complete=True):
    """A result folder with these units."""
    (folder / "units").mkdir(parents=True, exist_ok=True)
    for number, unit in enumerate(units):
        (folder / "units" / f"{number}.json").write_text(json.dumps(unit))
    report = {"units": units, "complete": complete}
    (folder / "results.json").write_text(json.dumps(report))


def test_a_score_that_is_no_number_is_equal_to_itself(out):
    write(out, UNIT, complete=False)
    assert whole_results(out, set())
    (out / "units" / "0.json").write_text(json.dumps(UNIT | {"task": "recall"}))
    assert not whole_results(out, set())


def test_results_that_are_to_replace_others_are_whole_too(out):
    write(out, UNIT)
    known = {digest_of_results(out)}
    part = out.with_name("out.part")
    write(part, UNIT, UNIT, complete=False)
    assert whole_results(out, known)
    (part / "units" / "1.json").write_text('{"task"')
    assert not whole_results(out, known)


@pytest.mark.parametrize("left", ["old", "new", "other", "unfinished", "no report"])
def test_what_is_replaced_is_the_old_one_or_the_new_one(left, out):
    verb = Verb("evaluate", [], digest_of_results, whole_results)
    old, new = UNIT, UNIT | {"task": "recall"}
    known = set()
    for unit in (new, old):
        write(out, unit)
        known.add(digest_of_results(out))
    if left == "new":
        write(out, new)
    elif left == "other":
        write(out, old, new)
    elif left == "unfinished":
        write(out, complete=False)
    elif left == "no report":
        (out / "results.json").unlink()
    wrong = wrong_with(verb, out, known, was_there=True)
    assert (wrong is None) == (left in ("old", "new"))
    first = wrong_with(verb, out, known, was_there=False)
    assert (first is None) == (left != "other"), "a first run may leave OUT unfinished"
