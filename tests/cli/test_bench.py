"""Bench measures what it says, on tiny shapes, and refuses what no layer has."""

import json

import pytest

SMALL = ["--device", "cpu", "--heads", "2", "--kv-heads", "1", "--head-dim", "8", "--topk", "8"]


def test_rows(sparsek):
    words = ["--lengths", "32,64", "--window", "8", "--backward", "--repeats", "1", "--json"]
    shown = sparsek("bench", *SMALL, *words)
    data = json.loads(shown.out)
    assert shown.code == 0 and [row["length"] for row in data["rows"]] == [32, 64]
    assert all(value > 0 for row in data["rows"] for value in row.values())
    assert data["backend"] == "pytorch"


def test_table(sparsek):
    shown = sparsek("bench", *SMALL, "--lengths", "32", "--no-dense", "--repeats", "1")
    assert shown.code == 0
    assert [len(line.split()) for line in shown.out.splitlines()][1] == 5
    assert "pytorch on cpu" in shown.err


@pytest.mark.parametrize(
    "words", [["--lengths", "many"], ["--lengths", "0"], ["--heads", "3", "--kv-heads", "2"],
              ["--window", "0"], ["--topk", "some"]],
)  # fmt: skip
def test_bad_requests(sparsek, words):
    assert sparsek("bench", *words).failed(2)
