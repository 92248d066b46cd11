"""What an evaluation thinks its caches and batches take is what they take."""

from types import SimpleNamespace

import pytest
import torch

from sparsek_cli.evaluation.lm.proof import row_bytes
from sparsek_cli.evaluation.policies.registry import make_policy


@pytest.fixture
def model(checkpoints):
    """Four query heads share two KV heads."""
    from transformers import AutoModelForCausalLM

    import sparsek_cli.models  # noqa: F401

    return AutoModelForCausalLM.from_pretrained(checkpoints[1]).eval()


def read(model, policy, tokens, rows=2):
    cache = policy.new_cache(model)
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 128, (rows, tokens), generator=draw)
    with torch.no_grad():
        model(input_ids=ids, past_key_values=cache)
    return cache


@pytest.mark.parametrize("topk", [40, [[10, 70], [60, 21]]])
def test_sparse_rows_take_the_formula_s_bytes_from_the_first_token(model, topk):
    from sparsek_cli import models

    with models.budget(model, topk=topk):
        cache = read(model, make_policy("sparsek"), 30)
        wanted = models.sparsek_cache_bytes(model.config, model.dtype)
    assert cache.nbytes == 2 * wanted
    assert row_bytes(cache) == row_bytes(cache, more=500) == wanted


def test_dense_rows_take_the_formula_s_bytes_and_grow(model):
    from sparsek_cli import models

    with make_policy("dense").applied(model):
        cache = read(model, make_policy("dense"), 300)
    for more in (0, 16):
        wanted = models.dense_cache_bytes(model.config, 300 + more, model.dtype)
        assert row_bytes(cache, more) == wanted


def test_latent_keys_are_counted_as_they_are_stored():
    """By the heads and the width in its config, bounds were off, and dense kept half of the pairs.

    One head of 16 numbers and 8 that rotate is stored for four heads of 24.
    """
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    from sparsek_cli.evaluation.lm.proof import Proof
    from sparsek_cli.evaluation.lm.read_together import TogetherReader

    config = DeepseekV3Config(
        vocab_size=128, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=4, q_lora_rank=16, kv_lora_rank=16,
        qk_nope_head_dim=16, qk_rope_head_dim=8, v_head_dim=24, first_k_dense_replace=2,
    )  # fmt: skip
    model, policy, proof = DeepseekV3ForCausalLM(config).eval(), make_policy("dense"), Proof()
    reader = SimpleNamespace(
        model=model, device=model.device, _new_cache=lambda: policy.new_cache(model)
    )
    cache = read(model, policy, 50)
    proof.saw_cache(cache, 50, config)
    stored = sum(t.nbytes for layer in cache.layers for t in (layer.keys, layer.values)) // 2
    assert 50 * TogetherReader._token_bytes(reader) == row_bytes(cache) == proof.kv_bytes == stored
    assert proof.kept_share == 1


def test_sliding_layers_with_heads_of_their_own_keep_no_pair_twice():
    """Their number is not the whole model's: 175 % of the pairs were an error of ours."""
    from transformers import MiMoV2FlashConfig, MiMoV2FlashForCausalLM

    from sparsek_cli.evaluation.lm.proof import Proof

    config = MiMoV2FlashConfig(
        vocab_size=128, hidden_size=32, intermediate_size=64, num_hidden_layers=2, head_dim=8,
        v_head_dim=8, num_attention_heads=8, num_key_value_heads=2, n_routed_experts=4,
        num_experts_per_tok=2, moe_intermediate_size=32, n_group=1, topk_group=1,
        layer_types=["full_attention", "sliding_attention"],
    )  # fmt: skip
    policy, proof = make_policy("dense"), Proof()
    proof.saw_cache(read(MiMoV2FlashForCausalLM(config).eval(), policy, 20), 20, config)
    assert proof.kept_share == 1


@pytest.mark.parametrize("name", ["snapkv", "h2o"])
def test_rivals_take_keys_values_and_what_ranks_them_and_stay(model, name):
    policy = make_policy(name)
    with policy.applied(model):
        cache = read(model, policy, 300)
        grown = row_bytes(cache, 100)
        assert grown > row_bytes(cache)
        policy.end_prompt(model, cache)
    per_pair = 2 * 8 * 4 + 4 + 8  # 8 numbers twice, a rank and a position
    per_layer = 2 * (68 * per_pair + 8) + 8  # two KV heads of 68 slots and a capacity; a length
    assert row_bytes(cache) == row_bytes(cache, 100) == 2 * per_layer


def test_a_pile_is_as_large_as_its_largest_cache(recipe, console, monkeypatch):
    """Rows are padded to the longest when they are joined, whatever the last one's length."""
    from verbs import evaluate

    from sparsek_cli.evaluation.lm.harness import SparsekLM

    asked, prompts = [], []
    real = SparsekLM._read_end

    def noted(self, ids, cache):
        prompts.append(len(ids))
        return real(self, ids, cache)

    monkeypatch.setattr(SparsekLM, "_read_end", noted)
    monkeypatch.setattr(SparsekLM, "_together", lambda self, size: asked.append(size) or 99)
    wanted = recipe(tasks=["scrolls_qasper"], baselines=["dense"])
    evaluate(wanted, console, share_prefix=False)
    asked, prompts = asked[: len(asked) // 2], prompts[: len(prompts) // 2]  # the dense ones
    assert len(set(prompts)) > 1
    pair = 2 * 2 * 2 * 8 * 4  # layers, KV heads, key and value, numbers, bytes
    assert asked == [pair * (max(prompts[: i + 1]) + 6) for i in range(len(prompts))]


def test_answers_together_fill_a_share_of_free_memory(monkeypatch):
    from sparsek_cli.evaluation.lm.generation import Answers

    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (10_000, 80_000))
    gpu = SimpleNamespace(answers_together=None, device=torch.device("cuda"))
    assert [Answers._together(gpu, size) for size in (1, 500, 9_000)] == [32, 4, 1]
    assert Answers._together(SimpleNamespace(answers_together=7), 9_000) == 7


@pytest.mark.parametrize(
    ("longest", "vocabulary", "device", "rows"),
    [
        (100, 8_192, "cpu", 20),
        (100, 151_936, "cpu", 17),
        (100, 8_192, "cuda", 64),
        (100, 151_936, "cuda", 64),
        (1_000, 151_936, "cuda", 7),  # 65 by tokens alone: 40 GB of log-probabilities
        (100_000, 151_936, "cuda", 1),
        (0, 8_192, "cuda", 64),
    ],
)
def test_batches_keep_their_logits_in_bounds(longest, vocabulary, device, rows):
    from sparsek_cli.evaluation.measure import BATCH_LOGITS, batch_size

    assert batch_size(longest, vocabulary, device) == rows
    assert rows == 1 or rows * longest * vocabulary * 4 <= BATCH_LOGITS[device]
