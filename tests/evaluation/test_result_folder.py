"""The result folder: what is in it is ours, of one run, and written by one process."""

import json
import os
import shlex
from dataclasses import asdict
from pathlib import Path

import pytest

from sparsek_cli.errors import SparsekError, UsageError
from sparsek_cli.evaluation import result_folder
from sparsek_cli.evaluation.lm.proof import Proof
from sparsek_cli.evaluation.plan import plan
from sparsek_cli.evaluation.report.stored_shapes import is_report
from sparsek_cli.evaluation.result_files import load_results, load_samples, load_unit
from sparsek_cli.evaluation.result_folder import Store, check_part, working_folder
from sparsek_cli.output import leftovers
from sparsek_cli.output.contents import RESULTS
from sparsek_cli.output.swap_folders import exchange
from sparsek_cli.recipes.schema_evaluate import EvaluateRecipe


def begin(folder, settings="a", *, resume=False, overwrite=False) -> Store:
    return Store(folder, settings, {}, resume=resume, overwrite=overwrite)


UNIT = {
    "task": "ppl", "length": 32, "policy": "dense", "primary": "ppl",
    "metrics": {"ppl": {"value": 1.0, "stderr": None, "higher_is_better": False, "samples": 1}},
    "proof": asdict(Proof()),
}  # fmt: skip


BROKEN = [
    {"proof": {}},
    {"primary": "other"},
    {"metrics": {"ppl": 1}},
    {"metrics": {"ppl": UNIT["metrics"]["ppl"] | {"value": None}}},
]


@pytest.mark.parametrize(
    "content",
    ["", "{", "[]", "{}", '{"units": 3}', "[" * 99999]
    + [json.dumps(UNIT | broken) for broken in BROKEN],
)
def test_damaged_results_are_measured_again_and_not_compared(tmp_path, content):
    with begin(tmp_path) as store:
        store.save("dense", "ppl@32", UNIT, [])
        assert load_unit(tmp_path, "dense", "ppl@32") == UNIT
        next(tmp_path.glob("units/*/*")).write_text(content)
        assert load_unit(tmp_path, "dense", "ppl@32") is None
    (tmp_path / "results.json").write_text(content)
    with pytest.raises(UsageError, match=r"results\.json (holds no results|is not valid JSON)"):
        load_results(tmp_path)


@pytest.mark.parametrize("content", ["null", "3", "{}", "[" * 100_000, '{"doc_id": 0}', "\udcff"])
def test_damaged_samples_are_none(tmp_path, content):
    """Two runs are then compared by their own errors; it ended as a TypeError."""
    sample = {"doc_id": 0, "prompt_hash": "a", "filter": "none", "scores": {"ppl": [-1.0, 2]}}
    with begin(tmp_path) as store:
        store.save("dense", "ppl@32", UNIT, [sample])
    assert load_samples(tmp_path, "dense", "ppl@32") == [sample]
    # Letters that end lines elsewhere; the samples were none, and so was the paired error.
    odd = sample | {"prompt": "a\u2028b\x85c\x0bd"}
    with begin(tmp_path / "odd") as store:
        store.save("dense", "ppl@32", UNIT, [odd, odd])
    assert load_samples(tmp_path / "odd", "dense", "ppl@32") == [odd, odd]
    file = next(tmp_path.glob("samples/*/*"))
    file.write_bytes(content.encode("utf-8", "surrogateescape"))
    assert load_samples(tmp_path, "dense", "ppl@32") == []


REPORT = {
    "model": {"name": "m", "path": "m", "type": "sparsek_llama",
              "sparsek": {"topk": [[3, 4], None], "window": 8, "sinks": 2}},
    "recipe": {"truncate": "refuse", "tasks": ["ppl"], "budgets": [64], "yarn": None},
    "environment": {"versions": {}, "dtype": "float32", "device": "cpu"},
    "policies": ["dense"], "units": [UNIT], "absent": [], "complete": True,
}  # fmt: skip


@pytest.mark.parametrize(
    ("place", "value"),
    [("model.sparsek", []), ("model.sparsek.topk", None), ("model.sparsek.topk", [["a"]]),
     ("model.sparsek.topk", []), ("recipe.tasks", [[]]), ("recipe.budgets", -1),
     ("recipe.yarn", "four"), ("policies", [3])],
)  # fmt: skip
def test_forged_reports_are_refused(tmp_path, place, value):
    """`push --evaluation` writes them into a card; it ended as a TypeError."""
    report = json.loads(json.dumps(REPORT))
    assert is_report(report) and is_report(report | {"recipe": {"truncate": "refuse"}})
    *above, last = place.split(".")
    block = report
    for key in above:
        block = block[key]
    block[last] = value
    assert not is_report(report)


def finish(folder, settings="a") -> None:
    with begin(folder, settings) as store:
        store.save("dense", "ppl@32", {"loss": 1.0}, [])


