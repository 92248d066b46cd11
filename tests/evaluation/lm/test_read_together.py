"""Prompts read side by side answer as prompts read one by one, from caches that hold the same."""

import copy
import json
import weakref
from types import SimpleNamespace

import pytest
import torch
from verbs import evaluate

from sparsek_cli.evaluation.lm import generation, read_together, side_by_side
from sparsek_cli.evaluation.lm.proof import held
from sparsek_cli.evaluation.policies.registry import make_policy
from sparsek_cli.evaluation.policies.snapkv_h2o import SnapKV
from sparsek_cli.models import budget, counted_calls, sparsek_cache_bytes

LENGTHS = (201, 90, 150, 201)
ON_GPU = pytest.param("cuda", marks=pytest.mark.gpu)
ROWS = ["sparsek", "dense", "window", "random", "snapkv", "snapkv:shared"]


@pytest.fixture(scope="module")
def model(checkpoints):
    from transformers import AutoModelForCausalLM

    import sparsek_cli.models  # noqa: F401

    return AutoModelForCausalLM.from_pretrained(checkpoints[1]).eval()


def prompts(lengths=LENGTHS):
    draw = torch.Generator().manual_seed(0)
    return [torch.randint(3, 128, (n,), generator=draw).tolist() for n in lengths]


@pytest.mark.parametrize("device", ["cpu", ON_GPU])
@pytest.mark.parametrize("lengths", [LENGTHS, (150, 150), (1, 40)])
@pytest.mark.parametrize("name", ROWS)
def test_rows_are_as_if_they_had_been_read_alone(model, name, lengths, device):
    policy, model = make_policy(name), copy.deepcopy(model).to(device)
    near = {"rtol": 1e-4, "atol": 1e-4 if device == "cpu" else 2e-3}
    with policy.applied(model), torch.no_grad():
        found = side_by_side.read(model, prompts(lengths), lambda: policy.new_cache(model))
        for ids, (cache, logits) in zip(prompts(lengths), found, strict=True):
            alone = policy.new_cache(model)
            one_row = torch.tensor([ids], device=device)
            wanted = model(input_ids=one_row, past_key_values=alone, use_cache=True)
            torch.testing.assert_close(logits, wanted.logits[:, -1:], **near)
            for one in (cache, alone):
                policy.end_prompt(model, one)
            assert cache.get_seq_length() == alone.get_seq_length() == len(ids)
            assert held(cache) == held(alone)
            word = torch.tensor([[7]], device=device)
            after = [
                model(input_ids=word, past_key_values=one, use_cache=True).logits
                for one in (cache, alone)
            ]
            torch.testing.assert_close(*after, **near)


def test_padding_is_no_query(model):
    policy = make_policy("sparsek")
    with policy.applied(model), counted_calls() as calls:
        side_by_side.read(model, prompts(), lambda: policy.new_cache(model))
    assert calls.queries == 2 * sum(LENGTHS)  # layers


def test_caches_that_add_up_or_slide_are_read_alone(model):
    from transformers import DynamicCache, Gemma3TextConfig

    policy = make_policy("h2o")  # counts all queries, those of padding too
    with policy.applied(model):
        assert not side_by_side.can_split(policy.new_cache(model))
    sliding = Gemma3TextConfig(num_hidden_layers=2, layer_types=["sliding_attention"] * 2)
    assert not side_by_side.can_split(DynamicCache(config=sliding))
    assert not make_policy("sparsek:int8").reads_rows  # its prompts are read in pieces
    with budget(model, cache_dtype="int8"):
        assert not side_by_side.can_split(make_policy("window").new_cache(model))


def test_what_is_read_at_once_is_bounded():
    sequences = [[0] * n for n in (400, 90, 390, 10, 395, 1200, 380)]
    groups = side_by_side.batches(sequences, range(7), most=16, tokens=1000)
    assert groups == [[5], [0, 4], [2, 6], [1, 3]]
    one_by_one = side_by_side.batches(sequences, [0, 2, 4], most=1, tokens=1000)
    assert one_by_one == [[0], [4], [2]]
    far = [[0] * 900, [0] * (900 - side_by_side.SPREAD)]
    assert side_by_side.batches(far, [0, 1], most=16, tokens=10_000) == [[0], [1]]


