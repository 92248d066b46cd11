"""Prompts beyond a model's own length: its rotary positions are stretched, and only on request."""

from dataclasses import replace

import pytest
import torch
from transformers import AutoModel

from sparsek_cli.errors import UsageError
from sparsek_cli.evaluation.measured_model import load_measured
from sparsek_cli.evaluation.settings import loading_of
from sparsek_cli.hub import Checkpoint
from sparsek_cli.loading.positions import stretch


@pytest.fixture
def load(checkpoints, recipe):
    def load(which, **keys):
        path = checkpoints[which]
        wanted = recipe(**keys)
        model, _, _ = load_measured(
            Checkpoint(path, path.name, "folder"), replace(loading_of(wanted), device="cpu"),
            sparse=bool(set(wanted.baselines) - {"dense"}),
        )  # fmt: skip
        return model

    return load


@pytest.mark.parametrize("which", [0, 1])
def test_stretched_is_what_transformers_makes_of_the_config(load, checkpoints, which):
    from transformers import AutoConfig, AutoModelForCausalLM

    from sparsek_cli.models import dense_attention

    config = AutoConfig.from_pretrained(checkpoints[0])
    config.rope_parameters |= {
        "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 2048,
    }  # fmt: skip
    theirs = AutoModelForCausalLM.from_pretrained(checkpoints[0], config=config).eval()
    ours, plain = load(which, yarn=4), load(which)
    assert ours.config.max_position_embeddings == 4 * plain.config.max_position_embeddings
    ids = torch.randint(3, 128, (1, 200), generator=torch.Generator().manual_seed(0))
    logits = []
    for model in (ours, plain):
        with dense_attention(model), torch.no_grad():
            logits.append(model(input_ids=ids).logits)
    with torch.no_grad():
        torch.testing.assert_close(logits[0], theirs(input_ids=ids).logits)
    assert (logits[0] - logits[1]).abs().max() > 1e-3


def test_a_stretched_model_takes_longer_prompts(recipe, console):
    from verbs import evaluate

    from sparsek_cli.evaluation.report.notes import notes

    settings = {"tasks": ["recall_1"], "lengths": [2500], "limit": 1, "baselines": ["dense"]}
    with pytest.raises(UsageError) as caught:
        evaluate(recipe(**settings), console)
    assert "--yarn" in caught.value.hint
    report = evaluate(recipe(**settings, yarn=2), console)
    assert report["units"][0]["proof"]["kv_tokens"] > 2048
    assert "rotary positions stretched 2 times (YaRN)." in notes(report)


def test_models_that_cannot_be_stretched_are_refused():
    from transformers import GPT2Config, LlamaConfig

    with pytest.raises(UsageError, match="has no rotary positions"):
        stretch(GPT2Config(), 2.0)
    config = LlamaConfig()
    stretch(config, 2.0)
    with pytest.raises(UsageError, match=r"scales them already \(yarn\)"):
        stretch(config, 2.0)
    for factor in (1.0, 0.5, -2.0, float("nan"), float("inf")):
        with pytest.raises(UsageError, match="is out of range"):
            stretch(LlamaConfig(), factor)


def test_positions_by_type_of_layer_are_stretched_where_all_is_seen(dense_config):
    config = dense_config("gemma3_text")
    own, before = config.max_position_embeddings, config.rope_parameters
    stretch(config, 4.0)
    after = config.rope_parameters
    assert config.max_position_embeddings == 4 * own
    assert after["sliding_attention"] == before["sliding_attention"]
    assert after["full_attention"]["rope_type"] == "yarn" and "factor" not in after
    turned = [AutoModel.from_config(c).rotary_emb for c in (dense_config("gemma3_text"), config)]
    for kind, same in (("sliding_attention", True), ("full_attention", False)):
        found = [getattr(each, f"{kind}_inv_freq") for each in turned]
        assert torch.equal(*found) == same
    with pytest.raises(UsageError, match=r"scales them already \(yarn\)"):
        stretch(config, 2.0)


def test_dense_has_the_positions_that_transformers_has_at_each_length(
    make_checkpoint, convert, recipe, console, tmp_path
):
    """And SparseK those of the model's own length, in short texts too."""
    from verbs import evaluate

    from sparsek_cli.evaluation.report.notes import notes

    short, long = [1.0, 1.1, 1.2, 1.3], [2.0, 4.0, 8.0, 16.0]

    def losses(short, long):
        folder = tmp_path / str(len([*tmp_path.iterdir()]))
        rope = {
            "rope_type": "longrope", "original_max_position_embeddings": 300,
            "short_factor": short, "long_factor": long,
        }  # fmt: skip
        base = make_checkpoint(
            folder / "base", "llama", max_position_embeddings=2048, rope_parameters=rope
        )
        settings = {"tasks": ["ppl"], "lengths": [200, 600], "limit": 2, "baselines": ["dense"]}
        found = {}
        for kind, model in (("base", base), ("out", convert(base, folder / "out"))):
            out = folder / f"{kind}-results"
            report = evaluate(recipe(model=str(model), out=str(out), **settings), console)
            assert [n for n in notes(report) if "positions: long factors" in n]
            for unit in report["units"]:
                value = unit["metrics"]["ppl"]["value"]
                found[kind, unit["policy"].split("-")[0], unit["length"]] = value
        assert len(found) == 6
        return found

    both, shorts, longs = losses(short, long), losses(short, short), losses(long, long)
    assert all(shorts[key] != longs[key] for key in both)
    for key in both:
        _, policy, length = key
        assert both[key] == (shorts if policy == "dense" and length == 200 else longs)[key], key


def test_models_without_keys_are_refused(make_checkpoint, recipe, console, tmp_path):
    """It ended at the first prompt, as an error of ours: the cache was not even looked at."""
    from transformers import MambaConfig, MambaForCausalLM
    from verbs import evaluate

    sizes = {"vocab_size": 128, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 4}
    model = MambaForCausalLM(MambaConfig(**sizes, eos_token_id=2, bos_token_id=1, pad_token_id=0))
    folder = make_checkpoint(tmp_path / "mamba", model=model)
    with pytest.raises(UsageError, match=r"keeps no keys and values of what it reads \(mamba\)"):
        evaluate(recipe(model=str(folder), tasks=["recall_1"], baselines=["dense"]), console)