def test_a_pipe_called_as_results_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "results.json")
    with pytest.raises(UsageError, match=r"results\.json' is a FIFO"):
        load_results(tmp_path)


def test_files_of_others_beside_results_are_not_removed(tmp_path):
    finish(tmp_path)
    (tmp_path / "samples" / "thesis.txt").write_text("mine")
    with begin(tmp_path, resume=True):
        pass
    with pytest.raises(UsageError, match=r"samples/thesis\.txt"):
        begin(tmp_path, "b", resume=True, overwrite=True)
    assert (tmp_path / "samples" / "thesis.txt").read_text() == "mine"


def test_nothing_finished_does_not_make_foreign_files_ours(tmp_path):
    with begin(tmp_path):
        pass
    (tmp_path / "units").mkdir()
    (tmp_path / "units" / "thesis.txt").write_text("mine")
    with pytest.raises(UsageError, match=r"units/thesis\.txt"):
        begin(tmp_path, "b", resume=True)
    assert (tmp_path / "units" / "thesis.txt").read_text() == "mine"


@pytest.mark.parametrize("content", ['{"seed": 1}', "[1]", "", '{"fingerprint": 3}', "[" * 99999])
@pytest.mark.parametrize("resume", [True, False])
def test_a_run_of_another_program_is_left_alone(tmp_path, content, resume):
    (tmp_path / "run.json").write_text(content)
    (tmp_path / "results.json").write_text("mine")
    for overwrite in (True, False):
        with pytest.raises(UsageError, match="not written by `sparsek evaluate`"):
            begin(tmp_path, resume=resume, overwrite=overwrite)
    assert (tmp_path / "run.json").read_text() == content


def test_one_run_at_a_time(tmp_path):
    with begin(tmp_path):
        for settings in ("a", "b"):
            with pytest.raises(UsageError, match="another run is writing"):
                begin(tmp_path, settings, resume=True, overwrite=True)
    with begin(tmp_path, "b"):
        pass
    assert json.loads((tmp_path / "run.json").read_text()) == {"fingerprint": "b"}


def stored(folder) -> list[str]:
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())


def test_old_results_stand_until_the_new_ones_are_whole(tmp_path):
    out, part = tmp_path / "out", tmp_path / "out.part"
    finish(out)
    before = stored(out)
    with begin(out, "b", overwrite=True) as store:
        assert store.folder == part and stored(out) == before
    assert stored(out) == before and not part.exists()  # nothing was finished in it
    with begin(out, "b", overwrite=True) as store:
        store.save("dense", "ppl@64", {"loss": 2.0}, [])
    assert stored(out) == before and part.is_dir()  # stopped: that is kept
    with begin(out, "b", resume=True) as store:
        assert store.folder == part
        store.save("dense", "ppl@128", {"loss": 3.0}, [])
        store.complete()
        assert store.folder == out
    assert sorted(path.name for path in out.glob("units/*/*")) == ["ppl@128.json", "ppl@64.json"]
    assert not part.exists() and [path.name for path in tmp_path.iterdir()] == ["out"]


def test_an_unfinished_run_beside_is_not_dropped_in_silence(tmp_path):
    out, part = tmp_path / "out", tmp_path / "out.part"
    finish(out)
    with begin(out, "b", overwrite=True) as store:
        store.save("dense", "ppl@64", {"loss": 2.0}, [])
    for settings, resume in (("b", False), ("c", False), ("c", True)):
        with pytest.raises(UsageError, match="is unfinished, in .*out.part"):
            begin(out, settings, resume=resume)
    (part / "thesis.txt").write_text("mine")
    with pytest.raises(UsageError, match=r"thesis\.txt"):
        begin(out, "c", overwrite=True)
    (part / "thesis.txt").unlink()
    with begin(out, "c", overwrite=True) as store:
        assert not list(part.glob("units/*/*"))
        store.save("dense", "ppl@32", {"loss": 1.0}, [])
        (out / "thesis.txt").write_text("mine")
        with pytest.raises(SparsekError, match="holds files of others by now"):
            store.complete()
    assert (out / "thesis.txt").exists() and (part / "units").exists()


def test_results_in_a_folder_called_as_ours_are_not_dropped(tmp_path):
    out, part = tmp_path / "out", tmp_path / "out.part"
    finish(out)
    finish(part, "other")
    before = stored(part)
    with pytest.raises(UsageError, match=r"out\.part' is not of a run that was to replace"):
        begin(out, "b", overwrite=True)
    with pytest.raises(UsageError, match=r"out\.part' is not of a run that was to replace"):
        check_part(out)
    assert stored(part) == before
    with begin(out, resume=True) as store:  # it is nothing to this run
        assert store.folder == out
    assert stored(part) == before


class Killed(BaseException):
    """Nothing is tidied up after it."""


