"""Needle documents: facts where they should be, ids that match the text, roles on the answers."""

from types import SimpleNamespace

import numpy as np
import pytest

from sparsek_cli.data import ANSWER, IGNORED, TEXT
from sparsek_cli.data.chat_format import ChatFormat
from sparsek_cli.data.corpus import Corpus, build_corpus
from sparsek_cli.data.facts import draw_facts
from sparsek_cli.data.filler import Filler, split_sentences
from sparsek_cli.data.generated_text import generated_text
from sparsek_cli.data.needle_source import NeedleSource
from sparsek_cli.data.needles import chat_messages, is_correct, make_document
from sparsek_cli.data.phrasings import PHRASINGS, phrasings
from sparsek_cli.errors import UsageError


@pytest.fixture(scope="module")
def text() -> str:
    return generated_text(np.random.default_rng(0), 600)


@pytest.fixture(scope="module")
def tokenizer(text):
    from train_tokenizer import train_tokenizer

    return train_tokenizer([text], vocab_size=700)


@pytest.fixture(scope="module")
def corpus(text, tokenizer) -> Corpus:
    half = len(text) // 2
    tokens, ends = build_corpus([text[:half], text[half:]], tokenizer)
    return Corpus(tokens, np.concatenate([[0], ends[:-1]]), ends)


@pytest.fixture(scope="module", params=["documents", "corpus"])
def filler(request, text, corpus, tokenizer) -> Filler:
    if request.param == "corpus":
        return Filler.from_corpus(corpus, tokenizer)
    return Filler.from_documents([text], tokenizer)


def test_phrasings_are_many_distinct_and_split():
    assert len(PHRASINGS) >= 12
    assert len({row.name for row in PHRASINGS}) == len(PHRASINGS)
    assert len(phrasings("calibration")) >= 6
    assert len(phrasings("held_out")) >= 3
    assert len(phrasings("unseen")) >= 2
    for row in PHRASINGS:
        assert "{key}" in row.question and "{value}" not in row.question
        # Statement and question share no word but the key and the small change of English.
        told = set(row.statement.lower().replace(",", " ").strip(".").split())
        asked = set(row.question.lower().strip("?").split())
        assert told & asked <= {"{key}", "the", "of", "to", "in", "for", "at", "is", "was"}, row


def test_sentences_join_to_the_text_and_keep_titles_together():
    text = "Mr. Hale came. “Did he?” She left!\n\nDr. Gray stayed. so be it. End"
    pieces = split_sentences(text)
    assert "".join(pieces) == text
    assert pieces[0] == "Mr. Hale came."
    assert pieces[3].startswith("\n\nDr. Gray")


@pytest.mark.parametrize(
    "long", ["words and words, " * 900, "東京に行きました。" * 900, "x" * 9000]
)
def test_text_without_sentences_is_cut_all_the_same(long, tokenizer):
    pieces = split_sentences(long)
    assert "".join(pieces) == long and max(map(len, pieces)) <= 2000
    assert all(piece[0] == " " for piece in pieces[1:]) or " " not in long
    if long.isascii():
        filler = Filler.from_documents([long], tokenizer)
        rng = np.random.default_rng(0)
        assert len(make_document(rng, filler, tokens=3000, needles=1).ids) <= 3000
        ids = np.asarray(tokenizer(long).input_ids, dtype=np.int32)
        whole = SimpleNamespace(tokens=ids, starts=np.array([0]), ends=np.array([len(ids)]))
        known = Filler.from_corpus(whole, tokenizer)
        assert (known.ends - known.starts).max() <= 500
        assert known.starts[1:].tolist() == known.ends[:-1].tolist() and known.ends[-1] == len(ids)


