"""The text and documents that calibration reads."""

from __future__ import annotations

import re

import numpy as np
import pytest

from sparsek_cli.conversion.calibrate.sequences import texts
from sparsek_cli.conversion.calibrate.sequences.build import calibration_sequences
from sparsek_cli.conversion.calibrate.sequences.texts import calibration_texts
from sparsek_cli.errors import SparsekError


def test_sequences_mark_what_stands_far_back(tokenizer):
    sizes = {
        "fitting": 6,
        "fit_length": 2048,
        "held_out": 2,
        "lengths": (2048,),
        "documents": "mixed",
    }
    fitting, held_out = calibration_sequences(tokenizer, "auto", **sizes, seed=3)
    again, _ = calibration_sequences(tokenizer, "auto", **sizes, seed=3)
    assert all(np.array_equal(a.ids, b.ids) for a, b in zip(fitting, again, strict=True))
    assert [s.is_recall for s in fitting] == [False, True] * 3
    assert all(s.is_recall for s in held_out)
    sequences = fitting + held_out
    for sequence in sequences:
        assert len(sequence.ids) == len(sequence.answer) == 2048
    from sparsek_cli.data.phrasings import phrasings

    for sequence in filter(lambda s: s.is_recall, sequences):
        text = tokenizer.decode(sequence.ids)
        for row in phrasings("held_out", "unseen"):
            assert row.question.split("{key}")[0].strip() + " " not in text or row.name == "hidden"
        # The byte-level tokenizer has one id per letter: a marked row predicts a letter of a
        # value, or what follows it, or one of a repeated passage.
        ends = np.flatnonzero(sequence.answer[:-1] & ~sequence.answer[1:])
        starts = np.flatnonzero(~sequence.answer[:-1] & sequence.answer[1:])
        for start, end in zip(starts[:2], ends[:2], strict=True):
            answer = tokenizer.decode(sequence.ids[start + 2 : end + 1])
            assert answer in tokenizer.decode(sequence.ids[: start + 1])


@pytest.mark.parametrize("repeats", [1, 400])
def test_a_text_shorter_than_what_is_read_is_told(tokenizer, tmp_path, repeats):
    """One word of text was 131,072 tokens of calibration, to whoever read the report."""
    file, said = tmp_path / "own.txt", []
    file.write_text("A harbour master counts his crates. " * repeats)
    sizes = {"fitting": 4, "fit_length": 512, "held_out": 1, "lengths": (512,)}
    calibration_sequences(
        tokenizer, str(file), **sizes, documents="told_and_asked", seed=0, say=said.append
    )
    told = [f"'{file}' holds 36 tokens, of 2,048 to fit on: it is read again and again"]
    assert said == (told if repeats == 1 else [])


@pytest.mark.parametrize("documents", ["told_and_asked", "retold"])
def test_documents_hold_codes_that_are_asked_for(tokenizer, documents):
    """Long numbers and codes are what heads lose first: each of their tokens has to be kept."""
    sizes = {"fitting": 0, "fit_length": 4096, "held_out": 3, "lengths": (4096,)}
    _, made = calibration_sequences(tokenizer, "auto", **sizes, documents=documents, seed=4)
    wanted = re.compile(r"(?<![\w-])(?=[\w-]*\d)[0-9a-zA-Z]{4,8}(?:-[0-9a-zA-Z]{4,8})+")
    codes = [match for sequence in made for match in wanted.findall(tokenizer.decode(sequence.ids))]
    told_twice = {code for code in codes if codes.count(code) > 1}
    assert len(told_twice) >= 3


