"""A run's folder: proof in the results, resume, reports."""

import errno
import json
import os
import shutil
import signal

import pytest

from sparsek_cli.errors import SparsekError, UsageError


def without_times(folder):
    report = json.loads((folder / "results.json").read_text())
    return {key: value for key, value in report.items() if key != "timings"}


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


@pytest.mark.parametrize("write", [3, 4, 7, 8])
def test_resume_after_a_full_disk(run, recipe, console, tmp_path, monkeypatch, write):
    """While samples, a result, or the table of all is written; the folder's own mark is first."""
    from sparsek_cli import disk
    from sparsek_cli.evaluation import result_folder
    from sparsek_cli.evaluation import run as module

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
        patch.setattr(result_folder, "write_atomically", full)
        patch.setattr(module, "write", full)
        with pytest.raises(SparsekError, match="the disk is full; what is finished") as refusal:
            run(recipe(**settings), console)
    assert "--resume" in refusal.value.hint
    report = run(recipe(**settings), console, resume=True)  # as hinted
    assert report["complete"] and len(report["units"]) == 2
    assert len(units) == {3: 3, 4: 2, 7: 2, 8: 2}[write], writes


def test_other_settings_in_the_same_folder_are_refused(run, recipe, console):
    small = {"tasks": ["ppl"], "limit": 1, "baselines": []}
    run(recipe(**small), console)
    with pytest.raises(UsageError, match=r"other settings: seed 1 \(was 0\)"):
        run(recipe(**small, seed=1), console)
    run(recipe(**small, seed=1), console, overwrite=True)


def test_what_keeps_a_run_from_being_resumed_is_said(run, recipe, console, tmp_path, monkeypatch):
    """It was "other settings", also where a file of text had been written again."""
    from sparsek_cli.evaluation.report import record

    text = tmp_path / "text.txt"
    text.write_text("a few words and a few more. " * 400)
    small = {"tasks": ["ppl"], "limit": 1, "baselines": [], "lengths": [32], "text": [str(text)]}
    run(recipe(**small), console)
    changed = small | {"limit": 2, "lengths": [32, 48]}
    wanted = r"lengths \[32, 48\] \(was \[32\]\), limit 2 \(was 1\)|limit 2 .*, lengths \["
    with pytest.raises(UsageError, match=wanted):
        run(recipe(**changed), console, resume=True)
    with monkeypatch.context() as patch:
        patch.setattr(record, "_versions", lambda: {"torch": "9"})
        with pytest.raises(UsageError, match=r"other settings: torch's version 9 \(was "):
            run(recipe(**small), console, resume=True)
    os.utime(text, ns=(1, 1))
    with pytest.raises(UsageError, match="other files: .* the text or the data have changed"):
        run(recipe(**small), console, resume=True)


@pytest.mark.parametrize("name", ["generation_config.json", "chat_template.jinja"])
def test_what_ends_an_answer_or_makes_a_prompt_counts(
    name, run, recipe, console, checkpoints, tmp_path
):
    """With other end tokens, or another template, results were "of this very run"."""
    model = shutil.copytree(checkpoints[1], tmp_path / "model")
    wanted = recipe(model=str(model), tasks=["ppl"], limit=1, baselines=[], lengths=[32])
    run(wanted, console)
    (model / name).write_text("{}")
    with pytest.raises(UsageError, match="other files: the model's files"):
        run(wanted, console, resume=True)


def test_a_run_from_before_a_change_of_what_is_measured_is_not_gone_on_with(
    run, recipe, console, monkeypatch
):
    """Its rows and new ones would stand in one table, under one version of the package."""
    from sparsek_cli.evaluation.report import record

    wanted = recipe(tasks=["recall_1"], baselines=["window"])
    run(wanted, console)
    monkeypatch.setattr(record, "MEANING", record.MEANING + 1)
    with pytest.raises(UsageError, match="another version of sparsek, which measured"):
        run(wanted, console, resume=True)


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


@pytest.mark.parametrize("how", ["left", "middle"])
def test_cut_prompts_are_counted(run, recipe, console, how):
    settings = {"tasks": ["scrolls_qasper", "scrolls_quality"], "baselines": []}
    report = run(recipe(**settings, max_length=100, truncate=how), console)
    for unit in report["units"]:
        proof = unit["proof"]
        assert proof["truncated_prompts"] == proof["prompts"] > 0
        assert proof["truncated_tokens"] > 100
        assert proof["kv_tokens"] <= 100


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


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_leaves_a_valid_partial_result(run, recipe, console, tmp_path, monkeypatch, number):
    from sparsek_cli.evaluation import run as module

    real = module.run_unit

    def stopped(unit, policy, *rest, **limits):
        if policy.label == "sparsek":
            os.kill(os.getpid(), number)
        return real(unit, policy, *rest, **limits)

    monkeypatch.setattr(module, "run_unit", stopped)
    with pytest.raises(KeyboardInterrupt):
        run(recipe(tasks=["ppl"], limit=1), console)
    report = json.loads((tmp_path / "out" / "results.json").read_text())
    assert report["complete"] is False
    assert "not complete" in (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert [unit["policy"] for unit in report["units"]] == ["dense"]
