"""How calibration finds scorers: what ablations settled, see docs/results/2026-11-quality.md.

No recipe has keys for these; experiments and tests hand another `Method` to `conversion.plan.plan`.
"""

from dataclasses import dataclass, replace
from typing import Any

SCORERS = ("linear", "mlp")
TARGETS = ("max", "mean", "p99")
# What asks for things far back, in words that follow "documents".
DOCUMENTS = {
    "retold": "that are told again",
    "retold_and_asked": "that are told again, or with facts told again and asked for",
    "text_and_asked": "of plain text, or with facts told again and asked for",
    "all_in_turn": "of plain text, that are told again, or with facts told again and asked for",
    "statements": "whose facts are told again",
    "questions": "with questions",
    "told_and_asked": "with facts told again and asked for",
    "mixed": "with questions and passages told again",
    "none": "of plain text",
}
MAPS = ("text", "all", "answers", "blend")


@dataclass(frozen=True)
class Method:
    """How scorers are found.

    Attributes:
        scorer: what scores are of a token's hidden state: `linear`, in closed form, or `mlp`: that
            and a hidden layer, which keeps more facts.
        width: units of the hidden layer.
        target: what of the attention that later queries give a key its score follows: the largest
            (`max`), the mean, or the 99th percentile (`p99`).
        documents: what asks for things far back: the text itself, told again (`retold`: no
            template), facts told again (`statements`), `questions`, half of each
            (`told_and_asked`), that and retold documents in turn (`retold_and_asked`), that and
            plain text in turn (`text_and_asked`), that and one of both in turn (`all_in_turn`),
            questions and passages (`mixed`), or nothing (`none`). `auto`: retold_and_asked, and
            told_and_asked where the slots of all heads together do not hold two heads' whole
            documents.
        maps: maps that a KV head chooses from, by what they are fitted on; `blend` exists with
            linear scorers only.
        slopes: slopes that it chooses from, in units of score spread per topk tokens; 0 is pure
            importance.
        sizes: shares of topk at which a KV head's errors are compared; that of the whole document
            is added.

    Raises:
        ValueError: a name that does not exist, or no map that the scorer has.
    """

    scorer: str = "mlp"
    width: int = 128
    target: str = "max"
    documents: str = "auto"
    maps: tuple[str, ...] = MAPS
    slopes: tuple[float, ...] = (0.0, 0.05, 0.2, 0.7, 2.5)
    sizes: tuple[float, ...] = (
        0.0, 0.0625, 0.125, 0.25, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0,
    )  # fmt: skip

    def __post_init__(self) -> None:
        known = SCORERS, TARGETS, ("auto", *DOCUMENTS)
        for value, names in zip((self.scorer, self.target, self.documents), known, strict=True):
            if value not in names:
                raise ValueError(f"{value!r} is none of {', '.join(names)}")
        if not set(self.maps) <= set(MAPS) or not self.maps:
            raise ValueError(f"maps are some of {', '.join(MAPS)}, not {self.maps}")
        if self.scorer == "mlp" and set(self.maps) == {"blend"}:
            raise ValueError("an mlp scorer needs another map than blend")


def method_of(block: dict[str, Any]) -> Method:
    """The settled method for a model that has scorers already: a hidden layer keeps its width.

    Args:
        block: `sparsek` of its config.json.
    """
    scorer = block["scorer"]
    return Method(width=scorer["width"]) if scorer["type"] == "mlp" else Method()


def with_documents(method: Method, slots: int, length: int) -> Method:
    """`method` with documents that calibration can learn from.

    Whoever is to tell a text again needs heads that hold all of it. Where all `slots` together are
    fewer than two documents of `length` tokens, heads cannot, and learn what matters from facts.
    """
    if method.documents != "auto":
        return method
    return replace(
        method, documents="retold_and_asked" if slots >= 2 * length else "told_and_asked"
    )
