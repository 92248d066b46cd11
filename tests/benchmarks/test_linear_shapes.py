"""The table of linear maps at toy size: every way gives the same, and the fastest is named."""

from types import SimpleNamespace

import pytest
import torch

SIZE = {
    "hidden_size": 16, "intermediate_size": 12, "head_dim": 4, "num_attention_heads": 2,
    "num_key_value_heads": 1, "vocab_size": 20,
}  # fmt: skip


@pytest.mark.interpret
@pytest.mark.parametrize("name, rows", [("qkv", 1), ("gate and up", 3), ("down", 1)])
def test_every_way_gives_the_same(name, rows, capsys):
    from sparsek_cli.benchmarks.linear_shapes.maps import time_map

    args = SimpleNamespace(toy=True, quick=True)
    key, best = time_map(name, rows, SIZE, torch.float32, torch.device("cpu"), args)
    lines = capsys.readouterr().out.splitlines()
    ours = [line for line in lines if "ours" in line]
    assert len(ours) == 5 and not any("WRONG" in line for line in ours)
    assert sum(" us " in line for line in lines) == len(ours) + 1  # torch
    assert key[0] == (1 if rows == 1 else 4)
    # A map alone, without a norm, is left to torch where that is faster, as it is on a CPU.
    assert (best is None) == (name == "down")


@pytest.mark.interpret
def test_a_wrong_result_is_marked(capsys, monkeypatch):
    from sparsek_cli.benchmarks.linear_shapes.maps import Place, time_map

    own = Place.own
    monkeypatch.setattr(Place, "own", lambda *given: tuple(2 * x for x in own(*given)))
    args = SimpleNamespace(toy=True, quick=True)
    time_map("down", 1, SIZE, torch.float32, torch.device("cpu"), args)
    assert capsys.readouterr().out.count("WRONG") == 5
