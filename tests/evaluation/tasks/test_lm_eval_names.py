"""Tasks, groups and tags of lm-eval are found by name, and mean what lm-eval says."""

import random
from pathlib import Path

import pytest

from sparsek_cli.errors import UsageError
from sparsek_cli.evaluation.tasks import lm_eval_names
from sparsek_cli.evaluation.tasks.catalogue import catalogue, expand


@pytest.fixture
def no_whole_index(monkeypatch):
    monkeypatch.setattr(lm_eval_names, "whole_index", None)


def test_what_a_group_of_ours_lists_can_be_named_by_itself(no_whole_index):
    """`--list` showed it, and `--tasks` called it unknown: its name resembles the group's."""
    for inside in expand([entry.name for entry in catalogue().values() if entry.is_group]):
        [alone] = expand([inside.name])
        assert (alone.name, alone.lengths, alone.extra, alone.chat, alone.settings) == (
            inside.name, inside.lengths, inside.extra, inside.chat, inside.settings,
        )  # fmt: skip


@pytest.mark.parametrize("name", ["longbench_trec_e", "babilong_qa6", "longbench2_tasks"])
def test_what_only_lm_eval_lists_is_known_beside_a_group_of_ours(name, no_whole_index):
    group = catalogue()[name.split("_")[0]]
    for entry in expand([name]):
        assert (entry.lengths, entry.extra) == (group.lengths, group.extra)
        assert [Path(folder).name for folder in entry.folders] == list(group.folders)


def test_a_group_of_tags_costs_no_whole_index(no_whole_index):
    found = expand(["mmlu"])
    assert len(found) == len(set(found)) == 57
    assert {Path(entry.folders[0]).name for entry in found} == {"default"}
    assert not any(entry.settings for entry in found)


def test_groups_within_a_groups_file_are_opened(no_whole_index):
    """It was an AttributeError: a list has no split."""
    names = [entry.name for entry in expand(["mmlu_continuation"])]
    assert len(names) == 57 and names[0] == "mmlu_abstract_algebra_continuation"


@pytest.mark.parametrize("name", ["flan_held_in", "t0_eval"])
def test_tasks_within_a_groups_file_are_refused(name, no_whole_index):
    with pytest.raises(UsageError, match="within itself") as refused:
        expand([name])
    assert "files of their own" in refused.value.hint


def test_a_group_says_how_many_examples_its_tasks_have(no_whole_index):
    """All but one of the Open LLM Leaderboard's were measured without any."""
    entries = {entry.name: entry for entry in expand(["openllm"])}
    shots = {name: entry.settings.get("num_fewshot") for name, entry in entries.items()}
    wanted = {"arc_challenge": 25, "hellaswag": 10, "winogrande": 5, "mmlu_anatomy": 5}
    assert wanted.items() <= shots.items()
    assert entries["gsm8k"] == expand(["gsm8k"])[0]  # its own file says five, too
    with pytest.raises(UsageError, match="num_fewshot=25, and .* with its own settings"):
        expand(["short", "openllm"])


def test_a_group_that_changes_more_is_refused(monkeypatch):
    index = lm_eval_names._index_of(lm_eval_names.tasks_folder() / "arc")
    config = {"group": "hard", "task": ["arc_easy"], "metric_list": [{"metric": "bleu"}]}
    monkeypatch.setattr(lm_eval_names, "find", index.get)
    with pytest.raises(UsageError, match="measures 'arc_easy' with another metric_list"):
        list(lm_eval_names._members("hard", config, {}))
    same = config | {"metric_list": index["arc_easy"].cfg["metric_list"]}
    assert [task.settings for task in lm_eval_names._members("hard", same, {})] == [{}]


def test_only_folders_of_lm_evals_are_looked_into_for_a_name(monkeypatch):
    looked = []
    monkeypatch.setattr(lm_eval_names, "_index_of", lambda folder: looked.append(folder) or {})
    for name in ("/", "..", "", ".", "../arc", "/_etc", "arc_hard_er"):
        assert lm_eval_names.in_its_folder(name) is None
    assert [folder.name for folder in looked] == ["arc"]


def test_a_tags_tasks_are_looked_for_in_all_folders(tmp_path, monkeypatch):
    for folder, file, text in (
        ("fruit", "apple.yaml", "task: apple\ntag: fruit\n"),
        ("trees", "pear.yaml", "include: ../shared\ntask: pear\n"),
        ("trees", "oak.yaml", "task: oak\ntag: fruits\n"),
        (".", "shared", "include: trees/again\n"),
        ("trees", "again", "include: ../shared_too\n"),
        (".", "shared_too", "tag:\n  - green\n  - fruit\n"),
        ("trees", "circle.yaml", "include: circle.yaml\ntask: circle\n"),
    ):
        (tmp_path / folder).mkdir(exist_ok=True)
        (tmp_path / folder / file).write_text(text, encoding="utf-8")
    monkeypatch.setattr(lm_eval_names, "tasks_folder", lambda: tmp_path)
    caches = (lm_eval_names._files, lm_eval_names._where_it_is_said)
    for cache in caches:
        cache.cache_clear()
    try:
        assert [task.name for task in lm_eval_names.tasks_of("fruit")] == ["apple", "pear"]
        with pytest.raises(KeyError):
            lm_eval_names.tasks_of("plum")
    finally:
        for cache in caches:
            cache.cache_clear()


@pytest.mark.slow
def test_names_are_those_of_the_whole_index():
    whole = lm_eval_names.whole_index()
    names = random.Random(0).sample(sorted(whole), 20)
    names += [name for name in sorted(whole) if whole[name].kind.name == "TAG"][::40]
    for name in names:
        found, wanted = lm_eval_names.find(name), whole[name]
        assert (found.kind, found.yaml_path, found.tags) == (
            wanted.kind, wanted.yaml_path, wanted.tags,
        ), name  # fmt: skip
