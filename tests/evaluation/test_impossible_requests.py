"""What cannot be measured is refused, with what to do; what can be is measured beside it."""

import pytest

from sparsek_cli.errors import SparsekError, UsageError


def test_long_prompts_are_refused_with_their_number(run, recipe, console, tmp_path):
    with pytest.raises(
        UsageError, match=r"scrolls_qasper: \d of \d prompts are longer .* \(longest \d+\)"
    ):
        run(recipe(tasks=["scrolls_qasper"], max_length=100), console)
    assert not (tmp_path / "out").exists()


def test_absent_data_is_named_with_where_to_get_it(run, recipe, console):
    report = run(recipe(tasks=["scrolls"], baselines=[], limit=1), console)
    ran = {unit["task"] for unit in report["units"]}
    assert "scrolls_fairytaleqa" in ran  # stands in for the absent narrative_qa
    absent = {item["task"]: item for item in report["absent"]}
    assert set(absent) == {"scrolls_narrativeqa", "scrolls_qmsum", "scrolls_summscreenfd"}
    assert "huggingface.co" in absent["scrolls_qmsum"]["remedy"]


def test_nothing_to_evaluate_is_an_error(run, recipe, console):
    with pytest.raises(SparsekError, match="no data for scrolls_qmsum"):
        run(recipe(tasks=["scrolls_qmsum"]), console)


def test_lengths_beyond_the_model_are_refused(run, recipe, console):
    with pytest.raises(UsageError, match="--lengths 9999"):
        run(recipe(tasks=["ppl"], lengths=[9999]), console)


@pytest.mark.parametrize("task", ["recall_1", "ruler_niah_single_2"])
def test_a_length_too_short_for_a_task_leaves_the_others(run, recipe, console, task):
    settings = {"tasks": [task], "lengths": [150, 1200], "limit": 1, "baselines": []}
    report = run(recipe(**settings), console)
    assert [unit["length"] for unit in report["units"]] == [1200]
    [absent] = report["absent"]
    assert absent["task"] == f"{task}@150"
    assert "150 tokens are too short" in absent["reason"]
    assert absent["remedy"] == "name larger --lengths"


@pytest.mark.parametrize(
    "wish", [{"do_sample": True, "temperature": 0.7}, {"temperature": 0.7}, {"num_beams": 3}]
)
def test_answers_that_are_not_greedy_are_refused(run, recipe, console, monkeypatch, wish):
    """They would be written with a cache that no policy knows."""
    from sparsek_cli.evaluation.tasks import load_tasks

    real = load_tasks._load

    def wishing(entry, settings):
        task = real(entry, settings)
        if entry.name == "recall_1":
            del task.config.generation_kwargs["do_sample"]
            task.config.generation_kwargs.update(wish)
        return task

    monkeypatch.setattr(load_tasks, "_load", wishing)
    report = run(recipe(tasks=["recall_1", "ppl"], limit=1, baselines=["snapkv"]), console)
    assert {unit["task"] for unit in report["units"]} == {"ppl"}
    reasons = {item["task"]: item["reason"] for item in report["absent"]}
    assert "only greedy ones count" in reasons["recall_1@640"]


def test_more_tokens_than_learned_positions_are_refused(
    run, recipe, console, dense_checkpoint, capsys
):
    from sparsek_cli.console import Console

    gpt2 = dense_checkpoint("gpt2")
    settings = {"tasks": ["ppl"], "baselines": ["dense"], "limit": 1, "max_length": 3000}
    with pytest.raises(UsageError, match=r"--max-length 3000 is beyond the 512 positions"):
        run(recipe(**settings, model=str(gpt2)), console)
    run(recipe(**settings), Console())
    said = capsys.readouterr().err
    assert "--max-length 3000 is beyond the 2,048 tokens the model was made for" in said


def test_budgets_without_room_are_refused_before_data_is_read(run, recipe, console):
    with pytest.raises(UsageError, match="budget 28 is below") as caught:
        run(recipe(tasks=["scrolls_qmsum"], budgets=[64, 28]), console)
    assert "29 or more" in caught.value.hint


@pytest.mark.parametrize(
    ("row", "why"),
    [
        ('{"id": 1}', "not a SCROLLS row"),
        ("[" * 10**5, "not valid JSON"),
        ("[1]", "not a JSON object"),
        ('{"id": "1", "pid": "1", "input": 3, "output": "a"}', "'input' is no text"),
        (r'{"id": "1", "pid": "1", "input": "\ud83d", "output": "a"}', "half a surrogate pair"),
    ],
)
def test_broken_rows_are_named_with_file_and_line(run, recipe, console, tmp_path, row, why):
    folder = tmp_path / "broken" / "qasper"
    folder.mkdir(parents=True)
    (folder / "validation.jsonl").write_text(f"{row}\n")
    with pytest.raises(SparsekError, match=rf"validation.jsonl:1: .*{why}"):
        run(recipe(tasks=["scrolls_qasper"], data=str(tmp_path / "broken")), console)


@pytest.mark.parametrize("change", ["cut", "other", "latin1", "utf-16"])
def test_damaged_files_of_data_are_named(run, recipe, console, data, tmp_path, change):
    """Half of a .zst passed for the whole; other bytes than UTF-8 were told without a file."""
    import zstandard

    folder = tmp_path / "damaged" / "qasper"
    folder.mkdir(parents=True)
    text = (data / "qasper" / "validation.jsonl").read_text().replace("a", "é")
    # Two frames: all of the first can be read.
    packed = zstandard.compress(text.encode()) * 2
    name, content, why = {
        "cut": ("validation.jsonl.zst", packed[:-9], "cut short"),
        "other": ("validation.jsonl.zst", b"no frame", "not a readable .zst file"),
        "latin1": ("validation.jsonl", text.encode("latin1"), "not UTF-8 text: byte 0xe9"),
        "utf-16": (
            "validation.jsonl",
            text.encode("utf-16"),
            "not UTF-8 text: it begins as UTF-16",
        ),
    }[change]
    (folder / name).write_bytes(content)
    with pytest.raises(SparsekError, match=rf"{name} is {why}"):
        run(recipe(tasks=["scrolls_qasper"], data=str(tmp_path / "damaged")), console)


def test_a_mark_and_blank_lines_are_no_rows(run, recipe, console, data, tmp_path):
    folder = tmp_path / "marked" / "qasper"
    folder.mkdir(parents=True)
    text = (data / "qasper" / "validation.jsonl").read_text()
    (folder / "validation.jsonl").write_text(f"\ufeff{text}\n\n", encoding="utf-8")
    report = run(
        recipe(tasks=["scrolls_qasper"], data=str(tmp_path / "marked"), baselines=[]), console
    )
    assert report["units"][0]["samples"] == 4


def test_tasks_that_fit_run_beside_refused_ones(run, recipe, console):
    settings = {"tasks": ["scrolls_qasper", "ppl"], "baselines": [], "limit": 1}
    report = run(recipe(**settings, lengths=[200], max_length=200), console)
    assert {unit["task"] for unit in report["units"]} == {"ppl"}
    [refused] = report["absent"]
    assert refused["task"] == "scrolls_qasper"
    assert "--truncate" in refused["remedy"]