def test_narrow_models_read_more_at_once():
    from transformers import Gemma3nTextConfig, GPT2Config, LlamaConfig

    wide = LlamaConfig(hidden_size=2048, intermediate_size=8192)
    narrow = LlamaConfig(hidden_size=576, intermediate_size=1536)
    assert side_by_side.tokens_at_once(wide) == 15 * 1024
    assert side_by_side.tokens_at_once(narrow) == 80 * 1024
    assert side_by_side.tokens_at_once(GPT2Config(n_embd=1024)) == 30 * 1024
    by_layer = Gemma3nTextConfig(num_hidden_layers=2, intermediate_size=[4096, 16384])
    assert side_by_side.tokens_at_once(by_layer) == 7680


def test_nothing_but_a_rows_own_logits_is_kept(model):
    """Each row's are parts of those of 32 rows and 256 places otherwise, while its answer lasts."""
    made = []
    hook = model.lm_head.register_forward_hook(lambda *call: made.append(call[2].shape))
    with make_policy("dense").applied(model):
        found = side_by_side.read(model, prompts(), lambda: make_policy("dense").new_cache(model))
    hook.remove()
    assert made == [(4, 3, 128)]  # of the places at which prompts end
    assert all(logits.untyped_storage().nbytes() == 128 * 4 for _, logits in found)


def test_logits_that_a_model_gives_unasked_are_told_from_those_asked_for():
    from transformers import CTRLConfig, CTRLLMHeadModel, DynamicCache

    sizes = {"vocab_size": 128, "n_embd": 32, "n_layer": 2, "n_head": 4, "dff": 48}
    model = CTRLLMHeadModel(CTRLConfig(**sizes)).eval()
    given = [model(torch.tensor([ids])).logits[:, -1:] for ids in prompts()]
    found = side_by_side.read(model, prompts(), lambda: DynamicCache(config=model.config))
    torch.testing.assert_close([logits for _, logits in found], given, rtol=1e-4, atol=1e-4)


def test_caches_of_what_is_read_at_once_take_a_share_of_free_memory(model, monkeypatch):
    def most(name, free, answers=None):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, 0))
        policy = make_policy(name)
        with policy.applied(model):
            reader = SimpleNamespace(
                answers_together=answers, device=torch.device("cuda"), model=model,
                _new_cache=lambda: policy.new_cache(model),
            )  # fmt: skip
            reader._token_bytes = lambda: read_together.TogetherReader._token_bytes(
                SimpleNamespace(**vars(reader) | {"device": model.device})
            )
            return read_together.TogetherReader._most_at_once(reader)

    pair = 2 * 2 * 2 * 8 * 4  # layers, KV heads, key and value, numbers, bytes
    slots = sparsek_cache_bytes(model.config, torch.float32)
    every = side_by_side.tokens_at_once(model.config)
    assert most("dense", 5 * 700 * pair) == (32, 700)
    assert most("sparsek", 5 * 3 * slots) == (3, every)
    assert most("sparsek", 0) == (1, every)
    assert most("dense", 1 << 50) == most("window", 1 << 50) == (32, every)
    assert most("dense", 0, answers=7) == (7, every)  # as the user says


def test_answers_and_proofs_are_those_of_prompts_read_one_by_one(
    recipe, console, tmp_path, monkeypatch
):
    """As on a GPU, where caches of shared beginnings are also joined."""
    settings = {"tasks": ["scrolls_qasper", "recall_4"], "baselines": ["dense", "snapkv", "random"]}
    seen, read = [], side_by_side.read
    monkeypatch.setattr(
        side_by_side, "read", lambda m, p, new: seen.append(len(p)) or read(m, p, new)
    )

    def run(name, **keys):
        out = tmp_path / name
        report = evaluate(recipe(**settings, out=str(out)), console, **keys)
        files = sorted((out / "samples").rglob("*.jsonl"))
        rows = [json.loads(line) for file in files for line in file.read_text().splitlines()]
        kept = ("kv_tokens", "kv_pairs", "kv_bytes", "prompts")
        proofs = [{key: unit["proof"][key] for key in kept} for unit in report["units"]]
        return [t for row in rows for t in row["responses"] if isinstance(t, str)], proofs

    alone, shared = run("alone", share_prefix=False), run("shared")
    assert not seen
    for module in (generation, read_together):
        monkeypatch.setattr(module, "TOGETHER", ("cpu",))
    monkeypatch.setattr(generation.Answers, "_together", lambda self, size: 3)
    assert run("together", share_prefix=False) == alone
    assert seen and max(seen) > 1
    monkeypatch.setattr(read_together, "WORTH_SHARING", 0)
    assert run("shared-too") == shared


