"""Patched outputs are nearer to dense ones, and the same where nothing was evicted."""

import pytest
import torch

from experiments.variants import patches
from sparsek_cli.models import dense_attention, sparsek_config_from


@pytest.mark.parametrize("kind", patches.KINDS)
def test_outputs_come_nearer_and_stay_where_all_fits(kind, dense_config):
    from transformers import AutoModelForCausalLM

    block = {"topk": [[2, 6], [4, 40]], "window": 4, "sinks": 1}
    torch.manual_seed(0)
    config = sparsek_config_from(dense_config("llama"), block)
    model = AutoModelForCausalLM.from_config(config).eval()
    rows = torch.randint(3, 128, (24, 48))
    maps = patches.fit(model, rows, kind)
    seen = {}

    def keep(module, args, output):
        seen[name] = output[0]

    handle = model.model.layers[0].self_attn.register_forward_hook(keep)
    with torch.no_grad():
        name = "sparse"
        model(rows)
        name = "patched"
        with patches.patched(maps):
            model(rows)
        name = "dense"
        with dense_attention(model):
            model(rows)
    handle.remove()
    errors = {n: (seen[n] - seen["dense"]).square().sum((0, 2)) for n in ("sparse", "patched")}
    assert errors["patched"].sum() < errors["sparse"].sum()
    # The smaller head holds 1 + 2 + 4 keys, so that the eighth query is the first to miss one.
    assert torch.equal(seen["patched"][:, :7], seen["sparse"][:, :7])
    assert not torch.allclose(seen["patched"][:, 7:], seen["sparse"][:, 7:])
