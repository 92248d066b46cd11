"""Hub datasets: read from a local copy, or named with how to place one, without asking the hub."""

import json
from pathlib import Path

import pytest

from sparsek_cli.errors import SparsekError


@pytest.fixture
def run():
    from verbs import evaluate

    return evaluate


def place(folder, repository, config, splits, rows):
    """A dataset repository as `hf download --local-dir` would leave it."""
    target = folder / repository
    (target / config).mkdir(parents=True)
    lines = "\n".join(json.dumps(row) for row in rows)
    for split in splits:
        (target / config / f"{split}.jsonl").write_text(lines, encoding="utf-8")
    files = [{"split": split, "path": f"{config}/{split}.jsonl"} for split in splits]
    block = json.dumps({"configs": [{"config_name": config, "data_files": files}]})
    (target / "README.md").write_text(f"---\n{block}\n---\n", encoding="utf-8")


def questions(count):
    """Rows as those of ARC."""
    return [
        {
            "id": str(i),
            "question": f"What is {i}?",
            "choices": {"text": ["this", "that", "it"], "label": ["A", "B", "C"]},
            "answerKey": "ABC"[i % 3],
        }
        for i in range(count)
    ]


@pytest.mark.slow
def test_a_local_copy_is_read(run, recipe, console, tmp_path):
    splits = ("train", "validation", "test")
    place(tmp_path / "sets", "allenai/ai2_arc", "ARC-Easy", splits, questions(5))
    report = run(
        recipe(tasks=["arc_easy"], data=str(tmp_path / "sets"), limit=3, baselines=[]), console
    )
    [unit] = report["units"]
    assert unit["samples"] == 3
    assert unit["proof"]["prompts"] == 9


def test_babilong_reads_the_length_it_is_asked_for(run, recipe, console, tmp_path):
    rows = [
        {"input": f"Ann went to the {place}.", "question": "Where is Ann?", "target": place}
        for place in ("hall", "shop")
    ]
    place(tmp_path / "sets", "RMT-team/babilong-1k-samples", "1k", ("qa1",), rows)
    settings = {"data": str(tmp_path / "sets"), "baselines": [], "limit": 2}
    report = run(recipe(tasks=["babilong"], lengths=[1024], **settings), console)
    assert [(u["task"], u["length"]) for u in report["units"]] == [("babilong_qa1", 1024)]
    assert {item["task"] for item in report["absent"]} == {f"babilong_qa{i}" for i in range(2, 6)}


@pytest.mark.parametrize(
    ("group", "repositories"),
    [
        ("longbench2", ["recursal/longbench-v2"]),
        ("babilong", ["RMT-team/babilong-1k-samples"]),
        ("infinitebench", ["xinrongzhang2022/InfiniteBench"]),
        ("short", ["Rowan/hellaswag", "openai/gsm8k"]),
    ],
)
def test_what_is_missing_is_named_with_how_to_place_it(run, recipe, console, group, repositories):
    with pytest.raises(SparsekError, match="is not in the hub's cache") as caught:
        run(recipe(tasks=[group], lengths=[], data=None), console)
    for repository in repositories:
        assert f"{repository} is not in the hub's cache" in caught.value.message
        assert f"--local-dir DIR/{repository}" in caught.value.hint


def test_longbench_names_the_packages_it_needs(run, recipe, console):
    pytest.importorskip("lm_eval")
    try:
        import jieba  # noqa: F401
    except ImportError:
        with pytest.raises(SparsekError) as caught:
            run(recipe(tasks=["longbench"], data=None), console)
        assert "pip install lm_eval[longbench]" in caught.value.hint


def test_scrolls_without_data_says_where_it_is_read_from(run, recipe, console):
    with pytest.raises(SparsekError, match="no data for scrolls_qasper") as caught:
        run(recipe(tasks=["scrolls_qasper"], data=None), console)
    assert "DIR/qasper/validation.jsonl" in caught.value.hint


def test_a_task_of_lm_evals_is_read_with_its_folder_alone(monkeypatch):
    """All 14,000 files of lm-eval were read for its name, which took seconds."""
    import lm_eval.tasks

    from sparsek_cli.evaluation.tasks import catalogue, lm_eval_names, load_tasks

    monkeypatch.setattr(lm_eval_names, "whole_index", None)
    found, real = [], lm_eval.tasks.TaskManager

    class Manager(real):
        def __init__(self, **options):
            super().__init__(**options)
            assert not options["include_defaults"]
            found.append(self.task_index)

    monkeypatch.setattr(lm_eval.tasks, "TaskManager", Manager)
    [entry] = catalogue.expand(["arc_easy"])
    assert Path(entry.folders[0]).name == "arc"
    with pytest.raises(load_tasks._DATA_ERRORS):  # the hub is not asked
        load_tasks._load(entry, {})
    assert found[-1]["arc_easy"].yaml_path.name == "arc_easy.yaml"


def test_a_group_without_data_is_one_line_and_one_hint(run, recipe, console):
    """Each of the seven said why, and each hint where it is read from."""
    with pytest.raises(SparsekError, match="scrolls_govreport, .*scrolls_contractnli: ") as caught:
        run(recipe(tasks=["scrolls"], data=None), console)
    assert caught.value.message.count("is not in the hub's cache") == 1
    assert caught.value.hint.count("--data DIR") == 1 and len(caught.value.hint) < 140


def test_a_task_has_as_many_examples_as_its_group_says(tmp_path):
    """Those of the Open LLM Leaderboard were measured without any."""
    from sparsek_cli.evaluation.tasks import catalogue, load_tasks
    from sparsek_cli.evaluation.tasks.hub_data import redirected

    splits = ("train", "validation", "test")
    place(tmp_path, "allenai/ai2_arc", "ARC-Challenge", splits, questions(30))
    [entry] = [e for e in catalogue.expand(["openllm"]) if e.name == "arc_challenge"]
    with redirected(str(tmp_path)):
        task = load_tasks._load(entry, {})
    task.build_all_requests(limit=1)
    assert task.instances[0].args[0].count("What is ") == 26
    assert task.get_config("num_fewshot") == 25
