"""Decoding steps by fused launches: what a model's own modules give, whatever of it is replaced."""

import logging

import pytest
import torch
from sparsek_kernels.triton import linears
from torch import nn

import sparsek_cli.models as models
from sparsek_cli.models.generation import cuda_graphs as graphs
from sparsek_cli.models.generation import likeliest as picks
from sparsek_cli.models.generation import why_eager

pytestmark = pytest.mark.interpret
_LOGITS = torch.tensor([[1.0, 3.0, 3.0, -1.0], [torch.nan, 2.0, torch.nan, 5.0]])
SMALL = {"topk": 4, "window": 4, "sinks": 1, "num_hidden_layers": 1}


def fused_of(model, rows):
    from sparsek_cli.models.generation.fused.modules import FusedModules

    return FusedModules(model, rows)


@torch.no_grad()
def steps(model, cache, rows, count=2):
    """Logits [count, rows, V] of `count` tokens each, rows at their own positions."""
    outs = []
    places = cache.layers[0].state.seen.clone()
    for step in range(count):
        words = torch.arange(rows)[:, None] * 7 + step + 5
        given = {"position_ids": (places + step)[:, None], "past_key_values": cache}
        outs.append(model(words, use_cache=True, logits_to_keep=1, **given).logits[:, -1])
    return torch.stack(outs)


@torch.no_grad()
def both(model, rows):
    """(FusedModules, logits without them, logits with them) after the same prompt."""
    cache = models.SparseKCache(model.config)
    model(torch.randint(4, 128, (rows, 9)), past_key_values=cache)
    plain = steps(model, models.fork(cache), rows)
    fused = fused_of(model, rows)
    with fused.installed():
        found = steps(model, cache, rows)
    return fused, plain, found


@pytest.mark.parametrize("family, rows", [("qwen2", 1), ("qwen3", 3)])
def test_a_step_is_the_models_own(sparse_model, family, rows):
    """qwen2 has biases, qwen3 norms over each head."""
    model = sparse_model(family, **SMALL, tie_word_embeddings=False)
    fused, plain, found = both(model, rows)
    torch.testing.assert_close(found, plain, atol=2e-5, rtol=1e-4)
    # The layer, the norm, the head and rotary positions.
    assert sum(fused.taken.values()) == 4 and not fused.left
    assert fused.taken[type(model.model.layers[0]).__name__] == 1
    assert not any("forward" in vars(module) for module in model.modules())


def test_an_mlp_scorer_is_part_of_it(sparse_model):
    model = sparse_model("llama", **SMALL)
    with torch.no_grad():
        for attention in models.sparsek_attentions(model):
            scorer = models.scorer.SparseKMlpScorer(32, attention.scorer.weight.shape[0], 6)
            for weight in scorer.parameters():
                weight.normal_()
            attention.scorer = scorer.eval()
    fused, plain, found = both(model, 1)
    assert "LlamaDecoderLayer" in fused.taken
    torch.testing.assert_close(found, plain, atol=2e-5, rtol=1e-4)


def test_another_kind_of_layer_keeps_its_own_forward(sparse_model, caplog):
    """gpt_neox has two biased norms and a plain MLP: its maps are taken one by one."""
    with caplog.at_level(logging.INFO, logger="sparsek_cli"):
        fused, plain, found = both(sparse_model("gpt_neox", **SMALL), 1)
    assert set(fused.taken) == {"Linear", "GPTNeoXRotaryEmbedding"}
    torch.testing.assert_close(found, plain, atol=2e-5, rtol=1e-4)
    assert caplog.text.count("fused for steps of 1 rows") == 1


def test_a_module_that_computes_something_else_is_left(sparse_model):
    """The same parts under the same names: only what they compute can tell."""
    model = sparse_model("llama", **SMALL)
    layer = model.model.layers[0]
    kind = type(layer)

    class Halved(kind):
        def forward(self, hidden_states, **kwargs):
            return 0.5 * super().forward(hidden_states, **kwargs)

    class Doubled(type(layer.mlp)):
        def forward(self, x):
            return 2 * super().forward(x)

    layer.__class__, layer.mlp.__class__ = Halved, Doubled
    fused, plain, found = both(model, 1)
    assert {"Doubled", "Halved"} == set(fused.left)
    # All maps one by one, and the norms: the layer's two and the last.
    assert fused.taken == {"Linear": 8, "LlamaRMSNorm": 3, "LlamaRotaryEmbedding": 1}
    torch.testing.assert_close(found, plain, atol=2e-5, rtol=1e-4)