@pytest.mark.parametrize("left", [[], [".run.json.77.part"]])
def test_a_part_in_which_nothing_was_begun_is_no_stranger(tmp_path, left):
    """kill -9 between its making and its run.json: every later --overwrite was refused."""
    out, part = tmp_path / "out", tmp_path / "out.part"
    finish(out)
    part.mkdir()
    for name in left:
        (part / name).write_text("{")
    check_part(out)
    with begin(out, "b", overwrite=True) as store:
        assert store.folder == part and not set(left) & set(os.listdir(part))
    part.mkdir()
    (part / "thesis.txt").write_text("mine")
    with pytest.raises(UsageError, match="is not of a run"):
        begin(out, "b", overwrite=True)


@pytest.mark.parametrize("how", [{"overwrite": True}, {"resume": True}])
def test_results_that_were_replaced_are_no_stranger_s_to_the_next_run(tmp_path, monkeypatch, how):
    """kill -9 once the names were exchanged: the old ones lay in OUT.part, and stood in the way."""
    out, part = tmp_path / "out", tmp_path / "out.part"
    finish(out)

    def killed(folder, out, contents, *, overwrite):
        assert exchange(folder, out)
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(result_folder, "take_name", killed)
        with pytest.raises(Killed), begin(out, "b", overwrite=True) as store:
            store.save("dense", "ppl@64", UNIT, [])
            store.complete()
    assert (out / "units/dense/ppl@64.json").exists()
    assert (part / "units/dense/ppl@32.json").exists()
    check_part(out)
    with begin(out, "b", **how):
        assert not (part / "units/dense/ppl@32.json").exists()


def test_a_run_goes_on_whatever_else_was_to_replace_it(tmp_path):
    out, part = tmp_path / "out", tmp_path / "out.part"
    finish(out)
    with begin(out, "b", overwrite=True) as store:
        store.save("dense", "ppl@64", {"loss": 2.0}, [])
    with begin(out, resume=True) as store:
        assert store.folder == out and part.is_dir()
    for file in part.glob("units/*/*"):
        file.unlink()  # killed before anything was finished
    with begin(out, "c", overwrite=True) as store:
        assert store.folder == part


def test_files_of_others_are_told_before_anything_is_measured(tmp_path):
    out = tmp_path / "out"
    finish(out)
    with begin(out, "b", overwrite=True) as store:
        store.save("dense", "ppl@64", {"loss": 2.0}, [])
    (out / "thesis.txt").write_text("mine")
    with pytest.raises(UsageError, match=r"thesis\.txt"):
        begin(out, "b", resume=True)


def test_the_current_folder_holds_results(tmp_path, monkeypatch):
    finish(tmp_path / "out")
    monkeypatch.chdir(tmp_path / "out")
    with begin(Path("."), resume=True) as store:
        assert store.folder == Path(".")
    assert working_folder(Path("."), "a") == Path(".")


def test_what_a_killed_run_set_aside_is_put_back(tmp_path):
    out, told = tmp_path / "out", []
    finish(out)
    aside = leftovers.make_beside(out, "old.")
    out.rename(aside / "out")
    leftovers.clear(out, told.append, RESULTS)
    assert load_unit(out, "dense", "ppl@32") is None and (out / "units").is_dir()
    half = leftovers.make_beside(out)
    (half / "run.json").write_text("{}")
    leftovers.clear(out, told.append, RESULTS)
    assert not half.exists() and len(told) == 2


@pytest.mark.parametrize("out", [None, "results", "../link/results"])
def test_results_are_not_added_to_the_model(make_checkpoint, tmp_path, monkeypatch, out):
    """Nor where no --out says so and the model is the folder one is in."""
    make_checkpoint(tmp_path / "model")
    (tmp_path / "link").symlink_to("model")
    monkeypatch.chdir(tmp_path / "model")
    recipe = EvaluateRecipe(model=str(tmp_path / "model"), out=out, tasks=["ppl"])
    with pytest.raises(UsageError, match="inside the model's own folder") as error:
        plan(recipe)
    if out is None:
        beside = shlex.split(error.value.hint.split("--out ")[1].split(", or run")[0])[0]
        assert plan(recipe.model_copy(update={"out": beside})).out == Path(beside)  # as hinted


@pytest.mark.parametrize("how", [{"resume": True}, {}, {"overwrite": True}])
def test_what_a_killed_run_was_writing_goes(tmp_path, how):
    """kill -9 within a write left a hidden file, which nothing ever removed."""
    out = tmp_path / "out"
    with begin(out) as store:
        if "resume" in how:
            store.save("dense", "ppl@32", UNIT, [])
    half = [out / ".results.json.123.part"]
    half += [out / folder / "dense" / f".ppl@32.{end}.77.part"
             for folder, end in (("units", "json"), ("samples", "jsonl"))]  # fmt: skip
    for file in half:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("{")
    (out / ".mine.part").write_text("of somebody else")
    with begin(out, **how):
        assert not any(file.exists() for file in half)
        assert (out / ".mine.part").exists()
