"""What `make demo` reads, runs and returns; the four long commands themselves are left out."""

import json

import numpy as np
import pytest
import torch

import demo
import demo_facts
from sparsek_cli import hub


@pytest.fixture
def ran(monkeypatch, tmp_path):
    """`ran(sparsek=, dense=, arguments=)` -> exit code, commands; so many facts are found."""
    monkeypatch.chdir(tmp_path)

    def call(sparsek=8, dense=8, arguments=()):
        commands = []
        found = {"sparsek": sparsek, "dense": dense, "window": 1}

        def replies(model, tokenizer, document, policy):
            values = [f"It is {fact.expected}." for fact in document.facts[: found[policy]]]
            return values + ["It is nothing of the sort."] * (len(document.facts) - len(values))

        monkeypatch.setattr(
            demo, "_run", lambda title, *words: commands.append([str(word) for word in words])
        )
        monkeypatch.setattr("sparsek_cli.load", lambda name: (None, None))
        monkeypatch.setattr(demo_facts, "answers", replies)
        return demo.main(arguments), commands

    return call


@pytest.mark.parametrize(
    ("sparsek", "dense", "code"), [(8, 8, 0), (6, 8, 0), (5, 8, 1), (2, 4, 0), (0, 3, 1)]
)
def test_what_sparsek_finds_beside_dense_decides(ran, capsys, sparsek, dense, code):
    returned, commands = ran(sparsek, dense)
    assert returned == code
    assert [words[0] for words in commands] == ["convert", "finetune", "evaluate", "chat"]
    shown = capsys.readouterr().out
    assert f"found of 8: sparsek {sparsek}, dense {dense}, window 1" in shown
    assert shown.count(" found") == sparsek + dense + 1


def test_the_document_is_as_long_as_the_context_and_follows_the_seed(ran, tmp_path):
    from transformers import AutoTokenizer

    _, commands = ran()
    text = (tmp_path / "runs/demo/document.txt").read_text(encoding="utf-8")
    length = len(AutoTokenizer.from_pretrained(hub.bundled().path)(text).input_ids)
    assert 0.95 * demo.LENGTH < length < demo.LENGTH
    assert commands[-1][:3] == ["chat", "runs/demo/tiny-tuned", "--load"]
    assert commands[-1][3] == "runs/demo/document.txt"
    ran(arguments=["--seed", "8"])
    assert (tmp_path / "runs/demo/document.txt").read_text(encoding="utf-8") != text


def test_the_seed_makes_another_document_with_facts_in_each_eighth(tokenizer):
    filler = demo_facts.Filler.from_documents([demo.measured_text()[:20_000]], tokenizer)
    one, same, other = (demo_facts.document_of(filler, 4000, seed) for seed in (1, 1, 2))
    assert one.text == same.text != other.text
    for document in (one, other):
        depths = [fact.depth for fact in document.facts]
        assert [int(8 * depth) for depth in depths] == list(range(8))
        assert {fact.phrasing.split for fact in document.facts} == {"held_out"}
        assert all(document.text.count(fact.statement) == 1 for fact in document.facts)


def test_answers_are_those_of_whole_prompts(sparse_model, tokenizer, monkeypatch):
    """The document is read once; each question then sees it as if it were the first."""
    monkeypatch.setattr(demo_facts, "_LONGEST_ANSWER", 3)
    model = sparse_model("llama", topk=40, window=8)
    filler = demo_facts.Filler.from_documents([demo.measured_text()[:20_000]], tokenizer)
    document = demo_facts.make_document(
        np.random.default_rng(0), filler, tokens=300, needles=3,
        phrasings=demo_facts.phrasings("held_out"),
    )  # fmt: skip
    for policy in demo_facts.POLICIES:
        replies = demo_facts.answers(model, tokenizer, document, policy)
        rule = demo_facts.make_policy(policy)
        for fact, reply in zip(document.facts, replies, strict=True):
            ids = tokenizer.apply_chat_template(
                demo_facts.chat_messages(document.text, fact.question),
                add_generation_prompt=True, return_dict=False,
            )  # fmt: skip
            said = []
            with torch.inference_mode(), rule.applied(model):
                while len(said) < 3:
                    said.append(int(model(torch.tensor([ids + said])).logits[0, -1].argmax()))
            if model.generation_config.eos_token_id not in said:
                assert tokenizer.decode(said, skip_special_tokens=True).strip() == reply


def test_what_is_measured_was_not_trained_on(ran, tmp_path):
    ran()
    train, [measured] = (
        [json.loads(line)["text"] for line in (tmp_path / f"runs/demo/{name}.jsonl").open()]
        for name in ("train", "validation")
    )
    sentences = {s for text in train for s in text.split(". ") if len(s) > 60}
    assert len(train) > 30 and len(sentences) > 300
    assert not [s for s in sentences if s in measured]
