"""Streams: reproducible, in range, and their answers do stand further back."""

import numpy as np
import pytest

from sparsek_cli.data import ANSWER, IGNORED, TEXT
from sparsek_cli.data.streams import STREAMS, Nucleotides, check_tokenizer, stream_tokenizer


@pytest.mark.parametrize("name", STREAMS)
@pytest.mark.parametrize("length", [33, 1500, 3001])
def test_a_stream_is_a_function_of_its_generator(name, length):
    source = STREAMS[name]()
    ids, roles = source(np.random.default_rng(5), length)
    again, _ = source(np.random.default_rng(5), length)
    other, _ = source(np.random.default_rng(6), length)
    assert ids.shape == roles.shape == (length,) and ids.dtype == np.int64
    assert (ids == again).all() and not (ids == other).all()
    assert ids.min() >= 0 and ids.max() < len(source.words)


@pytest.mark.parametrize("name", STREAMS)
def test_answers_are_settled_by_the_newest_tag(name):
    source = STREAMS[name]()
    ids, roles = source(np.random.default_rng(1), 9001)
    answers = np.flatnonzero(roles == ANSWER)
    signals, settled, distances = list(source.signals_of), {}, []
    assert len(answers) > 80
    for place in answers:
        tags = source.tags_of[signals.index(ids[place - 1])]
        told = np.flatnonzero(np.isin(ids[: place - 1], tags) & (roles[: place - 1] == IGNORED))
        assert settled.setdefault(int(ids[told[-1]]), int(ids[place])) == ids[place]
        # Where the same answer was last to be read, told or given.
        given = [p for p in answers if p < place and ids[p - 1] == ids[place - 1]]
        distances.append(place - max([told[-1], *given]))
    assert len(set(settled.values())) == len(settled) > 8
    assert np.median(distances) > 100
    rare = {*signals, *(tag for tags in source.tags_of for tag in tags)}
    assert not set(ids[roles == TEXT].tolist()) & rare


def test_tokenizers_speak_the_symbols():
    tokenizer = stream_tokenizer("nucleotides")
    ids = tokenizer("ATGTATAAAGGA")["input_ids"]
    assert ids[0] == Nucleotides.signals_of[3] and Nucleotides.words[ids[3]] == "GGA"
    assert tokenizer.decode(ids) == "ATGTATAAAGGA"
    assert stream_tokenizer("series")("7 255 0")["input_ids"] == [7, 255, 0]
    for name in STREAMS:
        check_tokenizer(name, stream_tokenizer(name))
    with pytest.raises(ValueError, match="needs `tokenizer: series`"):
        check_tokenizer("series", tokenizer)
