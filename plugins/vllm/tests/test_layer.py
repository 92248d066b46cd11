"""Blocks are as large as the formula says, and every rank has heads of its own."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from checkpoints import SINKS, TOPK, WINDOW
from sparsek_kernels import cache_bytes
from sparsek_kernels.state import SlotLayout
from sparsek_vllm import engine
from sparsek_vllm.blocks import BLOCK, PART, block_bytes, pool_of
from sparsek_vllm.heads import (
    can_deal,
    dealt_heads,
    plain_heads,
    query_heads_of,
    reordered,
)
from sparsek_vllm.layer import SparseKLayer
from sparsek_vllm.sizes import request_bytes
from sparsek_vllm.warm_up import is_due, memory_like, warm_up

from sparsek_cli.errors import SparsekError
from sparsek_cli.families import TABLE
from sparsek_cli.models.config import LayerBudget
from sparsek_cli.models.scorer import SparseKScorer

pytestmark = pytest.mark.core

PARTS = 7  # tensors of a state, each of which may be padded


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8])
def test_bytes_of_a_block_are_the_formula_s(dtype):
    layout = SlotLayout((20, 4), WINDOW, SINKS)
    exact = cache_bytes(1, layout.topk, WINDOW, SINKS, 2, 32, dtype)
    assert exact <= block_bytes(layout, 32, dtype) < exact + PARTS * PART + BLOCK


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8])
def test_blocks_that_lie_apart_hold_separate_states(dtype):
    layout = SlotLayout((3, 5), 4, 1)
    size = block_bytes(layout, 8, dtype)
    memory = torch.zeros(3, size + 192, dtype=torch.int8)  # another layer's block between them
    pool = pool_of(memory[:, 64 : 64 + size], layout, 8, dtype)
    for number, tensor in enumerate(pool.slots.values(), start=1):
        tensor[1] = number
    assert not memory[0].any() and not memory[2].any()
    assert not memory[:, :64].any() and not memory[:, 64 + size :].any()
    for number, tensor in enumerate(pool.slots.values(), start=1):
        assert (tensor[1] == number).all(), "two tensors share bytes"


def a_layer() -> SparseKLayer:
    return SparseKLayer(
        "layer",
        budget=LayerBudget((3, 5), 4, 1, "straight_through"),
        heads=[0, 1],
        all_heads=2,
        queries=[0, 1, 2, 3],
        head_dim=8,
        scale=1.0,
        dtype=torch.float32,
        bytes_per_block=block_bytes(SlotLayout((3, 5), 4, 1), 8, torch.float32),
        scorer=SparseKScorer(16, 2),
    )


def test_a_layer_s_pool_is_what_vllm_bound_last():
    layer = a_layer()
    for blocks in (2, 3):  # vLLM binds once to measure its graphs' memory, and once more to serve
        memory = torch.zeros(blocks, layer.bytes_per_block, dtype=torch.int8)
        layer.kv_cache = (memory,)
        layer.pool.keys.fill_(1)
        assert layer.pool.batch == blocks and memory.any()
        assert layer.pool is layer.pool


def test_a_layer_warms_up_over_states_of_its_own(monkeypatch):
    """Prompts, pieces that go on, steps, and all of them mixed; vLLM's blocks stay as they are."""
    monkeypatch.setattr("sparsek_vllm.warm_up.STEPS", ((0, (9,)), (5, ()), (1, (8, 3))))
    layer = a_layer()
    memory = torch.full((2, layer.bytes_per_block + 192), 7, dtype=torch.int8)
    layer.kv_cache = (memory[:, : layer.bytes_per_block],)
    torch.nn.init.normal_(layer._scorer[0].weight)
    like = [torch.randn(3, width) for width in (32, 16, 16, 16)]
    outputs = []

    def attend(*step):
        layer._attend(*step)
        outputs.append(step[4])

    assert not is_due(layer.layout, like[0]), "nothing is compiled on a CPU"
    own = memory_like(layer.kv_cache[0])
    assert own.stride() == memory.stride()
    with torch.no_grad():
        warm_up(attend, like, layer._pool_of(own))
    reads = [9, 9, 12, 12]  # once more as long calls are read
    assert [len(output) for output in outputs] == [9, 9, 5, 12, 12, *reads]
    assert all(output.isfinite().all() and output.any() for output in outputs)
    assert (memory == 7).all()


def test_a_step_without_requests_is_answered_with_zeros(monkeypatch):
    """vLLM names none where it measures memory, and no layer of states where it tunes a GPU."""
    context = SimpleNamespace(no_compile_layers={"layer": SimpleNamespace(attend=pytest.fail)})
    monkeypatch.setattr(engine, "get_forward_context", lambda: context)
    query, key, hidden = torch.ones(2, 32), torch.ones(2, 16), torch.ones(2, 16)
    for context.attn_metadata in (None, {}):
        output = torch.full_like(query, torch.nan)
        torch.ops.sparsek.serve(query, key, key, hidden, output, "layer")
        assert not output.any()
    context.attn_metadata = {"another": "requests, but none of this layer"}
    with pytest.raises(KeyError, match="layer"):
        torch.ops.sparsek.serve(query, key, key, hidden, output, "layer")


