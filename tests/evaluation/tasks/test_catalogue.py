"""Listing and naming tasks needs neither lm-eval nor torch."""

import json
import subprocess
import sys

import pytest

import sparsek_cli as sparsek
from sparsek_cli.errors import UsageError
from sparsek_cli.evaluation.plan import plan
from sparsek_cli.evaluation.tasks.catalogue import catalogue, check_limits, expand
from sparsek_cli.evaluation.tasks.listing import listing, listing_data
from sparsek_cli.recipes.schema_evaluate import EvaluateRecipe


def test_every_entry_says_what_a_reader_needs():
    for entry in catalogue().values():
        assert entry.summary, entry.name
        assert entry.metric, entry.name
        assert entry.data, entry.name
        assert entry.source, entry.name


def test_groups_name_tasks_that_exist():
    for entry in catalogue().values():
        for member in entry.members:
            assert member in catalogue() or entry.folders, f"{entry.name}: {member}"


def test_list_shows_every_name():
    shown = listing()
    assert all(item["name"] in shown for item in listing_data())


def test_expand_opens_groups_once_and_in_order():
    names = [entry.name for entry in expand(["recall", "ppl", "recall_4"])]
    assert names == ["recall_1", "recall_4", "recall_16", "ppl"]


@pytest.mark.parametrize(("wrong", "right"), [("scrols", "scrolls"), ("recall4", "recall_4")])
def test_unknown_task_names_the_nearest(wrong, right):
    with pytest.raises(UsageError, match=f"unknown task '{wrong}'") as caught:
        expand([wrong])
    assert right in caught.value.hint


@pytest.mark.parametrize(
    ("name", "says", "hint"),
    [
        ("recall", "'recall' is a group", "name its tasks: recall_1, recall_4, recall_16"),
        ("recal_1", "'recal_1' is not measured", "did you mean 'recall_1'?"),
        ("mmlu", "'mmlu' is not measured", "name one of the tasks"),
    ],
)
def test_limits_of_nothing_are_refused(checkpoints, name, says, hint):
    """They counted for nothing: all samples were measured."""
    with pytest.raises(UsageError, match=f"limits: {says}") as refused:
        sparsek.evaluate(str(checkpoints[1]), tasks=["recall"], limits={name: 1})
    assert refused.value.hint == hint


def test_limits_of_a_recipe_may_be_of_other_tasks():
    check_limits({"ppl": 2, "recall_16": 4, "gsm8k": 9}, expand(["recall_1"]))


@pytest.mark.parametrize(
    ("settings", "says", "drop"),
    [
        (
            {"tasks": ["scrolls_qasper"], "lengths": [64]},
            "lengths: 64 would count",
            {"lengths": []},
        ),
        ({"tasks": ["scrolls"], "lengths": [64, 128]}, "of scrolls_govreport and 6 more", {}),
        ({"tasks": ["hellaswag"], "lengths": [64]}, "prompts of hellaswag are as long", {}),
        ({"tasks": ["scrolls_qasper"], "text": ["a.txt"]}, "text: a.txt would", {"text": []}),
        ({"tasks": ["longbench", "ruler_qa_squad"], "text": ["a.txt"]}, "text: a.txt would", {}),
    ],
)
def test_what_no_task_takes_is_refused(checkpoints, settings, says, drop):
    """It was ignored without a word."""
    asked = EvaluateRecipe(model=str(checkpoints[1]), **settings)
    with pytest.raises(UsageError, match=says) as refused:
        plan(asked)
    assert f"--{next(key for key in settings if key != 'tasks')}" in refused.value.hint
    if drop:
        assert plan(asked.model_copy(update=drop))


def test_a_dry_run_says_which_tasks_take_no_length(checkpoints):
    asked = EvaluateRecipe(model=str(checkpoints[1]), tasks=["ppl", "scrolls_qasper"], lengths=[64])
    assert "lengths    64; as long as the data: scrolls_qasper\n" in plan(asked).text()
    assert "as long" not in plan(asked.model_copy(update={"tasks": ["ppl"]})).text()


def test_list_imports_nothing_heavy():
    code = (
        "import sys; from sparsek_cli.app import app\n"
        "try: app(['evaluate', '--list', '--json'])\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'transformers', 'lm_eval', 'datasets', 'numpy'}\n"
        "print(sorted(heavy & set(sys.modules)), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr.strip() == "[]"
    assert {"scrolls", "recall", "ppl"} <= {item["name"] for item in json.loads(done.stdout)}
