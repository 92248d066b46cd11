"""SnapKV's and H2O's rules: what they keep, how much, and that nothing else changes."""

import pytest
import torch

from sparsek_cli.evaluation.lm.batching import join
from sparsek_cli.evaluation.policies import evicting_layer, snapkv_h2o
from sparsek_cli.evaluation.policies.registry import make_policy, plan_policies
from sparsek_cli.models.logits import Logits

SLOTS, RECENT = 20, 8


@pytest.fixture
def model(checkpoints):
    from transformers import AutoModelForCausalLM

    import sparsek_cli.models  # noqa: F401

    return AutoModelForCausalLM.from_pretrained(checkpoints[1]).eval()


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def ids(tokens, seed=3):
    return torch.randint(3, 128, (1, tokens), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("block", [1 << 28, 4 * 4 * 30 * 7])
def test_mass_is_the_sum_of_attention_weights(monkeypatch, block):
    monkeypatch.setattr(evicting_layer, "BLOCK_BYTES", block)
    query, keys = draw(1, 4, 11, 8), draw(1, 2, 30, 8, seed=1)
    logits = query @ keys.repeat_interleave(2, dim=1).transpose(-1, -2) * 0.3
    later = torch.ones(11, 30, dtype=torch.bool).triu(20)
    weights = logits.masked_fill(later, -torch.inf).softmax(-1)
    naive = weights.sum(2).unflatten(1, (2, 2)).sum(2)
    torch.testing.assert_close(evicting_layer.attention_mass(query, keys, Logits(0.3)), naive)


def fed(name, chunks, seed=0):
    """A layer after tokens in `chunks`, its prompt ended after the second last; what was fed."""
    layer = make_policy(name).layer(SLOTS, RECENT)
    total = sum(chunks)
    query, keys = draw(1, 4, total, 8, seed=seed), draw(1, 2, total, 8, seed=seed + 1)
    start = 0
    for number, size in enumerate(chunks):
        if number == len(chunks) - 1:
            layer.rank()
            snapkv_h2o.evict([layer], shared=False)
            for at in range(start, total):
                layer.update(keys[:, :, at : at + 1], keys[:, :, at : at + 1])
                layer.see(query[:, :, at : at + 1], Logits(0.3))
            return layer, query, keys
        layer.update(keys[:, :, start : start + size], keys[:, :, start : start + size])
        layer.see(query[:, :, start : start + size], Logits(0.3))
        start += size


def naive_kept(name, query, keys, prompt):
    """Positions that each KV head holds at the end, by the rule's words, one token at a time."""
    total, kept = keys.shape[2], []
    for head in range(2):
        k, q = keys[0, head], query[0, 2 * head : 2 * head + 2]
        weights = torch.stack(
            [(q[h] @ k.T * 0.3).masked_fill(torch.ones(total, total).triu(1) > 0, -torch.inf)
             .softmax(-1) for h in range(2)]
        )  # fmt: skip
        if name == "h2o":
            mass = weights[:, :prompt].sum((0, 1))
        else:
            seen = weights[:, max(0, prompt - snapkv_h2o.OBSERVED) : prompt, :prompt].sum((0, 1))
            padded = torch.nn.functional.pad(seen, (2, 2))
            mass = padded.unfold(0, 5, 1).mean(-1)
        held = list(range(prompt))
        older = sorted(held[:-RECENT], key=lambda j: -mass[j])[: SLOTS - RECENT]
        held = sorted(older) + held[-RECENT:]
        for at in range(prompt, total):
            gone = held[-RECENT]  # what leaves the window
            if name == "h2o":
                gone = min(held[: 1 - RECENT], key=mass.__getitem__)
            held = [j for j in held if j != gone] + [at]
            if name == "h2o":
                logits = q[:, at] @ k[held].T * 0.3
                mass = torch.cat([mass, mass.new_zeros(max(0, total - len(mass)))])
                mass[held] += logits.softmax(-1).sum(0)
        kept.append(held)
    return kept


@pytest.mark.parametrize("name", ["snapkv", "h2o"])
@pytest.mark.parametrize("chunks", [(60, 9), (40, 20, 30), (50, 9, 1, 12)])
def test_pairs_held_are_those_of_the_rule(name, chunks):
    layer, query, keys = fed(name, chunks)
    prompt = sum(chunks[:-1])
    for head, held in enumerate(naive_kept(name, query, keys, prompt)):
        assert len(held) == SLOTS
        order = layer.places[0, head].argsort()
        assert layer.places[0, head, order].tolist() == held
        torch.testing.assert_close(layer.keys[0, head, order], keys[0, head, held])
    assert layer.get_seq_length() == sum(chunks)


@pytest.mark.parametrize("name", ["snapkv", "h2o"])
def test_bytes_are_those_of_the_sparse_model_and_stay(model, name):
    from sparsek_cli.evaluation.lm.proof import held

    own = make_policy("sparsek")
    with own.applied(model), torch.no_grad():
        cache = own.new_cache(model)
        model(input_ids=ids(300), past_key_values=cache)
        budget = held(cache)
    rival = make_policy(name)
    with rival.applied(model), torch.no_grad():
        cache = rival.new_cache(model)
        model(input_ids=ids(300), past_key_values=cache)
        assert held(cache)[0] > budget[0]
        rival.end_prompt(model, cache)
        for token in range(40):
            model(input_ids=ids(1, seed=token), past_key_values=cache)
        assert held(cache) == budget
        assert held(cache)[0] == rival.most_pairs(model)


@pytest.mark.parametrize("name", ["snapkv", "h2o"])
def test_without_eviction_the_answer_is_the_dense_one(model, name):
    logits = {}
    for policy in (make_policy("dense"), make_policy(name, budget=512)):
        with policy.applied(model), torch.no_grad():
            cache = policy.new_cache(model)
            model(input_ids=ids(200), past_key_values=cache)
            policy.end_prompt(model, cache)
            steps = [model(input_ids=ids(1, seed=i), past_key_values=cache) for i in range(5)]
        logits[policy.name] = torch.cat([step.logits for step in steps])
    torch.testing.assert_close(logits[name], logits["dense"], rtol=1e-5, atol=1e-5)


def measured(checkpoints, data, out, tasks, budgets):
    from verbs import evaluate

    from sparsek_cli.console import Console
    from sparsek_cli.recipes.schema_evaluate import EvaluateRecipe

    recipe = EvaluateRecipe(
        model=str(checkpoints[1]), data=str(data), lengths=[640], limit=4, device="cpu",
        tasks=tasks, baselines=["dense", "snapkv", "h2o"], budgets=budgets,
        max_new_tokens=6, out=str(out),
    )  # fmt: skip
    return evaluate(recipe, Console(quiet=True))


@pytest.fixture(scope="module")
def report(checkpoints, data, tmp_path_factory):
    return measured(
        checkpoints, data, tmp_path_factory.mktemp("rivals") / "out", ["ppl", "recall_4"], [68]
    )


@pytest.mark.slow
def test_unlimited_rivals_are_dense_in_every_metric(checkpoints, data, tmp_path):
    tasks = ["recall_4", "recall_turns",
             "scrolls_qasper", "scrolls_contractnli", "scrolls_quality"]  # fmt: skip
    report = measured(checkpoints, data, tmp_path / "out", tasks, [68, 2048])
    dense = {u["task"]: u["metrics"] for u in report["units"] if u["policy"] == "dense"}
    rivals = [u for u in report["units"] if u["policy"] in ("snapkv-2048", "h2o-2048")]
    assert len(rivals) == 2 * 5
    for unit in rivals:
        assert unit["metrics"] == dense[unit["task"]], (unit["task"], unit["policy"])


def test_rivals_hold_what_we_hold(report):
    pairs = {}
    for unit in report["units"]:
        if unit["policy"].endswith("-68") and unit["task"] == "recall_4":
            pairs[unit["policy"]] = (unit["proof"]["kv_pairs"], unit["proof"]["kv_bytes"])
            assert bool(unit["proof"]["sparse_calls"]) == (unit["policy"] == "sparsek-68")
    assert len(pairs) == 3
    assert set(pairs.values()) == {(2 * 2 * 68, 2 * 2 * 68 * 8 * 2 * 4)}


def test_running_text_has_no_rivals(report):
    assert not [u for u in report["units"] if u["task"] == "ppl" and "snapkv" in u["policy"]]
    absent = {item["task"]: item["reason"] for item in report["absent"]}
    assert "running text has no prompt" in absent["ppl@640 under snapkv-68"]
    assert report["complete"]


def test_in_a_conversation_the_first_question_decides(recipe, console, monkeypatch):
    """Also for later questions, which otherwise would find the whole document again."""
    from verbs import evaluate

    ended, real = [], snapkv_h2o.SnapLayer.rank

    def noted(self):
        ended.append(self.seen)
        real(self)

    monkeypatch.setattr(snapkv_h2o.SnapLayer, "rank", noted)
    report = evaluate(recipe(tasks=["recall_turns"], limit=4, baselines=["snapkv"]), console)
    proof = next(u["proof"] for u in report["units"] if u["policy"] == "snapkv")
    assert len(ended) == 2 * 4  # layers x questions about one document
    assert len(set(ended)) == 1
    assert proof["kv_tokens"] > ended[0] + 100  # three answered questions and what is written
    assert proof["kv_pairs"] == 2 * 2 * 68


def test_a_rival_that_does_not_evict_is_caught(recipe, console, monkeypatch):
    from verbs import evaluate

    from sparsek_cli.errors import SparsekError

    real = evicting_layer.EvictingLayer.bound

    def keep_all(self, kept, capacity):
        real(self, torch.ones_like(kept), torch.full_like(capacity, kept.shape[-1] + 100))

    monkeypatch.setattr(evicting_layer.EvictingLayer, "bound", keep_all)
    with pytest.raises(SparsekError, match="the cache grew to"):
        evaluate(recipe(tasks=["recall_4"], limit=1, baselines=["snapkv"]), console)


def test_rows_come_after_ours(model):
    labels = [p.label for p in plan_policies(model, ["h2o", "snapkv", "window"], [], seed=0)]
    assert labels == ["sparsek", "h2o", "snapkv", "window"]


def test_families_that_name_the_mask_when_they_attend(sparse_model):
    model = sparse_model("afmoe", topk=8)
    policy = make_policy("snapkv")
    with policy.applied(model), torch.no_grad():
        cache = policy.new_cache(model)
        model(input_ids=ids(40), past_key_values=cache)
        policy.end_prompt(model, cache)
        found = model(input_ids=ids(3), past_key_values=cache).logits
    assert found.isfinite().all()
    own = [layer for layer in cache.layers if isinstance(layer, evicting_layer.EvictingLayer)]
    assert own and all(layer.bounded for layer in own)


@pytest.mark.parametrize("name", ["snapkv", "snapkv:shared", "kvzip", "h2o:shared"])
def test_what_goes_does_not_depend_on_other_rows_slots(sparse_model, name):
    """Of pairs worth the same some went where the slots were as wide as a longer row's."""
    model = sparse_model("llama", topk=5, window=3, sinks=0)
    policy = make_policy(name)
    prompts = [ids(n, seed=n + 2) for n in (19, 7, 6, 14)]
    steps = ids(8)[0]

    def read(prompt):
        cache = policy.new_cache(model)
        model(input_ids=prompt, past_key_values=cache)
        policy.end_prompt(model, cache)
        return cache

    with policy.applied(model), torch.no_grad():
        joined = join([read(prompt) for prompt in prompts])
        alone = [read(prompt) for prompt in prompts]
        for step, token in enumerate(steps):
            found = model(
                token.expand(len(prompts), 1), past_key_values=joined.cache,
                position_ids=(joined.positions + step)[:, None],
            ).logits  # fmt: skip
            wanted = [model(token.view(1, 1), past_key_values=one).logits for one in alone]
            torch.testing.assert_close(found, torch.cat(wanted), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("width", [8, 9, 64, 2000])
@pytest.mark.parametrize("count", [1, 2])
def test_of_equals_the_oldest_pair_goes(width, count):
    layer, query, keys = snapkv_h2o.SnapLayer(8, 3), draw(1, 4, 11, 8), draw(1, 2, 11, 8, seed=1)
    layer.update(keys[:, :, :7], keys[:, :, :7])
    layer.see(query[:, :, :7], Logits(0.3))
    layer.rank()
    snapkv_h2o.evict([layer], shared=False)
    layer.widen(width)
    for start in range(7, 11, count):
        layer.update(keys[:, :, start : start + count], keys[:, :, start : start + count])
    left = [sorted(row[row >= 0].tolist()) for row in layer.places[0]]
    assert left == [[0, 1, 2, 3, 7, 8, 9, 10]] * 2
