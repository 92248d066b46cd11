"""A run's folder: proof in the results, resume, refusals, reports."""

import errno
import json

import pytest

from sparsek_cli.errors import SparsekError, UsageError


def without_times(folder):
    report = json.loads((folder / "results.json").read_text())
    return {key: value for key, value in report.items() if key != "timings"}


@pytest.fixture
def run():
    from verbs import evaluate

    return evaluate


def test_result_folder(run, recipe, console, tmp_path, figures):
    report = run(recipe(tasks=["ppl", "recall_4"], baselines=["dense", "window"]), console)
    out = tmp_path / "out"
    assert report["policies"] == ["dense", "sparsek", "window"]
    assert len(report["units"]) == 6
    assert report["environment"]["versions"]["lm_eval"]
    for unit in report["units"]:
        proof = unit["proof"]
        sparse = unit["policy"] != "dense"
        assert bool(proof["sparse_calls"]) == sparse
        assert proof["backends"] == ({"pytorch": proof["sparse_calls"]} if sparse else {})
        assert proof["kv_bytes"] > 0
        assert (proof["kept_share"] < 0.2) == sparse
        samples = out / "samples" / unit["policy"] / f"{unit['task']}@{unit['length']}.jsonl"
        lines = [json.loads(line) for line in samples.read_text().splitlines()]
        assert len(lines) == unit["samples"] == 4
        assert all(line["prompt_end"] or unit["task"] == "ppl" for line in lines)
    for name in ("loss_by_position.png", "loss_by_position.svg", "report.md"):
        assert (out / name).stat().st_size > 200
    assert not [p for p in out.rglob("*.part")]
    table = (out / "report.md").read_text()
    assert "| ppl | 640 | 4 |" in table
    assert "KV cache" in table


def test_held_out_questions_are_counted_by_themselves(run, recipe, console, tmp_path):
    report = run(recipe(tasks=["recall_4"], baselines=[], limit=12), console)
    lines = (tmp_path / "out" / "samples" / "sparsek" / "recall_4@640.jsonl").read_text()
    docs = [json.loads(line)["doc"] for line in lines.splitlines()]
    held_out = sum(doc["split"] != "calibration" for doc in docs)
    assert 0 < held_out < len(docs) == 12
    metrics = report["units"][0]["metrics"]
    assert metrics["exact"]["samples"] == 12
    assert metrics["exact_heldout"]["samples"] == held_out
    table = (tmp_path / "out" / "report.md").read_text()
    assert f"| recall_4 | 640 | {held_out} | exact_heldout |" in table


def test_dense_loss_by_position_is_the_ppl(run, recipe, console):
    import math

    report = run(recipe(tasks=["ppl"], baselines=["dense"]), console)
    [unit] = [u for u in report["units"] if u["policy"] == "dense"]
    curve = unit["loss_by_position"]["loss"]
    assert math.exp(sum(curve) / len(curve)) == pytest.approx(
        unit["metrics"]["ppl"]["value"], rel=1e-3
    )


def test_resume_after_a_crash_gives_the_same_results(run, recipe, console, tmp_path, monkeypatch):
    from sparsek_cli.evaluation import run as module

    settings = {"tasks": ["ppl", "recall_1"], "limit": 2, "baselines": ["dense"]}
    run(recipe(**settings), console)
    whole = without_times(tmp_path / "out")

    out = tmp_path / "again"
    real, calls = module.run_unit, []

    def crashing(unit, policy, *rest, **limits):
        calls.append((unit.name, policy.label))
        if len(calls) == 3:
            raise SystemExit("killed")
        return real(unit, policy, *rest, **limits)

    monkeypatch.setattr(module, "run_unit", crashing)
    with pytest.raises(SystemExit):
        run(recipe(**settings, out=str(out)), console)
    (out / ".results.json.999.part").write_text("half of", encoding="utf-8")
    run(recipe(**settings, out=str(out)), console, resume=True)
    assert len(calls) == 3 + 2  # four units: two done before the crash, two after it
    resumed = without_times(out)
    whole["recipe"].pop("out"), resumed["recipe"].pop("out")
    assert resumed == whole