@pytest.mark.parametrize("documents", ["questions", "statements", "told_and_asked", "none"])
def test_documents_ask_for_one_thing_only(tokenizer, documents):
    sizes = {"fitting": 4, "fit_length": 1024, "held_out": 3, "lengths": (1024,)}
    _, held_out = calibration_sequences(tokenizer, "auto", **sizes, documents=documents, seed=3)
    for sequence in held_out:
        text, answer = tokenizer.decode(sequence.ids), sequence.answer
        assert ("assistant:" in text) == (documents in ("questions", "told_and_asked"))
        assert answer.any() == (documents != "none") and not (answer & sequence.asking).any()
        if documents in ("statements", "told_and_asked"):
            # Every marked word stands in the document, and the row before it is not marked.
            first = int(answer.argmax())
            before, places = tokenizer.decode(sequence.ids[:first]), np.flatnonzero(answer[:-1])
            for part in np.split(places, np.flatnonzero(np.diff(places) > 1) + 1):
                known, end = np.split(sequence.ids[part + 1], [-1])
                assert tokenizer.decode(known).strip() in before
                if part[-1] + 2 < len(answer):  # not cut
                    assert re.fullmatch(r"[ .,]", tokenizer.decode(end)), "where it ends, too"
            assert len(places) > 10
            # Where a fact is told, rows are no text: its pattern comes again and again.
            for part in np.split(places, np.flatnonzero(np.diff(places) > 1) + 1)[:3]:
                value = tokenizer.decode(sequence.ids[part + 1][:-1]).strip()
                lead = before[: before.rindex(value)]
                told = len(tokenizer(lead, add_special_tokens=False).input_ids)
                assert sequence.asking[told : told + len(value) - 1].all()


@pytest.mark.parametrize("turns", [None, 2])
def test_a_retold_document_repeats_its_context(tokenizer, turns):
    """Every turn goes on from the context with a part of it, and marks what it knows."""
    _, held_out = calibration_sequences(
        tokenizer, "auto", fitting=1, fit_length=1024, held_out=4, lengths=(2048, 1024),
        documents="retold", seed=3, turns=turns,
    )  # fmt: skip
    assert sorted({s.context + s.turn_length for s in held_out}) == [1024, 2048]
    in_chat = []
    for sequence in held_out:
        context = sequence.ids[: sequence.context]
        parts = sequence.ids[sequence.context :].reshape(sequence.turns, -1)
        marks = sequence.answer[sequence.context :].reshape(sequence.turns, -1)
        asking = sequence.asking[sequence.context :].reshape(sequence.turns, -1)
        assert (marks ^ asking).all() and not sequence.answer[: sequence.context].any()
        told = np.zeros(sequence.context, dtype=bool)
        for part, mark in zip(parts, marks, strict=True):
            known = part[1:][mark[:-1]]
            windows = np.lib.stride_tricks.sliding_window_view(context, len(known))
            places = np.flatnonzero((windows == known).all(1))  # prose may repeat itself
            first = next(p for p in places if sequence.told[p : p + len(known)].all())
            told[first : first + len(known)] = True
        assert np.array_equal(told, sequence.told)
        assert turns is None or sequence.turns == turns
        if turns is None:  # all but the first tokens of each part, and a rest of the last
            assert told.mean() > 0.6
        in_chat.append("Repeat the previous context" in tokenizer.decode(parts[0]))
    assert set(in_chat) == {True, False}


def test_what_is_oldest_is_asked_for_when_most_has_been_read_since(tokenizer):
    """Else a head that forgets the oldest tokens, and holds nearly all, seems to lose nothing."""
    sizes = {"fitting": 0, "fit_length": 4096, "held_out": 2, "lengths": (4096,)}
    _, asked = calibration_sequences(tokenizer, "auto", **sizes, documents="questions", seed=3)
    for sequence in asked:
        places = np.flatnonzero(sequence.answer)
        runs = np.split(places, np.flatnonzero(np.diff(places) > 1) + 1)
        values = [tokenizer.decode(sequence.ids[run + 1]).strip() for run in runs]
        text = tokenizer.decode(sequence.ids[: places[0]])
        once = [text.find(value) for value in values if text.count(value) == 1]
        assert len(once) > 5 and once == sorted(once, reverse=True)
    _, told = calibration_sequences(tokenizer, "auto", **sizes, documents="retold", seed=3)
    assert {s.context for s in told} == {4096 - 256} and all(s.turns >= 15 for s in told)


def test_every_second_document_hides_facts(tokenizer):
    """What asks for far tokens is the text itself and, as readers do, a question, in turn."""
    sizes = {"fitting": 8, "fit_length": 1024, "held_out": 4, "lengths": (2048, 1024)}
    made, held_out = calibration_sequences(
        tokenizer, "auto", **sizes, documents="retold_and_asked", seed=3
    )
    told_again = [sequence for sequence in held_out if sequence.turns]
    assert [bool(s.turns) for s in made[1::2]] == [bool(s.turns) for s in held_out]
    assert [bool(s.turns) for s in held_out] == [True, False, True, False]
    assert {len(s.ids) for s in held_out if not s.turns} == {2048, 1024}
    assert {s.context + s.turn_length for s in told_again} == {2048, 1024}
    # With the chat template and without one.
    texts = [tokenizer.decode(s.ids[s.context :]) for s in told_again]
    assert {"Repeat the previous context" in text for text in texts} == {True, False}


