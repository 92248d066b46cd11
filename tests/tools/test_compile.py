"""torch.compile and torch.export see one node where keys are chosen, and no graph break."""

from __future__ import annotations

import pytest
import torch
from sparsek_kernels import sparsek_attention
from sparsek_kernels.pytorch.ops import attention_op


def shapes(model, ids) -> tuple[torch.Tensor, dict]:
    """A decoder layer's input, and what it is called with."""
    hidden = torch.randn(*ids.shape, model.config.hidden_size)
    positions = torch.arange(ids.shape[1])[None]
    rotary = model.model.rotary_emb(hidden, positions)
    return hidden, {"position_embeddings": rotary, "position_ids": positions}


def test_decoder_layers_compile_without_a_break(model, ids):
    layer, (hidden, given) = model.model.layers[0], shapes(model, ids)
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    outputs, gradients = [], []
    for run in (layer, compiled):
        layer.zero_grad()
        x = hidden.clone().requires_grad_()
        out = run(x, **given)
        out.square().sum().backward()
        outputs.append(out.detach())
        gradients.append([x.grad, *(p.grad.clone() for p in layer.parameters())])
    torch.testing.assert_close(*outputs)
    scorer = [name for name, _ in layer.named_parameters() if ".scorer." in name]
    assert scorer and all(g is not None and g.abs().max() > 0 for g in gradients[0])
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_a_forward_pass_exports(model, ids):
    with torch.no_grad():
        program = torch.export.export(model, (ids,), {"use_cache": False}, strict=False)
        expected = model(ids, use_cache=False).logits
        torch.testing.assert_close(program.module()(ids, use_cache=False).logits, expected)
    graphs = [m.graph for m in program.graph_module.modules() if hasattr(m, "graph")]
    nodes = [node.target for graph in graphs for node in graph.nodes]
    assert nodes.count(torch.ops.sparsek.attention_pytorch.default) == 2  # one per layer


@pytest.mark.parametrize("gate, softcap", [("straight_through", None), ("log", 2.0), ("kv", None)])
def test_the_op_says_what_it_does(gate, softcap):
    """Its fake kernel has the real one's shapes, and its gradients are those of plain autograd."""
    torch.manual_seed(0)
    q = torch.randn(1, 4, 14, 8, dtype=torch.float64, requires_grad=True)
    k, v = (torch.randn(1, 2, 14, 8, dtype=torch.float64, requires_grad=True) for _ in range(2))
    scores = torch.randn(1, 2, 14, dtype=torch.float64, requires_grad=True)
    slopes = torch.rand(2, dtype=torch.float64, requires_grad=True)
    own = torch.randn(4, dtype=torch.float64, requires_grad=True)
    pairs = torch.randn(4, 2, 18, dtype=torch.float64, requires_grad=True)
    bounds = torch.tensor([0, 5, 14])
    for cu_seqlens in (None, bounds):
        tensors = q, k, v, scores, slopes, own, pairs
        arguments = (*tensors, cu_seqlens, [2, 3], 3, 1, gate, 0.3, softcap)
        torch.library.opcheck(attention_op, arguments)
        expected = sparsek_attention(
            q, k, v, scores, topk=(2, 3), window=3, sinks=1, slopes=slopes, gate=gate, scale=0.3,
            cu_seqlens=cu_seqlens, softcap=softcap, sink_logits=own, stand_ins=pairs,
        )  # fmt: skip
        found = attention_op(*arguments)
        torch.testing.assert_close(found, expected)
        weight = torch.randn_like(expected)
        for ours, theirs in zip(
            *(torch.autograd.grad((x * weight).sum(), tensors) for x in (found, expected)),
            strict=True,
        ):
            torch.testing.assert_close(ours, theirs)