@pytest.mark.parametrize("write", [3, 4, 7])
def test_resume_after_a_full_disk(run, recipe, console, tmp_path, monkeypatch, write):
    """While samples, a result, or the table of all is written; the folder's own mark is first."""
    from sparsek_cli import disk
    from sparsek_cli.evaluation import run as module
    from sparsek_cli.evaluation.report import store

    settings = {"tasks": ["ppl"], "limit": 1, "baselines": ["dense"], "out": str(tmp_path / "out")}
    units, writes, real = [], [], module.run_unit

    def counted(*args, **limits):
        units.append(1)
        return real(*args, **limits)

    def full(file, content):
        writes.append(file.name)
        if len(writes) == write:
            raise OSError(errno.ENOSPC, "No space left on device", str(file))
        disk.write_atomically(file, content)

    monkeypatch.setattr(module, "run_unit", counted)
    with monkeypatch.context() as patch:
        patch.setattr(store, "write_atomically", full)
        patch.setattr(module, "write", full)
        with pytest.raises(SparsekError, match="the disk is full; what is finished") as refusal:
            run(recipe(**settings), console)
    assert "--resume" in refusal.value.hint
    report = run(recipe(**settings), console, resume=True)  # as hinted
    assert report["complete"] and len(report["units"]) == 2
    assert len(units) == {3: 3, 4: 2, 7: 2}[write], writes


def test_other_settings_in_the_same_folder_are_refused(run, recipe, console):
    small = {"tasks": ["ppl"], "limit": 1, "baselines": []}
    run(recipe(**small), console)
    with pytest.raises(UsageError, match="other settings"):
        run(recipe(**small, seed=1), console)
    run(recipe(**small, seed=1), console, overwrite=True)


def test_results_are_not_measured_again_unasked(run, recipe, console, tmp_path):
    small = {"tasks": ["ppl"], "limit": 1, "baselines": []}
    run(recipe(**small), console)
    [unit] = (tmp_path / "out").glob("units/*/*.json")
    written = unit.stat().st_mtime_ns
    with pytest.raises(UsageError, match="holds 1 results of this very run") as caught:
        run(recipe(**small), console)
    assert "--resume" in caught.value.hint
    assert unit.stat().st_mtime_ns == written
    run(recipe(**small), console, overwrite=True)
    assert unit.stat().st_mtime_ns > written


def test_a_folder_in_which_nothing_was_finished_is_used_again(run, recipe, console, monkeypatch):
    from sparsek_cli.evaluation import run as module

    def failing(*args, **limits):
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patch, pytest.raises(RuntimeError):
        patch.setattr(module, "run_unit", failing)
        run(recipe(tasks=["ppl"], limit=1), console)
    assert run(recipe(tasks=["ppl"], limit=1, baselines=[]), console)["complete"]


def test_output_that_is_a_file(run, recipe, console, tmp_path):
    (tmp_path / "out").write_text("precious")
    with pytest.raises(UsageError, match="is a file"):
        run(recipe(tasks=["ppl"], limit=1, baselines=[]), console)


def test_resuming_says_what_is_there_and_counts_only_the_rest(run, recipe, tmp_path, capsys):
    from sparsek_cli.console import Console

    totals = []

    class Counting(Console):
        def progress(self, description, total=None):
            totals.append(total)
            return super().progress(description, total)

    settings = {"tasks": ["ppl"], "limit": 2, "baselines": ["window"]}
    run(recipe(**settings), Counting())
    next((tmp_path / "out").glob("units/window/*.json")).unlink()
    run(recipe(**settings), Counting(), resume=True)
    assert "resuming: 1 of 2 results are in" in capsys.readouterr().err
    assert totals == [4, 2]


