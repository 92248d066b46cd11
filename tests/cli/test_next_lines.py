"""Commands that are shown to be typed next are lines for a shell, whatever files are called."""

import shlex


def test_names_are_quoted(sparsek, make_checkpoint, tmp_path):
    good, out = make_checkpoint(tmp_path / "my model"), tmp_path / "it's sparse"
    done = sparsek("convert", str(good), str(out), "--calibrate", "none", "--topk", "6",
                   "--window", "4")  # fmt: skip
    assert done.code == 0, done
    shown = done.err[done.err.index("next: sparsek") + len("next: ") :]
    words = [shlex.split(line) for line in shown.strip().splitlines()]
    assert [line[1:3] for line in words] == [["chat", str(out)], ["eval", str(out)]]
    dense = sparsek("serve", str(good), "--dry-run")
    assert shlex.split(dense.err.splitlines()[-1])[-3:] == ["sparsek", "convert", str(good)]