def test_what_does_not_compile_is_left(sparse_model, monkeypatch, caplog):
    def fail(*args, **kwargs):
        raise RuntimeError("out of resources: shared memory")

    monkeypatch.setattr(linears, "gated", fail)
    with caplog.at_level(logging.INFO, logger="sparsek_cli"):
        fused, plain, found = both(sparse_model("llama", **SMALL), 1)
    assert set(fused.left) == {"LlamaDecoderLayer", "LlamaMLP"} and fused.taken["Linear"]
    assert "out of resources" in caplog.text
    torch.testing.assert_close(found, plain, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("size", [1.0, 1e-3])
def test_another_activation_is_seen_however_small_its_inputs(sparse_model, size):
    """Near 0 GELU is SiLU to rounding: outputs of rows would not tell them apart."""
    model = sparse_model("llama", **SMALL)
    mlp = model.model.layers[0].mlp
    mlp.act_fn = nn.GELU()
    with torch.no_grad():
        mlp.gate_proj.weight.mul_(size)
    fused = fused_of(model, 1)
    assert fused.taken == {"Linear": 8, "LlamaRMSNorm": 3, "LlamaRotaryEmbedding": 1}


@torch.no_grad()
@pytest.mark.parametrize(
    "rope, taken",
    [
        ({"rope_type": "default"}, True),
        ({"rope_type": "yarn", "factor": 4.0}, True),  # cosines and sines are scaled
        ({"rope_type": "dynamic", "factor": 4.0}, True),  # those of the model's own length
        ({"rope_type": "dynamic", "factor": 4.0}, False),  # other frequencies later on
    ],
    ids=["default", "yarn", "dynamic", "theirs"],
)
def test_rotary_positions_of_fixed_frequencies_are_taken(sparse_model, rope, taken):
    model = sparse_model("llama", **SMALL, rope_parameters={"rope_theta": 1e4, **rope})
    rotary = model.model.rotary_emb
    if not taken:
        rotary.rope_type = rope["rope_type"]
    fused = fused_of(model, 2)
    assert fused.taken["LlamaRotaryEmbedding"] == taken
    x, places = torch.zeros(2, 1, 64), torch.tensor([[5], [70_000]])
    expected = rotary(x, places)
    with fused.installed():
        assert ("forward" in vars(rotary)) == taken
        for part, wanted in zip(rotary(x, places), expected, strict=True):
            torch.testing.assert_close(part, wanted, atol=1e-6, rtol=1e-6)


@torch.no_grad()
def test_rotary_positions_that_are_others_are_left(sparse_model):
    model = sparse_model("llama", **SMALL)
    kind = type(model.model.rotary_emb)

    class Swapped(kind):
        def forward(self, x, position_ids):
            return super().forward(x, position_ids)[::-1]

    model.model.rotary_emb.__class__ = Swapped
    assert fused_of(model, 1).left["Swapped"] == 1


def test_hooks_and_wrapped_forwards_are_not_passed_by(sparse_model):
    model = sparse_model("llama", **SMALL)
    calls = []
    model.model.layers[0].mlp.down_proj.register_forward_hook(lambda *_: calls.append(1))
    _, plain, found = both(model, 1)
    assert len(calls) >= 5  # the prompt and the steps of both ways
    torch.testing.assert_close(found, plain, atol=2e-5, rtol=1e-4)


@torch.no_grad()
def test_other_inputs_go_to_the_modules_themselves(sparse_model):
    model = sparse_model("llama", **SMALL)
    ids, mask = torch.randint(4, 128, (2, 11)), torch.ones(2, 11, dtype=torch.long)
    mask[0, :4] = 0
    expected = model(ids, attention_mask=mask).logits
    with fused_of(model, 2).installed():
        assert torch.equal(model(ids, attention_mask=mask).logits, expected)
        assert torch.equal(model(ids[:1]).logits, model(ids[:1], use_cache=False).logits)


def test_more_rows_than_the_kernels_take_are_left_alone(sparse_model):
    fused, plain, found = both(sparse_model("llama", **SMALL), 17)
    assert not fused.taken and torch.equal(plain, found)


class Replayed:
    """In place of a CUDA graph: a replay runs the step that was captured again."""

    def __init__(self):
        self.step, self.replays = None, 0

    def replay(self):
        self.replays += 1
        if self.replays > 1:  # the capture here has run it once
            self.step()


def test_generate_takes_them_where_a_step_is_a_graph(sparse_model, monkeypatch):
    model = sparse_model("llama", **SMALL)
    ids = torch.randint(4, 128, (1, 9))
    options = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None}
    expected = model.generate(ids, **options)
    made, used = [], []

    class Capture:
        def __init__(self, graph, **_):
            made.append(graph)

        def __enter__(self):
            pass

        def __exit__(self, *_):
            pass

    run = graphs.Decoder._run

    def noted(self):
        for graph in made:
            graph.step = lambda: run(self)
        used.append(self.fused is not None)
        run(self)

    monkeypatch.setattr(why_eager, "has_graphs", lambda device: True)
    for module in (why_eager.dispatch, picks):
        monkeypatch.setattr(module, "explain", lambda *_: ("triton", "acted"))
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Replayed)
    monkeypatch.setattr(torch.cuda, "graph", Capture)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(graphs.Decoder, "_run", noted)
    model.fused_steps = False
    assert torch.equal(model.generate(ids, **options), expected)
    assert used and not any(used)
    used.clear()
    model.fused_steps = True
    assert torch.equal(model.generate(ids, **options), expected)
    assert all(used) and made[-1].replays == 2


@pytest.mark.parametrize(
    "logits, own",
    [
        (_LOGITS, True),
        (_LOGITS.bfloat16(), True),
        (_LOGITS.double(), False),
        (_LOGITS.T.contiguous().T, False),
    ],
    ids=["float32", "bfloat16", "float64", "columns"],
)
def test_our_own_kernel_picks_where_triton_runs(monkeypatch, logits, own):
    from sparsek_kernels.triton.decode import likeliest as kernels

    calls = []

    def noted(logits, *ending, kernel=kernels.likeliest):
        calls.append(logits)
        return kernel(logits, *ending)

    monkeypatch.setattr(kernels, "likeliest", noted)
    assert picks.likeliest(logits).tolist() == [1, 0] and not calls  # a CPU
    monkeypatch.setattr(picks, "explain", lambda *_: ("triton", "acted"))
    assert picks.likeliest(logits).tolist() == [1, 0] and len(calls) == own
    ending = picks.Ending(torch.tensor([1, 1]), ends=torch.tensor([1]), pad=torch.tensor(3))
    assert picks.likeliest(logits, ending).tolist() == [1, 0]
    assert picks.likeliest(logits, ending).tolist() == [3, 0] and len(calls) == 3 * own
    assert ending.running.tolist() == [0, 1]