def test_a_folder_of_something_else_is_left_alone(run, recipe, console, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("precious")
    with pytest.raises(UsageError, match="is not a result folder of evaluate"):
        run(recipe(tasks=["ppl"], limit=1), console)
    assert (tmp_path / "out" / "thesis.txt").read_text() == "precious"


def test_long_prompts_are_refused_with_their_number(run, recipe, console, tmp_path):
    with pytest.raises(
        UsageError, match=r"scrolls_qasper: \d of \d prompts are longer .* \(longest \d+\)"
    ):
        run(recipe(tasks=["scrolls_qasper"], max_length=100), console)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("how", ["left", "middle"])
def test_cut_prompts_are_counted(run, recipe, console, how):
    settings = {"tasks": ["scrolls_qasper", "scrolls_quality"], "baselines": []}
    report = run(recipe(**settings, max_length=100, truncate=how), console)
    for unit in report["units"]:
        proof = unit["proof"]
        assert proof["truncated_prompts"] == proof["prompts"] > 0
        assert proof["truncated_tokens"] > 100
        assert proof["kv_tokens"] <= 100


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


def test_broken_rows_are_named_with_file_and_line(run, recipe, console, tmp_path):
    folder = tmp_path / "broken" / "qasper"
    folder.mkdir(parents=True)
    (folder / "validation.jsonl").write_text('{"id": 1}\n')
    with pytest.raises(SparsekError, match=r"validation.jsonl:1: not a SCROLLS row"):
        run(recipe(tasks=["scrolls_qasper"], data=str(tmp_path / "broken")), console)


def test_zst_data_loads(run, recipe, console, data, tmp_path):
    import zstandard

    folder = tmp_path / "packed" / "qasper"
    folder.mkdir(parents=True)
    plain = (data / "qasper" / "validation.jsonl").read_bytes()
    (folder / "validation.jsonl.zst").write_bytes(zstandard.compress(plain))
    report = run(
        recipe(tasks=["scrolls_qasper"], data=str(tmp_path / "packed"), baselines=[]), console
    )
    assert report["units"][0]["samples"] == 4


@pytest.mark.parametrize("name", ["tiny", "demo", "ruler"])
def test_recipe_file_names_every_key(name):
    from sparsek_cli.recipes.load import load_recipe
    from sparsek_cli.recipes.schema_evaluate import EvaluateRecipe
    from sparsek_cli.recipes.shipped import recipe_folder
    from sparsek_cli.recipes.yaml_lines import read_yaml

    tree, _ = read_yaml(recipe_folder() / f"{name}.evaluate.yaml")
    assert set(tree) == set(EvaluateRecipe.model_fields)
    loaded = load_recipe(EvaluateRecipe, name, ["limit=3"], {"tasks": "ppl"}, verb="evaluate")
    lengths = [8192] if name == "demo" else [4096, 8192]
    assert (loaded.limit, loaded.tasks, loaded.lengths[:2]) == (3, ["ppl"], lengths)


def test_a_settled_key_is_refused_where_it_asks_for_something_else():
    from sparsek_cli.errors import UsageError
    from sparsek_cli.recipes.load import load_recipe
    from sparsek_cli.recipes.schema_evaluate import EvaluateRecipe

    assert load_recipe(EvaluateRecipe, None, ["share_prefix=true"], {})
    with pytest.raises(UsageError, match="unknown key 'share_prefix'") as refused:
        load_recipe(EvaluateRecipe, None, ["share_prefix=false"], {})
    assert refused.value.hint.startswith("leave it out")


@pytest.mark.parametrize("value", ["on", "off", "auto"])
def test_chat_template_as_a_word(value):
    from sparsek_cli.recipes.load import load_recipe
    from sparsek_cli.recipes.schema_evaluate import EvaluateRecipe

    made = load_recipe(EvaluateRecipe, None, [f"chat_template={value}"], {}, verb="evaluate")
    assert made.chat_template == value


def test_tasks_that_fit_run_beside_refused_ones(run, recipe, console):
    settings = {"tasks": ["scrolls_qasper", "ppl"], "baselines": [], "limit": 1}
    report = run(recipe(**settings, lengths=[200], max_length=200), console)
    assert {unit["task"] for unit in report["units"]} == {"ppl"}
    [refused] = report["absent"]
    assert refused["task"] == "scrolls_qasper"
    assert "--truncate" in refused["remedy"]


def test_a_dense_model_is_measured_under_policies_that_need_no_scores(
    run, recipe, console, checkpoints
):
    settings = {"tasks": ["ppl"], "limit": 2, "baselines": ["dense", "window"]}
    report = run(recipe(**settings, model=str(checkpoints[0]), budgets=[540]), console)
    assert report["policies"] == ["dense", "window-540"]
    dense, window = (unit["metrics"]["ppl"]["value"] for unit in report["units"])
    assert dense != window
    assert report["units"][1]["proof"]["kv_pairs"] == 2 * 2 * 540


def test_proof_is_of_the_whole_prompt_where_its_beginning_was_shared(run, recipe, console):
    report = run(recipe(tasks=["scrolls_contractnli"], baselines=["dense"], limit=1), console)
    for unit in report["units"]:
        assert unit["proof"]["kv_tokens"] == unit["proof"]["longest_prompt"]


def test_ctrl_c_leaves_a_valid_partial_result(run, recipe, console, tmp_path, monkeypatch):
    from sparsek_cli.evaluation import run as module

    real = module.run_unit

    def stopped(unit, policy, *rest, **limits):
        if policy.label == "sparsek":
            raise KeyboardInterrupt
        return real(unit, policy, *rest, **limits)

    monkeypatch.setattr(module, "run_unit", stopped)
    with pytest.raises(KeyboardInterrupt):
        run(recipe(tasks=["ppl"], limit=1), console)
    report = json.loads((tmp_path / "out" / "results.json").read_text())
    assert report["complete"] is False
    assert "not complete" in (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert [unit["policy"] for unit in report["units"]] == ["dense"]
