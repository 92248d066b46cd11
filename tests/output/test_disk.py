"""Single files: whole or not at all, on a full disk too."""

import errno
from pathlib import Path

import pytest

from sparsek_cli import disk


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
