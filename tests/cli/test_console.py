"""Progress where there is no terminal: a line now and then, with the time left."""

import pytest

from sparsek_cli import console


@pytest.fixture
def clock(monkeypatch):
    """`clock(seconds)` moves the time on."""
    now = [100.0]
    monkeypatch.setattr(console.time, "monotonic", lambda: now[0])

    def move(seconds):
        now[0] += seconds

    return move


def test_lines_tell_the_time_left(clock):
    said = []
    bar = console.Progress("evaluating", 12, said.append)
    bar.advance()
    assert not said
    clock(30)
    bar.advance(2)
    assert said == ["evaluating: 3/12  0:01:30 left"]
    clock(30)
    bar.advance(rate="5 tokens/s")
    assert said[1:] == ["evaluating: 4/12  5 tokens/s"]
    bar.describe("again", total=2)
    clock(20)
    bar.advance()
    assert said[2:] == ["again: 1/2  0:00:20 left"]


def test_an_unknown_end_has_no_time_left(clock):
    said = []
    bar = console.Progress("reading", None, said.append)
    clock(20)
    bar.advance(7)
    assert said == ["reading: 7"]


def test_control_characters_of_files_do_not_reach_the_terminal(capsys):
    from sparsek_cli.console import report_error

    report_error("no column 'text'; it has: \x1b]0;title\x07\x9b", "näme\tone 東京")
    shown = capsys.readouterr().err
    assert "\\x1b]0;title\\x07\\x9b" in shown and "\x1b" not in shown and "näme\tone 東京" in shown
