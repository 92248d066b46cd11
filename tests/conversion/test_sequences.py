"""The text and documents that calibration reads."""

from __future__ import annotations

import numpy as np
import pytest

from sparsek_cli.conversion.calibrate.sequences import calibration_sequences
from sparsek_cli.conversion.calibrate.texts import calibration_texts


def test_sequences_mark_what_stands_far_back(tokenizer):
    sizes = {"fitting": 6, "fit_length": 2048, "held_out": 2, "length": 2048, "documents": "mixed"}
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
        # value or of a repeated passage.
        ends = np.flatnonzero(sequence.answer[:-1] & ~sequence.answer[1:])
        starts = np.flatnonzero(~sequence.answer[:-1] & sequence.answer[1:])
        for start, end in zip(starts[:2], ends[:2], strict=True):
            answer = tokenizer.decode(sequence.ids[start + 2 : end + 2])
            assert answer in tokenizer.decode(sequence.ids[: start + 1])


@pytest.mark.parametrize(
    "documents", ["questions", "statements", "told_and_asked", "passages", "none"]
)
def test_documents_ask_for_one_thing_only(tokenizer, documents):
    sizes = {"fitting": 4, "fit_length": 1024, "held_out": 3, "length": 1024}
    _, held_out = calibration_sequences(tokenizer, "auto", **sizes, documents=documents, seed=3)
    for sequence in held_out:
        text, answer = tokenizer.decode(sequence.ids), sequence.answer
        assert ("assistant:" in text) == (documents in ("questions", "told_and_asked"))
        assert answer.any() == (documents != "none") and not (answer & sequence.asking).any()
        if documents in ("statements", "told_and_asked"):
            # Every marked word stands in the document, and the row before it is not marked.
            first = int(sequence.asking.argmax())
            before, places = tokenizer.decode(sequence.ids[:first]), np.flatnonzero(answer[:-1])
            for part in np.split(places, np.flatnonzero(np.diff(places) > 1) + 1):
                assert tokenizer.decode(sequence.ids[part + 1]).strip() in before
            assert len(places) > 10
        if documents == "passages":
            # What is predicted at a marked row stands in the text before, with what precedes it.
            first = int(sequence.asking.argmax())
            before = tokenizer.decode(sequence.ids[:first])
            for row in np.flatnonzero(answer)[::17]:
                assert tokenizer.decode(sequence.ids[row - 6 : row + 2]) in before


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


def test_models_without_a_chat_template_get_plain_questions(tokenizer):
    tokenizer.chat_template = None
    sizes = {"fitting": 1, "fit_length": 1024, "held_out": 1, "length": 1024}
    _, [sequence] = calibration_sequences(tokenizer, "auto", **sizes, documents="questions", seed=0)
    text = tokenizer.decode(sequence.ids)
    assert "\nAnswer: It is" in text.replace("Answer:It", "Answer: It") and sequence.is_recall
