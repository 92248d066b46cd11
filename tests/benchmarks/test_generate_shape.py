"""The 1B check at its toy shape: everything it does on a GPU runs, and finds nothing wrong."""

import pytest

from sparsek_cli.benchmarks import generate_shape


@pytest.mark.slow
def test_the_toy_shape_passes_its_checks(capsys, monkeypatch):
    arguments = ["generate_shape", "--toy", "--lengths", "40", "--batches", "2", "--tokens", "4"]
    monkeypatch.setattr("sys.argv", arguments)
    generate_shape.main()
    said = capsys.readouterr().out
    assert not any(word in said for word in ("FAILED", "WRONG", "DIFFERENT"))
    assert said.count(": ok") == 12 and "steps alone" in said and "dense:" in said


def test_a_failing_part_is_reported_and_the_rest_goes_on(capsys):
    def breaks(what):
        raise ValueError(what)

    generate_shape.part(breaks, "the reason")
    assert "the reason" in capsys.readouterr().out
