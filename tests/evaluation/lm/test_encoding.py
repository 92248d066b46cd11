"""Prompts are encoded on threads, into the ids that they have without."""

import random
from collections import Counter

import pytest
from lm_eval.models.huggingface import HFLM
from tokenizers import processors

from sparsek_cli.evaluation.lm.prefill import LONG, PromptReader


def strings(count, size):
    draw = random.Random(0)
    return ["".join(draw.choices("abcdefgh ", k=size + number)) for number in range(count)]


def cut_and_padded(backend):
    """As tokenizer.json may say: the first call takes it back, under which no other may run."""
    backend.enable_truncation(50)
    backend.enable_padding(length=4000)


def with_a_beginning(backend):
    backend.enable_truncation(50)
    backend.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])


@pytest.fixture(params=[lambda backend: None, cut_and_padded, with_a_beginning])
def make(request, tokenizer):
    def made():
        lm = object.__new__(PromptReader)
        lm.tokenizer, lm.add_bos_token, lm.custom_prefix_token_id = tokenizer, None, None
        lm._encodings = {}
        request.param(tokenizer._tokenizer)
        return lm

    return made


def test_ids_are_those_of_one_thread(make):
    long = strings(60, 3000)
    one, many = make(), make()
    wanted = [one.tok_encode(string) for string in long]
    assert min(map(len, wanted)) >= 3000
    many._remember(long)
    assert [many._encodings[string].tolist() for string in long] == wanted
    held = [memoryview(ids).nbytes for ids in many._encodings.values()]
    assert sorted(held) == [4 * len(ids) for ids in wanted]


def test_each_string_is_encoded_once(make, monkeypatch):
    """Short ones are not remembered, so that those were encoded here and again."""
    lm, seen = make(), Counter()
    real = type(lm.tokenizer).encode
    monkeypatch.setattr(
        type(lm.tokenizer), "encode",
        lambda self, text, **keys: seen.update([text]) or real(self, text, **keys),
    )  # fmt: skip
    every = strings(9, LONG - 5)
    lm._remember(every)
    for string in every:
        lm.tok_encode(string)
    assert seen == Counter(every)


def test_prompts_of_one_task_are_held_at_a_time(recipe, console, monkeypatch):
    """Those of thirteen tasks of 128k tokens took gigabytes before the first was measured."""
    from verbs import evaluate

    held, real = [], PromptReader.over_limit
    monkeypatch.setattr(
        PromptReader, "over_limit",
        lambda self, instances: held.append(len(self._encodings)) or real(self, instances),
    )  # fmt: skip
    wanted = {"lengths": [1500, 1600], "baselines": ["window"], "limit": 2}
    evaluate(recipe(tasks=["recall_1"], **wanted), console)
    assert held == [0, 0, 0, 2, 0, 2]  # both counted, then each under two policies


@pytest.mark.parametrize(
    ("rows", "baseline"), [("auto", "window"), (2, "window"), ("auto", "kvzip")]
)
def test_no_prompt_that_is_answered_is_encoded_by_itself(
    recipe, console, monkeypatch, rows, baseline
):
    """Threads had none of them where the user said how many are answered together.

    Nor had they the part of each that kvzip reads first.
    """
    from verbs import evaluate

    alone, real = [], PromptReader._remember

    def remember(self, strings):
        monkeypatch.setattr(HFLM, "tok_encode", encode)
        real(self, strings)
        monkeypatch.setattr(HFLM, "tok_encode", noted)

    def noted(self, string, *args, **keys):
        if len(string) >= LONG:
            alone.append(string)
        return encode(self, string, *args, **keys)

    encode = HFLM.tok_encode
    monkeypatch.setattr(PromptReader, "_remember", remember)
    monkeypatch.setattr(HFLM, "tok_encode", noted)
    wanted = {"lengths": [1700, 1800], "baselines": [baseline], "limit": 2, "batch_size": rows}
    evaluate(recipe(tasks=["recall_1"], **wanted), console)
    assert not alone
