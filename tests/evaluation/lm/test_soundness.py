"""Sabotaged models and policies are caught, and sound ones pass."""

from contextlib import ExitStack

import pytest

from sparsek_cli.errors import SparsekError


@pytest.fixture
def model(checkpoints):
    from transformers import AutoModelForCausalLM

    import sparsek_cli.models  # noqa: F401

    return AutoModelForCausalLM.from_pretrained(checkpoints[1]).eval()


@pytest.fixture
def sabotage():
    """`sabotage(change)`: SparseK attention with `change(scores)` for its scores."""
    from sparsek_cli.models.attention.registration import replaced_attention

    with ExitStack() as stack:

        def install(change):
            def changing(attend):
                return lambda *args, sparsek_scores, **kwargs: attend(
                    *args, sparsek_scores=change(sparsek_scores), **kwargs
                )

            stack.enter_context(replaced_attention("sparsek", changing))

        yield install


def check(model, **options):
    from sparsek_cli.evaluation.lm.soundness import check_soundness

    return check_soundness(model, limit=2048, **options)


def test_a_sound_model_passes(model):
    found = check(model)
    assert found["checked"]
    assert found["leak"] < 1e-4 < found["score_effect"]


@pytest.mark.parametrize("topk", [0, [[0, 0], [0, 0]]])
def test_a_window_alone_is_sound(model, topk):
    """Nothing is selected that scores could decide on, and that was said to be their fault."""
    import sparsek_cli.models as models

    with models.budget(model, topk=topk):
        assert check(model)["checked"]
    with models.budget(model, topk=[[0, 0], [0, 4]]):
        assert check(model)["score_effect"] > 1e-4


def test_weights_that_are_no_numbers_are_blamed(model):
    """It was a cache that lost pairs, to be reported."""
    import torch

    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[0, 0] = float("nan")
    with pytest.raises(SparsekError, match="output is not a number") as caught:
        check(model)
    assert "weights are damaged" in caught.value.hint


def test_a_budget_beyond_the_model_is_not_checked(model):
    from sparsek_cli.evaluation.lm.soundness import check_soundness

    assert not check_soundness(model, limit=64)["checked"]


def test_scores_that_are_ignored_are_caught(model, sabotage):
    sabotage(lambda scores: scores * 0)
    for attention in (layer.self_attn for layer in model.model.layers):
        attention.scorer.slopes.data.zero_()
    with pytest.raises(SparsekError, match="scores do not decide"):
        check(model)


def test_scores_that_see_the_future_are_caught(model, sabotage):
    sabotage(lambda scores: scores - scores.mean(dim=-1, keepdim=True) * (scores > 0))
    with pytest.raises(SparsekError, match="sees the future"):
        check(model)


def test_a_cache_that_grows_is_caught(model):
    import torch

    from sparsek_cli.evaluation.policies.sparse import SparseK
    from sparsek_cli.models import SparseKCache

    class Growing(SparseKCache):
        """Keeps every key beside the slots."""

        def update(self, key_states, value_states, layer_idx, *args, **kwargs):
            layer = self.layers[layer_idx]
            extra = getattr(layer, "extra", key_states[:, :, :0])
            layer.extra = torch.cat([extra, key_states], dim=2)
            return super().update(key_states, value_states, layer_idx, *args, **kwargs)

    class Sabotaged(SparseK):
        def new_cache(self, model):
            cache = Growing(model.config)
            for layer in cache.layers:
                layer.__class__ = Layer
            return cache

    class Layer(type(SparseKCache(model.config).layers[0])):
        @property
        def keys(self):
            kept = super().keys
            return None if kept is None else torch.cat([kept.flatten(), self.extra.flatten()])

    with pytest.raises(SparsekError, match="cache grew"):
        check(model, policy=Sabotaged())


def test_a_prompt_in_pieces_that_leaves_pairs_twice_is_caught(model):
    from sparsek_cli.models.attention.registration import replaced_attention

    def doubling(attend):
        def doubled(*args, sparsek_cache, **kwargs):
            out = attend(*args, sparsek_cache=sparsek_cache, **kwargs)
            if sparsek_cache is not None:
                sparsek_cache.state.positions[:, 5] = sparsek_cache.state.positions[:, 6]
            return out

        return doubled

    caught = pytest.raises(SparsekError, match="in the cache twice or not at all")
    with replaced_attention("sparsek", doubling), caught:
        check(model)


def test_a_cache_that_holds_pairs_twice_is_caught():
    from sparsek_cli.evaluation.lm.proof import Proof, check

    labels = {"sparse": True, "most_pairs": 900, "task": "ppl", "policy": "sparsek"}
    seen = {"sparse_calls": 1, "kv_tokens": 100}
    check(Proof(**seen, kv_pairs=800, kept_share=1.0), **labels)
    with pytest.raises(SparsekError, match="some stand in it twice"):
        check(Proof(**seen, kv_pairs=804, kept_share=1.005), **labels)


def test_a_run_without_sparse_attention_fails(recipe, console, monkeypatch):
    from verbs import evaluate

    from sparsek_cli.evaluation import run
    from sparsek_cli.evaluation.policies.policy import Policy
    from sparsek_cli.models import dense_attention

    def applied(self, model):
        return dense_attention(model)

    monkeypatch.setattr(Policy, "applied", applied)
    monkeypatch.setattr(Policy, "new_cache", lambda self, model: _dynamic(model))
    monkeypatch.setattr(run, "check_policies", lambda *args: {})
    with pytest.raises(SparsekError, match="SparseK attention was never called"):
        evaluate(recipe(tasks=["ppl"], limit=1), console)


def _dynamic(model):
    from transformers import DynamicCache

    return DynamicCache(config=model.config)
