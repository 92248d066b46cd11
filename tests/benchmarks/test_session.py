"""A phase that fails or finds no time left stops nothing, and everything is on disk at once."""

import json

from sparsek_cli.benchmarks.session import Session
from sparsek_cli.errors import SparsekError


def fails():
    raise SparsekError("broken", hint="mend it")


def test_phases_are_guarded_and_recorded(tmp_path, capsys):
    session = Session(tmp_path / "out", 50, {"device": "cpu"})
    assert session.run("good", lambda: 3) == 3
    assert session.run("bad", fails) is None
    assert session.run("late", lambda: 1, needs=1000) is None
    session.row(model="a", loss=1.23456, recall={"all": 1.0})
    session.row(model="b", policy="dense")
    record = json.loads((tmp_path / "out" / "results.json").read_text())
    assert record["phases"]["bad"]["error"] == "broken"
    assert record["phases"]["late"] == {"skipped": True}
    assert record["rows"][0]["recall"] == {"all": 1.0}
    lines = session.table(["model", "loss", "policy"]).splitlines()
    assert lines[2:] == ["a      1.235", "b             dense"]
    shown = capsys.readouterr().out
    assert "broken (mend it)" in shown and "late: skipped" in shown and "recall" not in shown