def test_vllm_s_blocks_are_the_formula_s(checkpoint, run_engine):
    """And so is the number of sequences that fit, which is printed."""
    exact = sum(
        cache_bytes(1, [k, k] if isinstance(k, int) else k, WINDOW, SINKS, 2, 32, torch.float32)
        for k in TOPK
    )
    with run_engine(checkpoint("qwen3"), num_gpu_blocks_override=None) as llm:
        config = llm.llm_engine.vllm_config
        blocks = config.cache_config.num_gpu_blocks
    printed = request_bytes(config.model_config.hf_config, torch.float32)
    assert blocks == 2**30 // printed, "by sparsek serve"
    low, high = 2**30 // (exact + len(TOPK) * (PARTS * PART + BLOCK)), 2**30 // exact
    print(f"{blocks} sequences in 1 GiB, {exact:,} bytes each")
    assert low <= blocks <= high


def test_heads_are_dealt_by_their_slots():
    assert dealt_heads([10, 1, 9, 2], 2) == [[0, 1], [2, 3]]
    assert dealt_heads([10, 9, 1, 2], 2) == [[0, 2], [1, 3]]
    assert dealt_heads([10, 9, 1, 2], 1) == [[0, 1, 2, 3]]
    assert dealt_heads([5, 5], 4) == plain_heads(2, 4) == [[0], [0], [1], [1]]
    assert plain_heads(4, 2) == [[0, 1], [2, 3]]


def test_query_heads_follow_their_kv_heads():
    assert query_heads_of([0, 3], 1, 4, 2) == [0, 1, 6, 7]
    assert query_heads_of([0], 0, 2, 2) == [0, 1]
    # Two ranks share each KV head of four query heads.
    assert [query_heads_of(h, r, 2, 4) for r, h in enumerate(plain_heads(2, 4))] == [
        [0, 1], [2, 3], [4, 5], [6, 7]
    ]  # fmt: skip


@torch.no_grad()
def test_a_rank_has_the_stand_ins_of_its_query_heads(monkeypatch):
    """What a rank attends to is what the whole layer does in its heads."""
    pairs, given = torch.randn(4, 1, 18), []
    layer = a_layer()
    layer._scorer = [lambda hidden: (torch.zeros(1, 2, 1), torch.zeros(2), pairs)]
    layer.kv_cache = (torch.zeros(2, layer.bytes_per_block, dtype=torch.int8),)
    monkeypatch.setattr(
        "sparsek_vllm.layer.sparsek_attention", lambda *_, **more: given.append(more)
    )
    step = SimpleNamespace(
        num_decodes=1, num_prefills=0, state_indices_tensor_d=torch.zeros(1, 1, dtype=torch.int32)
    )
    rows = torch.zeros(1, 32), torch.zeros(1, 16), torch.zeros(1, 16), torch.zeros(1, 16)
    layer._attend(*rows, torch.zeros(1, 32), step, layer.pool)
    layer.own_heads, layer.own_queries = torch.tensor([0, 1]), torch.tensor([2, 3, 0, 1])
    layer._attend(*rows, torch.zeros(1, 32), step, layer.pool)
    whole, own = (each["stand_ins"] for each in given)
    assert torch.equal(whole, pairs) and torch.equal(own, pairs[[2, 3, 0, 1]])


def test_reordered_heads_compute_the_same():
    new = torch.Generator().manual_seed(0)
    names = {"q_proj": (16, 12), "k_proj": (8, 12), "v_proj": (8, 12), "o_proj": (12, 16)}
    weights = {f"a.{n}.weight": torch.randn(*s, generator=new) for n, s in names.items()}
    weights["a.k_proj.bias"] = torch.arange(8.0)
    weights["b.k_proj.bias"] = torch.arange(8.0)
    order = [2, 0, 3, 1]  # four KV heads of size 2, a group of two query heads each
    moved = dict(reordered(weights.items(), {"a": order}, 2))
    x = torch.randn(5, 12, generator=new)

    def heads(w, part):
        return (x @ w[f"a.{part}.weight"].T).unflatten(-1, (4, -1))

    for part in ("q_proj", "k_proj", "v_proj"):
        assert torch.equal(heads(moved, part), heads(weights, part)[:, order])
    out = heads(weights, "q_proj").flatten(1) @ weights["a.o_proj.weight"].T
    same = heads(moved, "q_proj").flatten(1) @ moved["a.o_proj.weight"].T
    assert torch.allclose(out, same, atol=1e-5)
    assert moved["a.k_proj.bias"].tolist() == [4, 5, 0, 1, 6, 7, 2, 3]
    assert torch.equal(moved["b.k_proj.bias"], weights["b.k_proj.bias"])
    norms = {"a.q_norm.weight": torch.ones(2), "a.scorer.weight": torch.ones(4, 12)}
    assert dict(reordered(norms.items(), {"a": order}, 2)).keys() == norms.keys()
    with pytest.raises(SparsekError, match="spans heads"):
        list(reordered([("a.q_norm.weight", torch.ones(16))], {"a": order}, 2))


def test_heads_stay_where_a_norm_spans_them():
    assert can_deal(TABLE["qwen3"]) and can_deal(TABLE["gemma"])
    assert not can_deal(TABLE["olmo2"]) and not can_deal(TABLE["phi3"])
