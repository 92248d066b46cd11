"""The oracle told a context again, and slots shared out over heads: against their words."""

import pytest
import torch

from sparsek_cli.evaluation.policies import kvzip
from sparsek_cli.evaluation.policies.evicting_layer import EvictingLayer, largest_attention
from sparsek_cli.evaluation.policies.registry import make_policy
from sparsek_cli.evaluation.policies.snapkv_h2o import evict
from sparsek_cli.models.logits import Logits

TOKENS, OPENING = 200, [5, 6, 7]
SINKS, SLOTS, WINDOW = 4, 68, 24


@pytest.fixture
def model(checkpoints):
    from transformers import AutoModelForCausalLM

    import sparsek_cli.models  # noqa: F401

    return AutoModelForCausalLM.from_pretrained(checkpoints[1]).eval()


def ids(tokens, seed=3):
    return torch.randint(3, 128, (1, tokens), generator=torch.Generator().manual_seed(seed))


def told(model, name):
    """The policy's cache after a context that was told again, and the context."""
    policy, context = make_policy(name), ids(TOKENS)
    with policy.applied(model), torch.no_grad():
        cache = policy.new_cache(model)
        model(input_ids=context, past_key_values=cache)
        policy.tell_again(model, cache, context[0].tolist(), OPENING)
        policy.end_prompt(model, cache)
    return cache, context


def naive_worth(model, context, part, lead):
    """Largest attention of each layer's and KV head's pairs, from whole attention matrices."""
    tokens, worth = context[0].tolist(), torch.zeros(2, 2, TOKENS)
    model.set_attn_implementation("eager")
    for start in range(0, TOKENS, part):
        begin = max(0, min(start - lead, TOKENS - part - lead))
        again = tokens[begin : begin + part + lead]
        whole = torch.tensor([[*tokens, *OPENING, *again]])
        weights = model(input_ids=whole, output_attentions=True, use_cache=False).attentions
        for layer, matrix in enumerate(weights):
            seen = matrix[0, :, TOKENS:, :TOKENS].amax(dim=1)  # [4 query heads, TOKENS]
            worth[layer] = worth[layer].maximum(seen.unflatten(0, (2, 2)).amax(dim=1))
    worth[..., :SINKS] = worth[..., -WINDOW:] = 9.0
    return worth


@pytest.fixture
def dense_twin(checkpoints):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(checkpoints[0]).eval()


@pytest.mark.parametrize("name", ["kvzip", "kvzip:shared"])
def test_pairs_kept_are_those_the_telling_looks_at(model, dense_twin, monkeypatch, name):
    monkeypatch.setattr(kvzip, "PART", 90)
    monkeypatch.setattr(kvzip, "LEAD", 3)
    cache, context = told(model, name)
    with torch.no_grad():
        worth = naive_worth(dense_twin, context, 90, 3)
    if name == "kvzip":
        best = worth.topk(SLOTS, dim=-1).indices.flatten(0, 1)
        wanted = [sorted(row.tolist()) for row in best]
    else:
        flat = set(worth.flatten().topk(4 * SLOTS).indices.tolist())
        wanted = [[p for p in range(TOKENS) if head * TOKENS + p in flat] for head in range(4)]
        assert len({len(row) for row in wanted}) > 1
    held = [
        sorted(p for p in layer.places[0, head].tolist() if p >= 0)
        for layer in cache.layers
        for head in range(2)
    ]
    assert held == wanted
    assert all(set(range(SINKS)) | set(range(TOKENS - WINDOW, TOKENS)) <= set(r) for r in held)


@pytest.mark.parametrize("name", ["kvzip:shared", "snapkv:shared", "h2o:shared"])
def test_bytes_are_counted_from_what_heads_hold(model, name):
    from sparsek_cli.evaluation.lm.proof import held

    policy = make_policy(name)
    with policy.applied(model), torch.no_grad():
        if name == "kvzip:shared":
            cache, _ = told(model, name)
        else:
            cache = policy.new_cache(model)
            model(input_ids=ids(TOKENS), past_key_values=cache)
            policy.end_prompt(model, cache)
        counts = [layer.capacity.flatten().tolist() for layer in cache.layers]
        for step in range(30):
            model(input_ids=ids(1, step), past_key_values=cache)
            for layer, wanted in zip(cache.layers, counts, strict=True):
                assert (layer.places >= 0).sum(-1).flatten().tolist() == wanted
                assert (layer.places == TOKENS + step).sum(-1).eq(1).all()
    assert sum(map(sum, counts)) == policy.most_pairs(model) == 4 * SLOTS
    assert len(set(sum(counts, []))) > 1
    assert held(cache) == (4 * SLOTS, 4 * SLOTS * 8 * 2 * 4)


def test_a_head_attends_to_its_own_pairs_alone(model):
    """Slots of a head with few pairs, empty beside those of others, weigh nothing."""
    policy, token = make_policy("kvzip:shared"), ids(1, 9)
    cache, context = told(model, "kvzip:shared")
    with policy.applied(model), torch.no_grad():
        found = model(input_ids=token, past_key_values=cache).logits
        whole = make_policy("dense").new_cache(model)
        places = [layer.places for layer in cache.layers]
    with make_policy("dense").applied(model), torch.no_grad():
        model(input_ids=context, past_key_values=whole)
        mask = torch.zeros(2, 2, TOKENS + 1, dtype=torch.bool)
        for number, layer in enumerate(places):
            for head in range(2):
                mask[number, head, layer[0, head][layer[0, head] >= 0]] = True
        from sparsek_cli.models.attention.registration import replaced_attention

        def only_kept(attend):
            def attended(module, query, key, value, _, **kwargs):
                own = mask[module.layer_idx].repeat_interleave(2, dim=0)[None, :, None]
                return attend(module, query, key, value, own, **kwargs)

            return attended

        with replaced_attention(model.config._attn_implementation, only_kept):
            wanted = model(input_ids=token, past_key_values=whole).logits
    assert not mask.all()
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


