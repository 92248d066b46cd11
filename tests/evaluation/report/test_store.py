"""The result folder: what is in it is ours, of one run, and written by one process."""

import json
import os

import pytest

from sparsek_cli.errors import UsageError
from sparsek_cli.evaluation.report.store import Store, load_results


def begin(folder, settings="a", *, resume=False, overwrite=False) -> Store:
    return Store(folder, settings, resume=resume, overwrite=overwrite)


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
