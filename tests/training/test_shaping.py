"""Whether the gradient of scores reaches the layers below."""

import pytest
import torch

from sparsek_cli.models.scorer import SparseKScorer
from sparsek_cli.recipes.load import load_recipe
from sparsek_cli.recipes.schema_finetune import FinetuneRecipe
from sparsek_cli.training.losses.future_attention import FutureAttention
from sparsek_cli.training.parameters import choose_parameters


def small_model(**settings):
    from transformers import AutoConfig, AutoModelForCausalLM

    from sparsek_cli.models import sparsek_config_from

    shape = dict(vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=2,
                 num_attention_heads=2, num_key_value_heads=1)  # fmt: skip
    config = AutoConfig.for_model("llama", **shape)
    settings = {"topk": 4, "window": 4, "sinks": 0, **settings}
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(sparsek_config_from(config, settings))


@pytest.mark.parametrize("shapes", [True, False])
def test_a_scorer_learns_and_the_layers_below_only_if_they_should(shapes):
    scorer = SparseKScorer(8, 2)
    for parameter in scorer.parameters():
        torch.nn.init.normal_(parameter)
    scorer.shapes_input = shapes
    hidden = torch.randn(1, 5, 8, requires_grad=True)
    scorer(hidden)[0].square().sum().backward()
    assert scorer.weight.grad.abs().sum() > 0
    assert (hidden.grad is not None) == shapes


@pytest.mark.parametrize(
    ("recipe", "shapes"),
    [
        ("full", False),
        ("lora", False),
        ("scratch-llama", True),
        ("scorers", True),  # there is no base to shape, but scorers of the layers below
    ],
)
def test_a_converted_base_is_left_alone_and_one_from_scratch_is_not(recipe, shapes):
    request = load_recipe(FinetuneRecipe, recipe, verb="finetune")
    model = small_model()
    choose_parameters(model, request.train, request.lora, shape_base=request.shapes_base)
    scorers = [m for name, m in model.named_modules() if name.endswith(".scorer")]
    assert len(scorers) == 2 and all(scorer.shapes_input == shapes for scorer in scorers)


@pytest.mark.parametrize("how", ["gates", "concurrent", "refit", "frozen"])
def test_stand_ins_learn_unless_scorers_are_frozen(how):
    model = small_model(topk=[4, 0], scorer={"type": "linear", "stand_ins": 1})
    choose_parameters(model, "all", scorers=how)
    first, second = (layer.self_attn.scorer for layer in model.model.layers)
    assert first.stand_ins.requires_grad == second.stand_ins.requires_grad == (how != "frozen")
    assert not first.stand_ins.refitted
    # A layer that selects nothing leaves tokens out all the same.
    assert not second.weight.requires_grad
    with torch.no_grad():
        second.stand_ins.normal_()
    ids = torch.arange(3, 23)[None]
    if how != "frozen":
        model(ids, labels=ids, use_cache=False).loss.backward()
        assert second.stand_ins.grad.abs().sum() > 0


@pytest.mark.parametrize("train", ["scorers", "all"])
def test_stand_ins_do_not_learn_from_the_loss_of_scores_above(train):
    model = small_model(scorer={"type": "linear", "stand_ins": 1})
    choose_parameters(model, train, scorers="concurrent")
    first, second = (layer.self_attn.scorer for layer in model.model.layers)
    with torch.no_grad():
        first.stand_ins.normal_()
    future = FutureAttention()
    future.begin(torch.ones(1, 40, dtype=torch.int8), None)
    with future.attached():
        model.train()(torch.randint(3, 32, (1, 40)), use_cache=False)
        future.loss().backward()
    assert second.weight.grad.abs().sum() > 0
    assert first.stand_ins.grad is None or not first.stand_ins.grad.any()