def test_largest_attention_is_that_of_the_matrix():
    draw = torch.Generator().manual_seed(0)
    query = torch.randn(2, 4, 7, 8, generator=draw)
    keys = torch.randn(2, 2, 20, 8, generator=draw)
    logits = query @ keys.repeat_interleave(2, dim=1).mT * 0.5
    hidden = torch.ones(7, 20, dtype=torch.bool).triu(14)
    naive = logits.masked_fill(hidden, -torch.inf).softmax(-1).amax(2)
    naive = naive.unflatten(1, (2, 2)).amax(2)
    torch.testing.assert_close(largest_attention(query, keys, Logits(0.5)), naive)


def test_rows_are_cut_apart():
    """Each row of a batch has a threshold of its own."""
    draw = torch.Generator().manual_seed(1)
    layers = []
    for _ in range(3):
        layer = EvictingLayer(10, 4)
        keys = torch.randn(2, 2, 30, 8, generator=draw)
        layer.update(keys, keys)
        layer.mass = torch.rand(2, 2, 30, generator=draw)
        layers.append(layer)
    worth = torch.stack([layer.worth() for layer in layers])
    evict(layers, shared=True)
    for row in range(2):
        best = set(worth[:, row].flatten().topk(60).indices.tolist())
        held = {
            (number * 2 + head) * 30 + place
            for number, layer in enumerate(layers)
            for head in range(2)
            for place in layer.places[row, head].tolist()
            if place >= 0
        }
        assert held == best


@pytest.fixture(scope="module")
def report(checkpoints, data, tmp_path_factory):
    from verbs import evaluate

    from sparsek_cli.console import Console
    from sparsek_cli.recipes.schema_evaluate import EvaluateRecipe

    recipe = EvaluateRecipe(
        model=str(checkpoints[1]), data=str(data), lengths=[640], limit=3, device="cpu",
        tasks=["ppl", "recall_4", "recall_turns", "scrolls_qasper"], budgets=[68, 2048],
        baselines=["dense", "kvzip", "kvzip:shared", "snapkv:shared"], max_new_tokens=4,
        batch_size=3, out=str(tmp_path_factory.mktemp("kvzip") / "out"),
    )  # fmt: skip
    return evaluate(recipe, Console(quiet=True))


def test_with_room_for_all_it_is_dense(report):
    units = {(u["task"], u["policy"]): u for u in report["units"]}
    for task in ("recall_4", "recall_turns"):
        for name in ("kvzip-2048", "kvzip:shared-2048", "snapkv:shared-2048"):
            assert units[task, name]["metrics"] == units[task, "dense"]["metrics"]


def test_it_holds_what_we_hold(report):
    for unit in report["units"]:
        if unit["policy"].endswith("-68") and unit["task"].startswith("recall"):
            assert unit["proof"]["kv_pairs"] == 4 * 68, unit["policy"]


def test_a_task_that_does_not_say_where_its_question_begins_has_no_oracle(report):
    absent = {item["task"]: item["reason"] for item in report["absent"]}
    assert "the task does not say" in absent["scrolls_qasper under kvzip-68"]
    assert "written answers" in absent["ppl@640 under kvzip:shared-68"]


def test_the_question_is_not_seen_before_pairs_are_dropped(recipe, console, monkeypatch):
    """All questions about one document are answered from the same pairs, chosen once."""
    from verbs import evaluate

    from sparsek_cli.evaluation.lm.contexts import ContextReader

    contexts, questions = [], []
    read_context, read_question = ContextReader._read_context, ContextReader._read_question

    def context_noted(self, context):
        contexts.append(self.tok_decode(context))
        return read_context(self, context)

    def question_noted(self, question, cache):
        questions.append(self.tok_decode(question))
        assert cache.layers[0].bounded
        return read_question(self, question, cache)

    monkeypatch.setattr(ContextReader, "_read_context", context_noted)
    monkeypatch.setattr(ContextReader, "_read_question", question_noted)
    evaluate(recipe(tasks=["recall_4"], limit=4, baselines=["kvzip"]), console)
    assert len(contexts) == 1 and len(set(questions)) == 4
    assert all("?" in text for text in questions)
    assert not any(text.split("?")[0].strip() in contexts[0] for text in questions)


def test_layers_that_slide_go_on_from_the_context(sparse_model):
    """What is told again moves their windows; none of it stays."""
    from transformers.cache_utils import DynamicSlidingWindowLayer

    layers = ["sliding_attention", "full_attention", "sliding_attention"]
    settings = {"num_hidden_layers": 3, "sliding_window": 6, "layer_types": layers}
    model = sparse_model("gemma3_text", **settings)
    policy, context = make_policy("kvzip:shared"), ids(60)
    with policy.applied(model), torch.no_grad():
        cache = policy.new_cache(model)
        model(input_ids=context, past_key_values=cache)
        before = [layer.keys.clone() for layer in cache.layers]
        policy.tell_again(model, cache, context[0].tolist(), OPENING)
        assert cache.layers[1].mass.gt(0).any()
        policy.end_prompt(model, cache)
        model(input_ids=ids(1, 5), past_key_values=cache)
    assert type(cache.layers[0]) is DynamicSlidingWindowLayer
    for number in (0, 2):
        torch.testing.assert_close(cache.layers[number].keys[:, :, :-1], before[number][:, :, 1:])
    assert cache.layers[1].bounded and cache.get_seq_length() == 61
