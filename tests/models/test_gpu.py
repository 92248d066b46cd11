"""The same promises on a CUDA device, where tensors must follow the model; run by hand."""

import pytest
import torch

import sparsek_cli.models as models

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def _needs_cuda():
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")


@pytest.fixture
def ids():
    return torch.randint(4, 128, (2, 48), device="cuda")


def larger(sparse_model, family, **options):
    """Head size 32 and a budget of 16 + 16 + 4: shapes that kernels accept."""
    width = {"n_embd": 128} if family == "gpt2" else {"hidden_size": 128, "head_dim": 32}
    if family in ("gpt_neox", "qwen2"):
        width.pop("head_dim")
    return sparse_model(family, topk=16, window=16, sinks=4, **width, **options).cuda()


@torch.no_grad()
def test_equals_dense_and_decodes(family, sparse_model, ids):
    model = larger(sparse_model, family)
    whole = model(ids, use_cache=False).logits
    cache = models.SparseKCache(model.config)
    parts = [model(part, past_key_values=cache).logits for part in ids.split([9, 1, 37, 1], 1)]
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, atol=2e-3, rtol=2e-3)
    models.set_budget(model, topk=48)
    roomy = model(ids, use_cache=False).logits
    with models.dense_attention(model):
        dense = model(ids, use_cache=False).logits
    torch.testing.assert_close(roomy, dense, atol=2e-3, rtol=2e-3)


@torch.no_grad()
def test_generates_padded_beams_and_random(family, sparse_model, ids):
    model = larger(sparse_model, family, dtype="bfloat16")
    mask = torch.ones_like(ids)
    mask[0, :20] = 0
    options = {"attention_mask": mask, "max_new_tokens": 5, "eos_token_id": None}
    assert model.generate(ids, do_sample=False, **options).shape == (2, 53)
    assert model.generate(ids, do_sample=False, num_beams=3, **options).shape == (2, 53)
    with models.random_scores(model):
        assert model.generate(ids, do_sample=True, **options).shape == (2, 53)


def test_trains_packed_documents(family, sparse_model, ids):
    model = larger(sparse_model, family).train()
    bounds = torch.tensor([0, 30, 31, 96], dtype=torch.int32, device="cuda")
    packed = {"input_ids": ids.view(1, -1), "labels": ids.view(1, -1), "cu_seq_lens_q": bounds}
    model.gradient_checkpointing_enable()
    with torch.autocast("cuda", dtype=torch.bfloat16):
        with torch.no_grad(), models.dense_attention(model):
            assert model(**packed).loss.isfinite()
        loss = model(**packed).loss
    loss.backward()
    for attention in models.sparsek_attentions(model):
        assert attention.scorer.weight.grad.abs().max() > 0
    assert all(weight.grad.isfinite().all() for weight in model.parameters())


@torch.no_grad()
def test_scores_of_few_rows_are_one_launch_and_exact():
    """A row alone scores what it scores among others, and what tensor cores make of a prompt's."""
    from sparsek_cli.models.scorer import MANY_ROWS, SparseKScorer

    new = torch.Generator("cuda").manual_seed(0)
    scorer = SparseKScorer(2048, 8).cuda()
    for parameter in scorer.parameters():
        parameter.normal_(generator=new)
    x = torch.randn(1, MANY_ROWS, 2048, generator=new, device="cuda").bfloat16()
    exact = torch.nn.functional.linear(x.double(), scorer.weight.double(), scorer.bias.double())
    few = scorer(x[:, :64])[0]  # compiled before it is counted
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as seen:
        few = scorer(x[:, :64])[0]
        torch.cuda.synchronize()
    kernels = [event for event in seen.events() if event.device_type.name == "CUDA"]
    assert few.shape == (1, 8, 64) and len(kernels) == 1
    for scores, tolerance in ((few, 3e-7), (scorer(x)[0][..., :64], 1e-5)):  # these cut sums off
        assert (scores.mT - exact[:, :64]).norm() / exact[:, :64].norm() < tolerance
    assert torch.equal(scorer(x[:, 7:8])[0][..., 0], few[..., 7])


