"""Single files: whole or not at all, on a full disk too."""

import errno
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest

from sparsek_cli import disk
from sparsek_cli.output import scorers_file


@pytest.fixture
def full(monkeypatch):
    """Files are opened, and nothing more can be written into them."""

    def fail(self, *args, **options):
        self.open("wb").close()
        raise OSError(errno.ENOSPC, "No space left on device", str(self))

    monkeypatch.setattr(Path, "write_text", fail)
    monkeypatch.setattr(Path, "write_bytes", fail)


@pytest.mark.parametrize("content", ["text", b"bytes"])
def test_a_file_on_a_full_disk_is_the_old_one_or_none(tmp_path, full, content):
    old = tmp_path / "old.yaml"
    with old.open("w") as opened:
        opened.write("old")
    for file in (old, tmp_path / "new" / "file.yaml"):
        with pytest.raises(OSError, match="No space"):
            disk.write_atomically(file, content)
    assert old.read_text() == "old" and list(tmp_path.rglob("*.*")) == [old]


def test_commands_write_single_files_so(tmp_path, full, monkeypatch, capsys):
    from sparsek_cli.app import run
    from sparsek_cli.benchmarks import report

    monkeypatch.chdir(tmp_path)
    assert run(["recipes", "copy", "tiny.convert"]) == 1
    assert "error: the disk is full" in capsys.readouterr().err
    rows = [{"length": n, "ms": {"sparsek": 1.0}} for n in (8, 16)]
    with pytest.raises(OSError, match="No space"):
        report.plot("attention", rows, ["sparsek"], str(tmp_path / "out.png"))
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def gone() -> int:
    """The number of a process that was, and is no more."""
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        pass
    return process.pid


def texts(file: Path) -> None:
    disk.write_atomically(file, "new")


def scorers(file: Path) -> None:
    scorers_file.write(file, {"a": np.zeros(1)}, {}, {}, {})


@pytest.mark.parametrize("write", [texts, scorers])
def test_what_a_killed_run_left_of_a_file_goes_with_the_next_and_nothing_else(
    tmp_path, gone, write
):
    tmp_path.chmod(0o755)
    file = tmp_path / "a.b"
    left = tmp_path / f".a.b.{gone}.part", tmp_path / f".a.b.{gone}.abcd_123.part"
    left[0].write_text("half")
    left[1].mkdir()
    (left[1] / ".tmpSQvzg6").write_text("half")  # as safetensors names what it writes
    alive = os.getppid()
    others = [
        f".a.b.{alive}.part", f".axb.{gone}.part", f".a.b.c.{gone}.part", f"a.b.{gone}.part",
        ".a.b.part", ".a.b.mine.part", f".a.b.{10**30}.part", f".a.b.{gone}.part.txt",
    ]  # fmt: skip
    for name in others:
        (tmp_path / name).write_text("of others")
    link = tmp_path / f".a.b.{gone:09}.part"
    link.symlink_to("a.b.txt")
    write(file)
    assert sorted(os.listdir(tmp_path)) == sorted([*others, link.name, file.name])
    assert file.stat().st_mode & 0o600 == 0o600
    assert write is texts or file.stat().st_mode & 0o777 == 0o644  # as its folder


@pytest.mark.parametrize(
    ("folder", "mask", "wanted"),
    [(0o777, 0o022, 0o644), (0o775, 0o002, 0o664), (0o755, 0o077, 0o600), (0o700, 0o022, 0o600)],
)
def test_scorers_are_as_readable_as_any_new_file_and_no_more(tmp_path, folder, mask, wanted):
    """In /tmp, which everybody may write in, everybody could change them."""
    tmp_path.chmod(folder)
    before = os.umask(mask)
    try:
        scorers(tmp_path / "a.safetensors")
    finally:
        os.umask(before)
    assert (tmp_path / "a.safetensors").stat().st_mode & 0o777 == wanted


def test_what_a_killed_run_left_stays_where_nothing_new_was_written(tmp_path, gone, full):
    left = tmp_path / f".a.b.{gone}.part"
    with left.open("w") as opened:
        opened.write("half")
    with pytest.raises(OSError, match="No space"):
        disk.write_atomically(tmp_path / "a.b", "new")
    assert left.exists()


@pytest.mark.parametrize("write", ["texts", "scorers"])
def test_killed_while_it_writes(tmp_path, write):
    """The next run ends with the file alone."""
    code = f"""
        import os, signal, sys
        sys.path.insert(0, {os.fspath(Path(__file__).parent)!r})
        from pathlib import Path
        import test_disk
        replace = lambda *paths: os.kill(os.getpid(), signal.SIGKILL)
        Path.replace = os.replace = replace
        test_disk.{write}(Path("a.b"))
        """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], cwd=tmp_path, check=False)
    assert done.returncode == -signal.SIGKILL
    assert [name.startswith(".a.b.") for name in os.listdir(tmp_path)] == [True]
    globals()[write](tmp_path / "a.b")
    assert os.listdir(tmp_path) == ["a.b"]
