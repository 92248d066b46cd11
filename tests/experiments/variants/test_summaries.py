"""Summaries of what was evicted: by hand for one, and dense attention where nothing is."""

import pytest
import torch
from sparsek_kernels.state import SlotLayout
from transformers import AutoModelForCausalLM

from experiments.variants import summaries
from sparsek_cli.models import dense_attention, sparsek_config_from
from sparsek_cli.models.config import ATTENTION


def test_one_summary_is_the_mean_of_all_that_a_query_no_longer_sees():
    torch.manual_seed(0)
    key, value, scores = torch.randn(2, 40, 8), torch.randn(2, 40, 8), torch.randn(2, 40)
    leaves = summaries.gone(key, scores, None, SlotLayout((3, 0), window=4, sinks=2))
    means = summaries.running_means(key, value, leaves, torch.tensor([True, False]), 1)
    assert not means.counts[1].any()
    for query in range(40):
        candidates = range(2, query - 3)
        best = sorted(candidates, key=lambda j: -scores[0, j])[:3]
        dropped = [j for j in candidates if j not in best]
        assert int(means.counts[0, query]) == len(dropped)
        if dropped:
            torch.testing.assert_close(means.keys[0, query, 0], key[0, dropped].mean(0))
            torch.testing.assert_close(means.values[0, query, 0], value[0, dropped].mean(0))


def test_a_pair_goes_where_its_key_points():
    way = torch.tensor([1.0, -1.0]).repeat(10)  # keys of two directions
    key = (way[:, None] * torch.tensor([3.0, 1.0]))[None]
    leaves = torch.arange(20)[None] + 2
    means = summaries.running_means(key, key, leaves, torch.tensor([True]), 2)
    assert means.counts[0, -1].tolist() == [9.0, 9.0]
    torch.testing.assert_close(means.values[0, -1], torch.tensor([[3.0, 1.0], [-3.0, -1.0]]))


def test_raised_so_far_that_nothing_else_counts_a_summary_is_all_there_is(dense_config):
    torch.manual_seed(0)
    settings = {"topk": 4, "window": 4, "sinks": 1}
    config = sparsek_config_from(dense_config("llama", num_hidden_layers=1), settings)
    model, ids = AutoModelForCausalLM.from_config(config).eval(), torch.randint(3, 128, (1, 40))
    logits = {}
    with torch.no_grad():
        for raised in (0.0, 50.0, 60.0):
            with summaries.applied(1, raised):
                logits[raised] = model(ids).logits[0, -1]
    torch.testing.assert_close(logits[50.0], logits[60.0], atol=1e-5, rtol=1e-4)
    assert not torch.allclose(logits[0.0], logits[60.0], atol=1e-3)


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("topk", [64, 4])
def test_models_attend_densely_where_all_fits_and_otherwise_not(topk, count, dense_config):
    torch.manual_seed(0)
    config = sparsek_config_from(dense_config("llama"), {"topk": topk, "window": 4, "sinks": 1})
    model, ids = AutoModelForCausalLM.from_config(config).eval(), torch.randint(3, 128, (2, 40))
    with torch.no_grad():
        with summaries.applied(count):
            found = model(ids).logits
        with dense_attention(model):
            dense = model(ids).logits
    assert found.isfinite().all()
    assert torch.allclose(found, dense, atol=1e-5) == (topk == 64)


def test_heads_without_room_for_summaries_attend_as_before(dense_config):
    torch.manual_seed(0)
    config = sparsek_config_from(dense_config("llama"), {"topk": 2, "window": 4, "sinks": 1})
    model, ids = AutoModelForCausalLM.from_config(config).eval(), torch.randint(3, 128, (2, 40))
    assert model.config._attn_implementation == ATTENTION
    with torch.no_grad(), summaries.applied(3):
        found = model(ids).logits
    with torch.no_grad():
        torch.testing.assert_close(found, model(ids).logits, atol=1e-5, rtol=1e-4)
