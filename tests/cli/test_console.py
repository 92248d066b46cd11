"""Progress where there is no terminal: a line now and then, with the time left."""

import shlex

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


def test_a_name_does_not_turn_what_stands_behind_it_around(capsys):
    console.report_error("'notes\u202etxt.exe' is no checkpoint", "\u05d0\u2067b\u2069")
    shown = capsys.readouterr().err
    assert "notes\\u202etxt.exe" in shown and "\u05d0\u2067b\u2069" in shown


def test_nor_do_those_of_models_results_progress_and_logs(capsys, monkeypatch):
    import logging

    shown = console.Console()
    shown.show("a \x1b[2J reply\n")
    shown.result("a \x1b[2J table", {})
    shown.say("a \x1b[2J line")
    record = logging.LogRecord("sparsek_cli", logging.WARNING, "", 1, "a \x1b[2J log", (), None)
    text = "".join(capsys.readouterr()) + console._PlainFormatter().format(record)
    assert text.count("\\x1b[2J") == 4 and "\x1b" not in text
    console.Console(as_json=True).result("", {"reply": "\x1b[2J"})
    assert "\x1b" not in capsys.readouterr().out


def test_a_file_s_name_is_no_markup_of_the_bar(monkeypatch):
    import io

    stream = io.StringIO()
    stream.isatty = lambda: True
    monkeypatch.setattr(console.sys, "stderr", stream)
    monkeypatch.setenv("TERM", "xterm")
    with console.Console().progress("reading [/red]\x1b]0;x\x07.txt", 3) as bar:
        bar.advance(1)
    assert "[/red]\\x1b]0;x\\x07.txt" in stream.getvalue()


def test_commands_to_type_next_are_lines_for_a_shell(sparsek, make_checkpoint, tmp_path):
    good, out = make_checkpoint(tmp_path / "my model"), tmp_path / "it's sparse"
    done = sparsek("convert", str(good), str(out), "--calibrate", "none", "--topk", "6",
                   "--window", "4")  # fmt: skip
    assert done.code == 0, done
    shown = done.err[done.err.index("next: sparsek") + len("next: ") :]
    words = [shlex.split(line) for line in shown.strip().splitlines()]
    assert [line[1:3] for line in words] == [["chat", str(out)], ["evaluate", str(out)]]
    done = sparsek("convert", "tiny", str(out), "--calibrate", "none", "--overwrite")
    assert "--load FILE  # it answers about a text" in done.err  # a greeting would tell nothing
    dense = sparsek("serve", str(good), "--dry-run")
    assert shlex.split(dense.err.splitlines()[-1])[-3:] == ["sparsek", "convert", str(good)]
