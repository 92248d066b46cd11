"""Every policy holds the same bytes, and holds what its name says."""

import pytest

from sparsek_cli.errors import UsageError
from sparsek_cli.evaluation.policies.registry import check_names, make_policy, plan_policies


@pytest.fixture
def model(checkpoints):
    from transformers import AutoModelForCausalLM

    import sparsek_cli.models  # noqa: F401

    return AutoModelForCausalLM.from_pretrained(checkpoints[1]).eval()


def read(model, policy, tokens=300):
    """(cache, last logits) after the same random tokens under `policy`."""
    import torch

    ids = torch.randint(0, 128, (1, tokens), generator=torch.Generator().manual_seed(3))
    with policy.applied(model), torch.no_grad():
        cache = policy.new_cache(model)
        logits = model(input_ids=ids, past_key_values=cache, logits_to_keep=1).logits
    return cache, logits


@pytest.mark.parametrize("budget", [None, 48])
def test_bytes_are_equal_and_below_dense(model, budget):
    from sparsek_cli.evaluation.lm.proof import held

    rows = {
        name: held(read(model, make_policy(name, budget))[0])
        for name in ("sparsek", "window", "random")
    }
    assert len(set(rows.values())) == 1
    pairs, size = rows["sparsek"]
    dense_pairs, dense_size = held(read(model, make_policy("dense"))[0])
    assert pairs == 2 * 2 * (budget or 68)  # layers x KV heads x slots
    assert dense_pairs == 2 * 2 * 300
    assert size * dense_pairs == dense_size * pairs


def test_the_8_bit_row_holds_the_same_pairs_in_fewer_bytes(model):
    from sparsek_cli.evaluation.lm.proof import held

    rows = {name: held(read(model, make_policy(name))[0]) for name in ("sparsek", "sparsek:int8")}
    (pairs, size), (coded_pairs, coded_size) = rows.values()
    dim = model.config.hidden_size // model.config.num_attention_heads
    assert coded_pairs == pairs and coded_size == 2 * pairs * (dim + 4) < size
    assert make_policy("sparsek:int8").read_chunk < make_policy("sparsek").read_chunk
    assert "cache_dtype" not in model.config.sparsek