@pytest.mark.parametrize("needles", [1, 4, 16])
def test_document_holds_its_facts_and_its_ids_are_its_text(filler, tokenizer, needles):
    rng = np.random.default_rng(needles)
    document = make_document(rng, filler, tokens=1500, needles=needles, distractors=2)
    assert 1300 <= len(document.ids) <= 1500
    assert document.ids.tolist() == tokenizer(document.text, add_special_tokens=False)["input_ids"]
    assert document.text == document.text.lstrip()
    assert len(document.facts) == needles and len(document.distractors) == 2
    everything = document.facts + document.distractors
    for fact, (first, last) in zip(everything, document.statements, strict=True):
        assert document.text.count(fact.statement) == 1
        assert tokenizer.decode(document.ids[first:last]) == " " + fact.statement
        assert abs((first + last) / 2 / len(document.ids) - fact.depth) < 0.15
    # No question has two answers.
    asked = [(fact.phrasing.name, fact.key) for fact in everything]
    assert len(set(asked)) == len(asked)
    assert [fact.depth for fact in document.facts] == sorted(f.depth for f in document.facts)


def test_documents_are_deterministic_and_take_depths(filler):
    def made(seed):
        return make_document(
            np.random.default_rng(seed), filler, tokens=400, needles=2, depths=[1.0, 0.0]
        )

    assert made(3).text == made(3).text
    assert made(3).text != made(4).text
    first, last = made(3).statements
    assert first[0] < 60 and last[1] == len(made(3).ids)


def test_what_does_not_fit_is_refused(filler):
    with pytest.raises(UsageError, match="4 hidden facts do not fit into 20 tokens"):
        make_document(np.random.default_rng(0), filler, tokens=20, needles=4)
    with pytest.raises(UsageError, match="1 hidden fact does not fit into 3 tokens"):
        make_document(np.random.default_rng(0), filler, tokens=3, needles=1)
    with pytest.raises(ValueError, match="depths"):
        make_document(np.random.default_rng(0), filler, tokens=200, needles=2, depths=[0.5])
    with pytest.raises(ValueError, match="no text"):
        Filler.from_documents([], filler.tokenizer)


def test_keys_and_values_are_distinct():
    facts = draw_facts(np.random.default_rng(0), PHRASINGS, 40)
    assert len({fact.key for fact in facts}) == len({fact.value for fact in facts}) == 40


@pytest.mark.parametrize(
    ("answer", "expected", "right"),
    [
        ("It is lamp.", "lamp", True),
        (" Lamp", "lamp", True),
        ("It is lamps.", "lamp", False),
        ("It is 4815.", "481", False),
        ("", "lamp", False),
        ("It is oak.\nIt is lamp.", "lamp", False),
    ],
)
def test_answers_are_checked_as_whole_words_of_the_first_line(answer, expected, right):
    assert is_correct(answer, expected) is right


@pytest.mark.parametrize("key_values", [0.0, 1.0])
@pytest.mark.parametrize("length", [256, 1024])
def test_training_sequences_mark_answers(tokenizer, corpus, key_values, length):
    source = NeedleSource(tokenizer, corpus, key_values=key_values, repeats=0.0)
    rng = np.random.default_rng(1)
    for _ in range(10):
        ids, roles = source(rng, length)
        assert len(ids) == len(roles) == length
        assert set(np.unique(roles)) <= {IGNORED, TEXT, ANSWER}
        answers = [
            tokenizer.decode(ids[a:b])
            for a, b in _runs_of(roles == ANSWER)
            if b < length  # the last one may be cut
        ]
        assert answers
        assert all(a.startswith("It is ") and a.endswith(".<|end|>") for a in answers)
        assert (roles == TEXT).any() == (key_values == 0.0)


def test_repeated_facts_have_their_value_marked(tokenizer, corpus):
    source = NeedleSource(tokenizer, corpus, key_values=1.0, repeats=1.0)
    ids, roles = source(np.random.default_rng(2), 512)
    for a, b in _runs_of(roles == ANSWER):
        assert tokenizer.decode(ids[:a]).count(tokenizer.decode(ids[a:b])) >= 1


def test_a_conversation_in_pieces_is_the_rendered_template(tokenizer):
    chat = ChatFormat.of(tokenizer)
    messages = chat_messages("The old box.", "What?")
    rendered = tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
    body = tokenizer("The old box.\n\nWhat?", add_special_tokens=False)["input_ids"]
    assert [*chat.start, *body, *chat.reply] == rendered
    assert chat.stop[0] == tokenizer.eos_token_id


def _runs_of(mask: np.ndarray) -> list[tuple[int, int]]:
    edges = np.flatnonzero(np.diff(np.concatenate([[0], mask.astype(int), [0]])))
    return list(zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True))