def test_caches_that_cannot_be_joined_write_answers_to_rests_of_one_length_together(
    make_checkpoint, convert, recipe, console, tmp_path, monkeypatch
):
    """As on a CPU: one by one, a layer that slides made a GPU slower than it was."""
    dense = make_checkpoint(tmp_path / "dense", "gemma3_text", max_position_embeddings=2048)
    model, sizes = convert(dense, tmp_path / "converted"), []
    real = generation.Answers._decode
    monkeypatch.setattr(
        generation.Answers, "_decode",
        lambda self, logits, *rest: sizes.append(len(logits)) or real(self, logits, *rest),
    )  # fmt: skip
    document = "some words of a document. " * 9
    asked = [f"{word}?\n\n{document}" for word in ("Who", "How", "Why")]
    rows = [{"id": q, "pid": q, "input": q, "output": "It is so."} for q in asked]
    (tmp_path / "qasper").mkdir()
    lines = "\n".join(map(json.dumps, rows))
    (tmp_path / "qasper" / "validation.jsonl").write_text(lines, encoding="utf-8")
    settings = {"model": str(model), "data": str(tmp_path), "baselines": ["dense"]}
    settings |= {"tasks": ["scrolls_qasper"]}
    evaluate(recipe(**settings, out=str(tmp_path / "cpu")), console)
    wanted, sizes[:] = list(sizes), []
    for module in (generation, read_together):
        monkeypatch.setattr(module, "TOGETHER", ("cpu",))
    evaluate(recipe(**settings, out=str(tmp_path / "gpu")), console)
    assert sizes == wanted == [3, 3]  # under each policy


@pytest.mark.parametrize("where", ["reading", "evicting"])
def test_without_memory_for_all_at_once_each_is_read_by_itself(
    recipe, console, tmp_path, monkeypatch, where
):
    """What the attempt took is free again by then."""
    held, read_alone = [], read_together.TogetherReader._read_prompt

    def full(*args):
        activations = torch.zeros(8)
        held.append(weakref.ref(activations))
        raise torch.OutOfMemoryError("CUDA out of memory")

    def alone(self, prompt):
        assert all(gone() is None for gone in held)
        monkeypatch.setattr(SnapKV, "end_prompt", evict)
        return read_alone(self, prompt)

    evict = SnapKV.end_prompt
    settings = {"tasks": ["recall_4"], "baselines": ["snapkv"]}
    wanted = evaluate(recipe(**settings, out=str(tmp_path / "alone")), console)
    for module in (generation, read_together):
        monkeypatch.setattr(module, "TOGETHER", ("cpu",))
    monkeypatch.setattr(read_together.TogetherReader, "_read_prompt", alone)
    if where == "reading":
        monkeypatch.setattr(side_by_side, "read", full)
    else:
        monkeypatch.setattr(SnapKV, "end_prompt", full)
    found = evaluate(recipe(**settings, out=str(tmp_path / "full")), console)
    assert held
    assert [u["metrics"] for u in found["units"]] == [u["metrics"] for u in wanted["units"]]


@pytest.mark.parametrize("together", [False, True])
def test_an_empty_prompt_is_the_token_that_texts_begin_with(checkpoints, monkeypatch, together):
    """A tokenizer that adds nothing makes no tokens of an empty prompt."""
    from sparsek_cli import hub
    from sparsek_cli.evaluation.measured_model import measured_model
    from sparsek_cli.evaluation.settings import Loading, Prompts

    if together:
        for module in (generation, read_together):
            monkeypatch.setattr(module, "TOGETHER", ("cpu",))
    measured = measured_model(
        hub.resolve(str(checkpoints[1])), Loading(device="cpu", dtype="float32", yarn=None),
        Prompts(batch_size=None, truncate="refuse", max_length=None, max_new_tokens=3,
                share_prefix=True), sparse=True, say=print,
    )  # fmt: skip
    lm = measured.lm
    monkeypatch.setattr(type(lm), "tok_encode", lambda self, text, *a, **k: [ord(c) for c in text])
    requests = [
        SimpleNamespace(args=(text, {"until": [], "max_gen_toks": 3}), doc={})
        for text in ("", chr(lm.prefix_token_id), "abc")
    ]
    with lm.policy.applied(lm.model):
        nothing, beginning, _ = lm.generate_until(requests)
    assert nothing == beginning