@pytest.mark.parametrize(
    ("documents", "kinds"),
    [
        ("text_and_asked", ["asked", "text", "asked", "text"]),
        ("all_in_turn", ["asked", "text", "asked", "retold"]),
    ],
)
def test_documents_may_be_of_several_kinds_in_turn(tokenizer, documents, kinds):
    sizes = {"fitting": 8, "fit_length": 1024, "held_out": 8, "lengths": (1024,)}
    made, held_out = calibration_sequences(tokenizer, "auto", **sizes, documents=documents, seed=3)

    def kind(sequence):
        return "retold" if sequence.turns else "asked" if sequence.answer.any() else "text"

    assert [kind(sequence) for sequence in held_out] == 2 * kinds
    assert [kind(sequence) for sequence in made] == [x for k in kinds for x in ("text", k)]


def test_documents_too_short_to_be_told_again_are_refused(tokenizer):
    with pytest.raises(SparsekError, match="too short") as refused:
        calibration_sequences(
            tokenizer, "auto", fitting=2, fit_length=64, held_out=1, lengths=(64,),
            documents="retold", seed=0,
        )  # fmt: skip
    assert "--calibrate-length" in refused.value.hint


def test_text_is_taken_from_many_documents(tmp_path):
    for number in range(5):
        (tmp_path / f"{number}.txt").write_text(str(number) * 100)

    def shares(characters: int, most: int) -> list[int]:
        read = "".join(calibration_texts(str(tmp_path), characters, most))
        return [read.count(str(number)) for number in range(5)]

    assert shares(150, 50) == [50, 50, 50, 0, 0]
    # All there is, before any document is left out.
    assert shares(500, 50) == [100] * 5
    assert shares(300, 50) == [100, 50, 50, 50, 50]


def test_of_one_endless_document_enough_is_taken(tmp_path):
    """All that is yielded is tokenised, and a file may be one line of any length."""
    from sparsek_cli.conversion.calibrate.sequences.texts import PLENTY

    (tmp_path / "a.txt").write_text("word " * 100_000)
    read = [len(text) for text in calibration_texts(str(tmp_path / "a.txt"), 1000, 100)]
    assert read == [100, PLENTY * 900]


@pytest.mark.parametrize("template", [None, "{{ messages"])
def test_models_without_a_chat_template_get_plain_questions(tokenizer, template):
    """Or with one that fails: it was a TemplateSyntaxError."""
    tokenizer.chat_template, said = template, []
    sizes = {"fitting": 1, "fit_length": 1024, "held_out": 1, "lengths": (1024,)}
    _, [sequence] = calibration_sequences(
        tokenizer, "auto", **sizes, documents="questions", seed=0, say=said.append
    )
    text = tokenizer.decode(sequence.ids)
    assert "\nAnswer: It is" in text.replace("Answer:It", "Answer: It") and sequence.is_recall
    assert any("plain questions: the chat template failed" in s for s in said) == bool(template)


@pytest.mark.parametrize(
    "sentence, is_prose",
    [
        ("Return the number of bytes that were written.", True),
        (
            "Other “statements” can be prefixed with a point (as in other shells).",
            True,
        ),
        ("x = read(buffer_size, 3) or default", False),
        (">>> import pdb; pdb.set_trace()", False),
        ("The mode is rb, 0x1f and rw_mode or x11.", False),
        ("Too short a sentence.", False),
        ("without a beginning this is half a sentence only.", False),
    ],
)
def test_own_text_is_prose_without_code(sentence, is_prose):
    assert texts._is_prose(sentence) == is_prose


def test_own_text_is_plenty_and_says_nothing_twice():
    read = [sentence for text in texts._library_prose() for sentence in texts._sentences(text)]
    assert sum(map(len, read)) > 400_000
    # Some that end without a full stop have grown together.
    assert len(set(read)) > 0.99 * len(read)
    assert sum(">>>" in sentence for sentence in read) < 0.01 * len(read)
