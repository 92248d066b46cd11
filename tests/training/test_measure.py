"""Quick measures equal the slow, obvious ones."""

import numpy as np
import pytest
import torch

from sparsek_cli.data.corpus import Corpus
from sparsek_cli.data.filler import Filler
from sparsek_cli.data.generated_text import generated_text
from sparsek_cli.data.phrasings import phrasings
from sparsek_cli.data.questions import make_questions
from sparsek_cli.hub import bundled
from sparsek_cli.loading import load_model, load_tokenizer
from sparsek_cli.training.measure import recalled, token_losses, windows
from sparsek_cli.training.run_sizes import Batch, estimate_bytes


@pytest.fixture(scope="module")
def tiny():
    return load_model(bundled(), device=torch.device("cpu"), dtype=torch.float32)


@pytest.fixture(scope="module")
def questions():
    tokenizer = load_tokenizer(bundled().path)
    filler = Filler.from_documents([generated_text(np.random.default_rng(0), 200)], tokenizer)
    known = phrasings("calibration")
    return make_questions([3], filler, length=400, needles=3, count=5, phrasings=known)


def test_questions_hold_the_fact_and_its_answer(questions):
    tokenizer = load_tokenizer(bundled().path)
    assert len(questions) == 5
    for question in questions:
        text = tokenizer.decode(question.ids)
        assert question.fact.statement in text and question.fact.question in text
        assert tokenizer.decode(question.ids[question.start :]) == question.fact.answer + "<|end|>"
        assert len(question.ids) <= 400


def test_recall_is_what_greedy_decoding_writes(tiny, questions):
    tokenizer = load_tokenizer(bundled().path)
    right = recalled(tiny, questions, batch_tokens=900)
    said = []
    for question in questions:
        ids = torch.from_numpy(question.ids[: question.start])[None]
        out = tiny.generate(ids, max_new_tokens=16, do_sample=False)
        text = tokenizer.decode(out[0, question.start :], skip_special_tokens=True)
        said.append(text == question.fact.answer)
    assert right.tolist() == said and any(said)


def test_losses_are_those_of_transformers(tiny, questions):
    rows = np.stack([question.ids[:100] for question in questions[:3]])
    losses = token_losses(tiny, rows, batch_tokens=150)
    assert losses.shape == (3, 99)
    for row, ours in zip(rows, losses, strict=True):
        ids = torch.from_numpy(row)[None]
        with torch.no_grad():
            assert ours.mean() == pytest.approx(tiny(ids, labels=ids).loss.item(), rel=1e-4)


def test_windows_stay_inside_their_documents():
    tokens = np.arange(100, dtype=np.uint16)
    corpus = Corpus(tokens, np.array([0, 35, 40]), np.array([35, 40, 100]))
    found = windows(corpus, 10, 100)
    assert found[:, 0].tolist() == [0, 10, 20, 40, 50, 60, 70, 80, 90]
    assert windows(corpus, 10, 3)[:, 0].tolist() == [0, 50, 90]
    assert windows(corpus, 70, 3).shape == (0, 70)


def test_memory_is_estimated_where_layers_have_sizes_of_their_own(sparse_model):
    """Gemma 3n's config has a list of them: the widest layer's activations count."""
    batch = Batch(length=64, sequences=2, micro=1)
    model = sparse_model("gemma3n_text-shared")
    found = {c: estimate_bytes(model, batch, bf16=False, checkpointing=c) for c in (True, False)}
    model.config.intermediate_size = max(model.config.intermediate_size)
    for checkpointing, size in found.items():
        own = estimate_bytes(model, batch, bf16=False, checkpointing=checkpointing)
        assert size == own > 0
