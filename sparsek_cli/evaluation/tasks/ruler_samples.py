"""RULER's synthetic samples (Hsieh et al. 2024, arXiv 2404.06654), from local text.

One generator per family. Each takes a random generator and a haystack and makes one sample that
fits a token budget; prompts, answer prefixes and counts are RULER's, so that a model sees what
RULER would show it, but haystack and word lists are local, so scores compare runs here, not runs
elsewhere.
"""

import string
import uuid
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
NEEDLE = "One of the special magic {kind} for {key} is: {value}."
NIAH = (
    "{some} special magic {kind} {are} hidden within the following text. Make sure to memorize it. "
    "I will quiz you about the {kind} afterwards.\n{context}\n"
    "What {are_all} the special magic {kind} for {query} mentioned in the provided text?"
)
NIAH_PREFIX = "The special magic {kind} for {query} mentioned in the provided text {are}"
TRACKING = (
    "Memorize and track the chain(s) of variable assignment hidden in the following text."
    "\n\n{context}\nQuestion: Find all variables that are assigned the value {query} in the text "
    "above."
)
TRACKING_PREFIX = (
    "Answer: According to the chain(s) of variable assignment in the text above, {count} variables "
    "are assgined the value {query}, they are:"  # the misspelling is RULER's
)
COMMON = (
    "Below is a numbered list of words. In these words, some appear more often than others. "
    "Memorize the ones that appear most often.\n{context}\n"
    "Question: What are the 10 most common words in the above list?"
)
COMMON_PREFIX = "Answer: The top 10 words that appear most often in the list are:"
FREQUENT = (
    "Read the following coded text and track the frequency of each coded word. Find the three most "
    "frequently appeared coded words. {context}\nQuestion: Do not provide any explanation. Please "
    "ignore the dots '....'. What are the three most frequently appeared words in the above coded "
    "text?"
)
FREQUENT_PREFIX = (
    "Answer: According to the coded text above, the three most frequently appeared words are:"
)
COMMON_WORDS, COMMON_REPEATS, RARE_REPEATS = 10, 30, 3
SHORT_REPEATS = (6, 1)  # the same two below 4096 tokens, where 10 x 30 words do not fit
ZETA_2 = np.pi**2 / 6  # normalises word frequencies proportional to rank ** -2


@dataclass
class Haystack:
    """What samples are made of.

    Attributes:
        sentences: of the local text, in order; lengths: running sum of their token counts.
        words: distinct lower-case words; keys: adjective-noun pairs.
        count: tokens of a text.
    """

    sentences: list[str]
    lengths: list[int]
    words: list[str]
    keys: list[str]
    count: Callable[[str], int]

    def passage(self, rng: np.random.Generator, tokens: int) -> list[str]:
        """Consecutive sentences of at most `tokens` tokens, from a random start, going round."""
        total = self.lengths[-1]
        if total <= tokens:
            many = 1 + tokens // max(1, total)
            return self._cut(self.sentences * many, tokens)
        start = int(rng.integers(len(self.sentences)))
        base = self.lengths[start - 1] if start else 0
        stop = bisect_right(self.lengths, base + tokens)
        chosen = self.sentences[start:stop]
        left = tokens - (self.lengths[stop - 1] - base if stop > start else 0)
        return chosen + (self._cut(self.sentences, left) if stop == len(self.sentences) else [])

    def _cut(self, sentences: list[str], tokens: int) -> list[str]:
        kept, used = [], 0
        for sentence in sentences:
            used += self.count(" " + sentence)
            if used > tokens:
                break
            kept.append(sentence)
        return kept


