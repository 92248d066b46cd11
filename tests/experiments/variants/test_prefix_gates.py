"""Scores in the softmax as two dimensions of keys: what a sum by hand gives, and its gradient."""

from itertools import pairwise

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from experiments.variants.prefix_gates import prefix_gates
from sparsek_cli.models import sparsek_attentions, sparsek_config_from
from sparsek_cli.models.config import ATTENTION

TOKENS = 24


@pytest.fixture
def model(dense_config):
    torch.manual_seed(0)
    block = {"topk": TOKENS, "window": 4, "sinks": 1}
    return AutoModelForCausalLM.from_config(sparsek_config_from(dense_config("llama"), block))


def test_a_gate_is_the_log_of_a_softmax_over_the_prefix(model):
    module = next(iter(sparsek_attentions(model)))
    groups = module.config.num_key_value_heads
    heads, dim = module.config.num_attention_heads, 16
    q, k, v = (torch.randn(1, n, TOKENS, dim) for n in (heads, groups, groups))
    scores, slopes = torch.randn(1, groups, TOKENS, requires_grad=True), torch.rand(groups) / 9
    with prefix_gates(0.5):
        out, _ = ALL_ATTENTION_FUNCTIONS[ATTENTION](
            module, q, k, v, None, scaling=0.3, sparsek_scores=scores, sparsek_slopes=slopes
        )
    by_head = heads // groups
    effective = scores + slopes[:, None] * torch.arange(TOKENS)
    causal = torch.ones(TOKENS, TOKENS, dtype=torch.bool).tril()
    prefixes = effective[:, :, None, :].masked_fill(~causal, -torch.inf)
    gates = 0.5 * prefixes.log_softmax(-1).repeat_interleave(by_head, 1)
    # To the power 0.5 it is no softmax; what normalises it leaves the outer one all the same.
    logits = 0.3 * q @ k.repeat_interleave(by_head, 1).mT + gates
    expected = logits.softmax(-1) @ v.repeat_interleave(by_head, 1)
    torch.testing.assert_close(out, expected.transpose(1, 2), atol=1e-5, rtol=1e-4)
    wanted = torch.autograd.grad(expected.square().sum(), scores, retain_graph=True)
    found = torch.autograd.grad(out.square().sum(), scores)
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-3)


def test_it_is_gone_behind_the_block(model):
    tokens = torch.arange(3, 3 + TOKENS)[None]
    with torch.no_grad():
        before = model(tokens, use_cache=False).logits
        with prefix_gates(1.0):
            gated = model(tokens, use_cache=False).logits
        assert not torch.allclose(before, gated)
        assert torch.equal(before, model(tokens, use_cache=False).logits)


def test_packed_documents_are_read_as_each_by_itself(model):
    tokens = torch.randint(3, 100, (1, TOKENS))
    bounds, places = [0, 9, TOKENS], torch.cat((torch.arange(9), torch.arange(TOKENS - 9)))[None]
    lengths = {f"cu_seq_lens_{one}": torch.tensor(bounds, dtype=torch.int32) for one in "qk"}
    with torch.no_grad(), prefix_gates(0.5):
        packed = model(tokens, position_ids=places, use_cache=False, **lengths).logits
        alone = [model(tokens[:, a:b], use_cache=False).logits for a, b in pairwise(bounds)]
    torch.testing.assert_close(packed, torch.cat(alone, 1), atol=1e-4, rtol=1e-3)