def test_split_product_is_a_float32_product():
    """Scores of bf16 hidden states come from the tensor cores, exact to float32."""
    from sparsek_cli.models.scorer import SplitProduct, _bf16_parts, _product, _stacked_parts

    new = torch.Generator("cuda").manual_seed(0)
    x = torch.randn(2, 1024, 512, generator=new, device="cuda").bfloat16().requires_grad_()
    weight = torch.randn(8, 512, generator=new, device="cuda").requires_grad_()
    grad = torch.randn(2, 1024, 8, generator=new, device="cuda")
    mine = SplitProduct.apply(x, weight)
    exact = [t.detach().double().requires_grad_() for t in (x, weight)]
    wanted = exact[0] @ exact[1].T
    assert (mine - wanted).norm() / wanted.norm() < 1e-6
    assert torch.equal(_stacked_parts(weight), torch.cat(_bf16_parts(weight, 3)))
    with torch.no_grad():  # no node of autograd, the same bits
        assert torch.equal(_product(x, weight), mine)
    pairs = zip(
        torch.autograd.grad(mine, (x, weight), grad),
        torch.autograd.grad(wanted, exact, grad.double()),
        (4e-3, 1e-4),  # x's gradient is rounded to bf16
        strict=True,
    )
    for got, true, tolerance in pairs:
        assert (got - true).norm() / true.norm() < tolerance


def test_graphs_write_what_the_model_writes(sparse_model):
    """`measure` itself compares tokens, so that a graph which does not fails here."""
    from sparsek_cli.benchmarks.generate import measure

    model = larger(sparse_model, "llama", dtype="bfloat16")
    (row,) = measure(model, [100], batch=2, tokens=20, repeats=1, seed=0, say=print)
    assert row["cuda_graphs"] and not row["missing"] and row["ratio"] > 0


@torch.no_grad()
def test_generate_replays_a_graph_that_writes_what_eager_steps_write(
    sparse_model, ids, monkeypatch
):
    from sparsek_cli.models.generation import kept_decoders, why_eager

    model = larger(sparse_model, "llama", dtype="bfloat16")
    model.fused_steps = False  # these round differently
    mask = torch.ones_like(ids)
    mask[0, :20] = 0
    options = {"attention_mask": mask, "max_new_tokens": 30, "do_sample": False}
    ended = {"eos_token_id": list(range(30)), "pad_token_id": 0}
    for more in ({"eos_token_id": None}, ended):
        with monkeypatch.context() as patch:
            patch.setattr(why_eager, "has_graphs", lambda device: False)
            expected = model.generate(ids, **options, **more)
        for _ in range(2):
            assert torch.equal(model.generate(ids, **options, **more), expected)
    assert any(decoder._graph is not None for decoder in kept_decoders._graphs[model])


@torch.no_grad()
@pytest.mark.parametrize("rows", [1, 2])
def test_fused_steps_write_what_others_write(sparse_model, ids, rows):
    """In float32, where rounding decides no token: without slopes like tokens tie, and it does."""
    from sparsek_cli.models.generation import kept_decoders

    model = larger(sparse_model, "llama")
    for attention in models.sparsek_attentions(model):
        attention.scorer.slopes.fill_(0.01)
    options = {"max_new_tokens": 40, "do_sample": False, "eos_token_id": None}
    model.fused_steps = False
    expected = model.generate(ids[:rows], **options)
    kept_decoders._graphs.clear()
    model.fused_steps = True
    assert torch.equal(model.generate(ids[:rows], **options), expected)
    (decoder,) = kept_decoders._graphs[model]
    assert sum(decoder.fused.taken.values()) >= model.config.num_hidden_layers
    assert not decoder.fused.left