def niah(
    rng: np.random.Generator,
    hay: Haystack,
    room: int,
    *,
    background: str,
    keys: str = "words",
    values: str = "numbers",
    num_keys: int = 1,
    num_values: int = 1,
    num_queries: int = 1,
) -> dict[str, Any]:
    """A needle sample.

    Args:
        room: tokens for the prompt and the answer prefix.
        background: "noise", "text" or "needles" (the haystack is made of other needles).
        keys, values: "words", "numbers" or "uuids".
        num_keys, num_values, num_queries: needles with different keys, values per key, keys asked.
    """
    num_keys = max(num_keys, num_queries)
    names = _distinct(rng, hay, keys, num_keys)
    told = [_distinct(rng, hay, values, num_values) for _ in names]
    needles = [
        NEEDLE.format(kind=values, key=name, value=value)
        for name, many in zip(names, told, strict=True)
        for value in many
    ]
    needles = [needles[i] for i in rng.permutation(len(needles))]
    asked = sorted(rng.choice(num_keys, size=num_queries, replace=False).tolist())
    query = _listed([names[i] for i in asked])
    answers = [value for i in asked for value in told[i]]
    single = num_queries * num_values == 1
    words = {
        "kind": values[:-1] if single else values,
        "query": query,
        "some": "A" if single else "Some",
        "are": "is" if single else "are",
        "are_all": "is" if single else "are all",
    }
    prefix = NIAH_PREFIX.format(**words)

    def make(tokens: int) -> tuple[str, list[float]]:
        if background == "text":
            lines, joint = hay.passage(rng, tokens), " "
        elif background == "noise":
            lines, joint = [NOISE] * (tokens // (hay.count(NOISE) + 1)), "\n"
        else:
            one = hay.count(_other_needle(rng, hay, keys, values)) + 1
            lines = [_other_needle(rng, hay, keys, values) for _ in range(tokens // one)]
            joint = "\n"
        # Depths spread over the whole document, as RULER's forty levels are.
        places = sorted(rng.random(len(needles)).tolist())
        for offset, (place, needle) in enumerate(zip(places, needles, strict=True)):
            lines.insert(round(place * (len(lines) - offset)) + offset, needle)
        return NIAH.format(context=joint.join(lines), **words), places

    fixed = hay.count(NIAH.format(context=" ".join(needles), **words) + prefix)
    text, places = _fit(make, room, fixed, hay.count, prefix)
    by_needle = dict(zip(needles, places, strict=True))
    depths = [
        by_needle[NEEDLE.format(kind=values, key=names[i], value=v)] for i in asked for v in told[i]
    ]
    question = asked_after(NIAH, **words)
    return _sample(text, question, prefix, answers) | {"depth": round(float(np.mean(depths)), 4)}


def variable_tracking(
    rng: np.random.Generator, hay: Haystack, room: int, *, hops: int = 4
) -> dict[str, Any]:
    """A chain X1 = 12345, X2 = X1, ... hidden in noise; which variables hold the value."""
    shown, value, names = _chain(rng, 3, hops, [NOISE] * 4)
    example = (
        TRACKING.format(context=shown, query=value)
        + " "
        + TRACKING_PREFIX.format(count=hops + 1, query=value)
        + " "
        + " ".join(names)
        + "\n\n"
    )

    def make(tokens: int) -> tuple[str, tuple[str, list[str]]]:
        lines = [NOISE] * max(2, tokens // (hay.count(NOISE) + 1))
        text, value, names = _chain(rng, 5, hops, lines)
        return example + TRACKING.format(context=text, query=value), (value, names)

    prefix = TRACKING_PREFIX.format(count=hops + 1, query="12345")
    fixed = hay.count(example + TRACKING.format(context="", query="12345") + prefix) + 16 * hops
    text, (value, names) = _fit(make, room, fixed, hay.count, prefix)
    prefix = TRACKING_PREFIX.format(count=hops + 1, query=value)
    return _sample(text, asked_after(TRACKING, query=value), prefix, names)


def common_words(rng: np.random.Generator, hay: Haystack, room: int) -> dict[str, Any]:
    """A numbered list in which ten words come more often than the others."""
    often, rarely = (COMMON_REPEATS, RARE_REPEATS) if room >= 4000 else SHORT_REPEATS
    order = rng.permutation(len(hay.words))
    common = [hay.words[i] for i in order[:COMMON_WORDS]]

    def make(tokens: int) -> tuple[str, None]:
        entries = max(0, int(tokens / per_entry) - often * COMMON_WORDS)
        rare = [hay.words[i] for i in order[COMMON_WORDS : COMMON_WORDS + entries // rarely]]
        listed = common * often + rare * rarely
        listed = [listed[i] for i in rng.permutation(len(listed))]
        context = " ".join(f"{number}. {word}" for number, word in enumerate(listed, 1))
        return COMMON.format(context=context), None

    probe = " ".join(f"{i}. {hay.words[k]}" for i, k in enumerate(order[:200], 1000))
    per_entry = hay.count(probe) / min(200, len(order))
    fixed = hay.count(COMMON.format(context="") + COMMON_PREFIX)
    text, _ = _fit(make, room, fixed, hay.count, COMMON_PREFIX)
    return _sample(text, asked_after(COMMON), COMMON_PREFIX, common)


def frequent_words(rng: np.random.Generator, hay: Haystack, room: int) -> dict[str, Any]:
    """Coded words whose frequencies fall with the square of their rank; the first is noise."""
    letters = np.array(list(string.ascii_lowercase))
    coded = ["".join(rng.choice(letters, size=6)) for _ in range(max(8, room // 50))]
    coded[0] = "..."
    shares = np.arange(1, len(coded) + 1, dtype=np.float64) ** -2 / ZETA_2

    def make(tokens: int) -> tuple[str, None]:
        counts = (shares * tokens / per_word).astype(int)
        words = [word for word, n in zip(coded, counts, strict=True) for _ in range(n)]
        words = [words[i] for i in rng.permutation(len(words))]
        return FREQUENT.format(context=" ".join(words)), None

    # The most frequent "word" is three dots, usually one token; the rest are letter salad.
    dots, salad = hay.count(" ..." * 20) / 20, hay.count(" " + " ".join(coded[1:21])) / 20
    per_word = shares[0] * dots + (1 - shares[0]) * salad
    fixed = hay.count(FREQUENT.format(context="") + FREQUENT_PREFIX)
    text, _ = _fit(make, room, fixed, hay.count, FREQUENT_PREFIX)
    return _sample(text, asked_after(FREQUENT), FREQUENT_PREFIX, coded[1:4])


def _fit(
    make: Callable[[int], tuple[str, Any]],
    room: int,
    fixed: int,
    count: Callable[[str], int],
    prefix: str,
) -> tuple[str, Any]:
    """The largest of a few attempts of `make` that fits `room` tokens together with `prefix`."""
    tokens = room - fixed
    for _ in range(12):
        if tokens < 0:
            break
        text, extra = make(tokens)
        over = count(f"{text} {prefix}") - room
        if over <= 0:
            return text, extra
        tokens -= over + 8
    raise ValueError(f"no sample fits into {room} tokens")


def _sample(text: str, asked: str, prefix: str, answers: Sequence[str]) -> dict[str, Any]:
    return {"input": text, "asked": asked, "gen_prefix": prefix, "outputs": list(answers)}


def asked_after(template: str, **words: str) -> str:
    """What a prompt says after its context."""
    return template.split("{context}")[1].format(**words).strip()


def _distinct(rng: np.random.Generator, hay: Haystack, kind: str, count: int) -> list[str]:
    found: dict[str, None] = {}
    while len(found) < count:
        found[_drawn(rng, hay, kind)] = None
    return list(found)


def _drawn(rng: np.random.Generator, hay: Haystack, kind: str) -> str:
    if kind == "words":
        return hay.keys[int(rng.integers(len(hay.keys)))]
    if kind == "numbers":
        return str(int(rng.integers(1_000_000, 10_000_000)))
    return str(uuid.UUID(bytes=rng.bytes(16), version=4))


def _other_needle(rng: np.random.Generator, hay: Haystack, keys: str, values: str) -> str:
    key, value = _drawn(rng, hay, keys), _drawn(rng, hay, values)
    return NEEDLE.format(kind=values, key=key, value=value)


def _listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else ", ".join(names[:-1]) + ", and " + names[-1]


def _chain(
    rng: np.random.Generator, letters: int, hops: int, lines: list[str]
) -> tuple[str, str, list[str]]:
    """(text with the assignments in order at random places, the value, the variables)."""
    alphabet = np.array(list(string.ascii_uppercase))
    names: dict[str, None] = {}
    while len(names) < hops + 1:
        names["".join(rng.choice(alphabet, size=letters))] = None
    chain = list(names)
    value = str(int(rng.integers(10_000, 99_999)))
    told = [f"VAR {chain[0]} = {value}"]
    told += [f"VAR {new} = VAR {old}" for old, new in zip(chain, chain[1:], strict=False)]
    places = sorted(rng.integers(0, len(lines) + 1, size=len(told)).tolist())
    mixed = list(lines)
    for offset, (place, line) in enumerate(zip(places, told, strict=True)):
        mixed.insert(place + offset, line)
    return "\n".join(mixed), value, chain
