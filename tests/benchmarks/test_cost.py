"""Parts of a sparse layer are timed apart and are the parts of the whole."""

import json
import sys

import pytest
import torch

from sparsek_cli.benchmarks import cost
from sparsek_cli.benchmarks.case import Shape


def test_small_lengths_give_every_row(tmp_path, monkeypatch):
    words = [str(tmp_path / "out"), "--device", "cpu", "--lengths", "160", "200"]
    words += ["--budgets", "16", "128", "--repeats", "2"]
    monkeypatch.setattr(sys, "argv", ["cost", *words])
    cost.main()
    record = json.loads((tmp_path / "out" / "results.json").read_text())
    assert all("error" not in phase for phase in record["phases"].values())
    rows = [(row["table"], row["length"], row["k"]) for row in record["rows"]]
    # 128 + 64 slots hold all of 160 tokens: nothing to measure there.
    assert rows == [
        ("parts", 160, 64), ("parts", 200, 64), ("k", 160, 16), ("k", 200, 16), ("k", 200, 128),
    ]  # fmt: skip
    for row in record["rows"][:2]:
        assert min(row[name] for name in ("scorer", "selection", "attention", "sparse")) > 0
        assert row["times"] == row["dense"] / row["sparse"]
    assert record["rows"][2]["dense"] == record["rows"][0]["dense"]
    assert record["rows"][2]["cache_mib"] == 80 * 2 * 2 * 32 * 4 / 2**20


def check_parts(stages):
    shape = Shape(4, 2, 16, 12, 9, 0, 1, "straight_through", torch.float32,
                  torch.device("cpu"), 0)  # fmt: skip
    layer = cost.Layer(shape, 100)
    with torch.no_grad():
        parts = stages(layer)
        parts["selection"]()
        assert torch.allclose(parts["attention"](), layer(), atol=1e-5)


def test_the_parts_make_the_whole():
    check_parts(cost.stages)


@pytest.mark.interpret
def test_the_parts_of_the_kernels_make_the_whole():
    check_parts(cost._triton_stages)
