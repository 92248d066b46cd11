"""The ceiling: what each query sees, by hand; and dense attention where everything fits."""

import pytest
import torch

from experiments import ceiling
from sparsek_cli.models import dense_attention, sparsek_config_from


def test_a_query_sees_what_is_looked_at_most_from_then_on():
    torch.manual_seed(0)
    logits = 3 * torch.randn(2, 2, 24, 24)
    weights = logits.masked_fill(torch.ones(24, 24).triu(1).bool(), -torch.inf).softmax(-1)
    seen = ceiling.kept_from_then_on(weights, torch.tensor([3, 0]), window=4, sinks=2)
    for query in range(24):
        always = {j for j in range(query + 1) if j < 2 or query - j < 4}
        worth = weights[0, :, query:].amax((0, 1))
        candidates = [j for j in range(2, query - 3)]
        best = sorted(candidates, key=lambda j: -worth[j])[:3]
        assert set(seen[0, query].nonzero()[:, 0].tolist()) == always | set(best)
        assert set(seen[1, query].nonzero()[:, 0].tolist()) == always


@pytest.mark.parametrize(("topk", "same"), [(64, True), (2, False)])
def test_it_is_dense_attention_where_all_fits(dense_config, topk, same):
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    config = sparsek_config_from(dense_config("llama"), {"topk": topk, "window": 4, "sinks": 1})
    model, ids = AutoModelForCausalLM.from_config(config).eval(), torch.randint(3, 128, (2, 40))
    with torch.no_grad():
        with ceiling.applied():
            found = model(ids).logits
        with dense_attention(model):
            dense = model(ids).logits
    assert torch.allclose(found, dense, atol=1e-5) == same
