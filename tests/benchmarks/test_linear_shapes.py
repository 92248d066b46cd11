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
    from sparsek_cli.benchmarks import linear_shapes

    args = SimpleNamespace(toy=True, quick=True)
    key, best = linear_shapes.time_map(name, rows, SIZE, torch.float32, torch.device("cpu"), args)
    lines = capsys.readouterr().out.splitlines()
    ours = [line for line in lines if "ours" in line]
    assert len(ours) == (2 if rows == 1 else 1) and not any("WRONG" in line for line in ours)
    assert sum(" us " in line for line in lines) == len(ours) + 3  # torch, and compiled twice
    assert key[0] == (rows > 1) and best is not None


@pytest.mark.interpret
def test_a_wrong_result_is_marked(capsys, monkeypatch):
    from sparsek_cli.benchmarks import linear_shapes

    own = linear_shapes.Place.own
    monkeypatch.setattr(
        linear_shapes.Place, "own", lambda *given: tuple(2 * x for x in own(*given))
    )
    args = SimpleNamespace(toy=True, quick=True)
    linear_shapes.time_map("down", 1, SIZE, torch.float32, torch.device("cpu"), args)
    assert capsys.readouterr().out.count("WRONG") == 2