def test_window_by_scores_is_window_by_budget(model):
    import torch

    from sparsek_cli import models
    from sparsek_cli.evaluation.policies.head_budgets import recency

    _, plain = read(model, make_policy("window"))
    with models.replaced_scorers(model, recency):
        _, by_scores = read(model, make_policy("sparsek"))
    torch.testing.assert_close(by_scores, plain, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("budget", [None, 48])
@pytest.mark.parametrize("topk", [[[10, 70], [60, 20]], [[10, 71], [60, 20]]])
def test_uneven_budgets_are_kept_by_the_model_alone(model, topk, budget):
    from sparsek_cli import models
    from sparsek_cli.evaluation.lm.proof import held

    with models.budget(model, topk=topk):
        caches = {
            n: read(model, make_policy(n, budget))[0] for n in ("sparsek", "window", "random")
        }
    assert len({held(cache) for cache in caches.values()}) == 1
    pairs, _ = held(caches["sparsek"])
    assert pairs == (sum(map(sum, topk)) + 4 * 28 if budget is None else 4 * budget)
    slots = {n: [layer.budget.topk for layer in cache.layers] for n, cache in caches.items()}
    assert slots["sparsek"][0] != slots["sparsek"][1]
    if sum(map(sum, topk)) % 4 == 0 or budget:
        assert slots["window"] == [0, 0]
        assert slots["random"] == [20 if budget else 40] * 2
    else:
        # As even as the total can be: never the shares that calibration chose.
        for name in ("window", "random"):
            assert sorted(k for row in slots[name] for k in row) == [40, 40, 40, 41]


def test_random_depends_on_its_seed_alone(model):
    import torch

    first, again = (read(model, make_policy("random", seed=5))[1] for _ in range(2))
    other = read(model, make_policy("random", seed=6))[1]
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_planned_rows(model):
    labels = [p.label for p in plan_policies(model, ["window", "dense"], [64, 128], seed=0)]
    assert labels == ["dense", "sparsek-64", "sparsek-128", "window-64", "window-128"]


def test_unknown_baseline_names_the_nearest():
    with pytest.raises(UsageError, match="unknown baseline 'windows'") as caught:
        check_names(["windows"])
    assert "window" in caught.value.hint


def test_budget_below_window_and_sinks_is_refused(model):
    with (
        pytest.raises(UsageError, match="budget 20 is below"),
        make_policy("sparsek", 20).applied(model),
    ):
        pass


def test_a_dense_model_has_one_row(dense_model):
    labels = [p.label for p in plan_policies(dense_model("llama"), ["dense", "window"], [], seed=0)]
    assert labels == ["dense"]


def test_rows_that_a_model_cannot_have_are_named(checkpoints, tmp_path, tokenizer):
    """Scores drawn at random were measured as `sparsek:int8`; other rows were just not there."""
    import sparsek_cli as sparsek

    settings = {"tasks": ["recall_1"], "lengths": [512], "limit": 1, "device": "cpu"}
    settings |= {"baselines": ["window", "sparsek", "sparsek:int8"], "max_new_tokens": 2}
    settings |= {"budgets": [180]}
    done = sparsek.evaluate(str(checkpoints[0]), tmp_path / "known", **settings)
    assert [unit["policy"] for unit in done.report["units"]] == ["window-180"]
    missing = {item["task"]: item["reason"] for item in done.report["absent"]}
    assert missing.keys() == {"sparsek", "sparsek:int8"}
    assert all("drawn at random" in reason for reason in missing.values())
    assert "not measured: sparsek, sparsek:int8: the model is not converted" in done.text()

    alone = settings | {"baselines": ["dense"]}
    done = sparsek.evaluate(str(checkpoints[0]), tmp_path / "dense", **alone)
    assert "budgets 180: dense attention alone is measured" in done.text()

    from transformers import BloomConfig, BloomForCausalLM

    sizes = {"vocab_size": 128, "hidden_size": 32, "n_layer": 1, "n_head": 4}
    BloomForCausalLM(BloomConfig(**sizes)).save_pretrained(tmp_path / "bloom")
    tokenizer.save_pretrained(tmp_path / "bloom")
    done = sparsek.evaluate(str(tmp_path / "bloom"), tmp_path / "foreign", **settings)
    assert [unit["policy"] for unit in done.report["units"]] == ["dense"]
    absent = [item["task"] for item in done.report["absent"]]
    assert absent == [*settings["baselines"], "budgets 180"]
    assert "models of type bloom cannot be converted" in done.text()


def test_rules_that_evict_do_not_know_layers_that_share_keys(sparse_model):
    """Before anything is measured; those of SparseK's own cache hold the same bytes."""
    from sparsek_cli.evaluation.lm.proof import held

    shared = sparse_model("gemma4_text-shared", topk=8)
    for name in ("snapkv", "h2o", "kvzip:shared"):
        with pytest.raises(UsageError, match="whose queries this baseline does not count") as no:
            plan_policies(shared, ["window", name], [], seed=0)
        assert "dense, window and random" in no.value.hint
    names = [p.name for p in plan_policies(shared, ["window", "random", "dense"], [], seed=0)]
    rows = {name: held(read(shared, make_policy(name))[0]) for name in names}
    assert len(rows) == 4 and len({row for name, row in rows.items() if name != "dense"}) == 1
    assert rows["sparsek"][0] == 2 * 13 + 2 * 5  # slots, and a window of 6 less the query's own
    assert rows["dense"][0] > rows["sparsek"][0]


@pytest.mark.parametrize("family", ["gpt_bigcode", "granitemoehybrid"])
def test_random_pairs_are_kept_in_families_that_hand_attention_no_positions(sparse_model, family):
    import torch

    from sparsek_cli.models.scorer import RandomScorer

    model, seen = sparse_model(family), []
    ids = torch.randint(3, 90, (1, 12), generator=torch.Generator().manual_seed(0))
    policy = make_policy("random")
    with policy.applied(model), torch.no_grad():
        scorer = next(x for x in model.modules() if isinstance(x, RandomScorer))
        scorer.register_forward_pre_hook(
            lambda module, args, given: seen.append(given["position_ids"]), with_kwargs=True
        )
        whole = model(input_ids=ids, use_cache=True)
        cache = policy.new_cache(model)
        for part in ids.split([11, 1], dim=1):
            steps = model(input_ids=part, past_key_values=cache).logits
        mask = torch.tensor([[0] * 3 + [1] * 12])
        padded, places = torch.nn.functional.pad(ids, (3, 0)), (mask.cumsum(-1) - 1).clamp(min=0)
        beside = model(padded, attention_mask=mask, position_ids=places, use_cache=True).logits
    found = [positions.flatten().tolist() for positions in seen]
    assert found == [[*range(12)], [*range(11)], [11], [0] * 3 + [*range(12)]]
    for logits in (steps, beside):
        torch.testing.assert_close(logits[:, -1], whole.logits[:, -1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["gpt_bigcode", "granitemoehybrid"])
def test_windows_that_differ_by_a_pair_need_no_positions_from_a_family(sparse_model, family):
    from sparsek_cli.evaluation.policies.head_budgets import by_layer, per_head
    from sparsek_cli.models import set_budget

    model = sparse_model(family)
    rows = [[3] * len(row) for row in per_head(model)]
    rows[0][0] = 4
    set_budget(model, topk=by_layer(model, rows))
    _, logits = read(model, make_policy("window"), tokens=30)
    assert logits.isfinite().all()


def test_random_scores_of_packed_documents_begin_anew_in_each(sparse_model):
    import torch

    model = sparse_model("gpt_bigcode", topk=2)
    ids = torch.randint(3, 90, (2, 15), generator=torch.Generator().manual_seed(0))
    bounds = torch.tensor([0, 12, 22, 30], dtype=torch.int32)
    places = torch.cat([torch.arange(n) for n in (12, 10, 8)]).view(2, 15)
    with make_policy("random").applied(model), torch.no_grad():
        packed = model(ids, position_ids=places, cu_seq_lens_q=bounds, use_cache=False).logits
        flat = packed.flatten(0, 1)
        for start, end in zip(bounds[:-1], bounds[1:], strict=True):
            alone = model(ids.flatten()[None, start:end], use_cache=False).logits[0]
            torch.testing.assert_close(flat[start:end], alone, rtol=1e-4, atol=1e-4)
