"""What a checkpoint is worth under each policy: perplexity of unseen novels, recall by phrasing."""

import argparse
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sparsek_cli import hub
from sparsek_cli.data.corpus import load_corpus
from sparsek_cli.data.filler import Filler
from sparsek_cli.data.phrasings import phrasings
from sparsek_cli.data.questions import Question, make_questions
from sparsek_cli.evaluation.policies.registry import make_policy
from sparsek_cli.loading import load_model, load_tokenizer
from sparsek_cli.training.measure import recalled, token_losses, windows

SINKS = 4  # of a conversion that is measured
SPLITS = ("calibration", "held_out", "unseen")
NEEDLES = (1, 4, 16)
WINDOW_SHARE = 1 / 8  # of the slots of a conversion
SEED = 97
BINS = 32  # spans of equal length that the loss by position is averaged over


@dataclass(frozen=True)
class Suite:
    """The same windows and questions for every checkpoint with one tokenizer.

    Attributes:
        rows: [windows, length] token ids of unseen text.
        questions: by split of the phrasings and number of needles.
        batch_tokens: tokens that go through a model together.
    """

    rows: np.ndarray
    questions: dict[tuple[str, int], list[Question]]
    batch_tokens: int

    @classmethod
    def of(
        cls, tokenizer_folder: Path, text: str, *, length: int, windows_: int, questions: int,
        batch_tokens: int, splits: Sequence[str] = SPLITS, needles_: Sequence[int] = NEEDLES,
    ) -> "Suite":  # fmt: skip
        """From unseen text; `questions` of each kind and number of needles (0: no recall)."""
        tokenizer = load_tokenizer(tokenizer_folder)
        corpus = load_corpus(text, tokenizer)
        filler = Filler.from_corpus(corpus, tokenizer)
        most = max(1, length // 128)
        asked = {
            (split, needles): make_questions(
                [SEED], filler, length=length, needles=needles, count=questions,
                phrasings=phrasings(split),
            )
            for split in splits
            for needles in needles_
            if questions and needles <= most
        }  # fmt: skip
        return cls(windows(corpus, length, windows_), asked, batch_tokens)

    def measure(self, model: Any, policy: str) -> dict[str, Any]:
        """Losses in nats per token and recall in percent, under one policy.

        Returns:
            loss and ppl, loss_last and ppl_last (of the last quarter), loss_by_position (`BINS`
            means), recall: {split: {needles: %}}, and by_depth: a pair (depth in the document,
            answered or not) per question.
        """
        with make_policy(policy, seed=SEED).applied(model):
            losses = token_losses(model, self.rows, batch_tokens=self.batch_tokens)
            last = losses[:, losses.shape[1] * 3 // 4 :]
            recall: dict[str, dict[str, float]] = {}
            by_depth: list[tuple[float, int]] = []
            for (split, needles), questions in self.questions.items():
                right = recalled(model, questions, batch_tokens=self.batch_tokens)
                recall.setdefault(split, {})[str(needles)] = 100 * float(right.mean())
                depths = (round(question.fact.depth, 3) for question in questions)
                by_depth += zip(depths, right.astype(int).tolist(), strict=True)
        return {
            "ppl_last": float(last.mean().exp()),
            "ppl": float(losses.mean().exp()),
            "loss_last": float(last.mean()),
            "loss": float(losses.mean()),
            "loss_by_position": by_position(losses),
            "recall": recall,
            "by_depth": by_depth,
        }


def by_position(losses: torch.Tensor) -> list[float]:
    """Mean loss over `BINS` equal spans of positions, nats, from losses [rows, positions]."""
    parts = np.array_split(losses.mean(0).numpy(), BINS)
    return [round(float(part.mean()), 4) for part in parts]


def load(folder: Path, device: torch.device, dtype: torch.dtype) -> Any:
    """A checkpoint ready to be measured."""
    return load_model(hub.resolve(str(folder)), device=device, dtype=dtype)


def conversion_arguments(parser: argparse.ArgumentParser) -> None:
    """What experiments take that convert one base in several ways and measure each."""
    parser.add_argument("--held-out", required=True, help="text that is only measured")
    parser.add_argument("--train", help="text to calibrate on; default: prose found here")
    parser.add_argument("--model", default="tiny", help="base to convert: a folder, or tiny")
    parser.add_argument("--length", type=int, default=4096, help="tokens of windows and documents")
    parser.add_argument("--tokens", type=int, default=262_144, help="text to calibrate on")
    parser.add_argument("--windows", type=int, default=64, help="windows measured")
    parser.add_argument("--questions", type=int, default=64, help="of each kind and number")


def conversion_words(
    slots: int, *, window: float, sinks: int, calibrate: str, length: int, tokens: int, device: str
) -> dict[str, Any]:
    """Words of `sparsek convert` for so many slots; `window` is its share of them."""
    near = int(slots * window)
    return {
        "topk": slots - near - sinks,
        "window": near,
        "sinks": sinks,
        "calibrate": calibrate,
        "calibrate_length": length,
        "calibrate_tokens": tokens,
        "device": device,
    }


def with_tokenizer(name: str, place: Path) -> Path:
    """The folder of a base; one kept without its tokenizer is copied and gets the bundled one."""
    found = hub.resolve(name).path
    if (found / "tokenizer.json").is_file():
        return found
    shutil.copytree(found, place, dirs_exist_ok=True)
    for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copyfile(hub.bundled("tiny").path / file, place / file)
    return place


@contextmanager
def weights_folder(folder: Path) -> Iterator[Path]:
    """A folder inside `folder` for checkpoints that only live as long as they are measured."""
    weights = folder / "weights"
    try:
        yield weights
    finally:
        shutil.rmtree(weights, ignore_errors=True)


def short_recall(model: Any, tokenizer_folder: Path, text: str, questions: int = 128) -> float:
    """Percent of the questions about two facts in 256 tokens that a model answers."""
    tokenizer = load_tokenizer(tokenizer_folder)
    filler = Filler.from_corpus(load_corpus(text, tokenizer), tokenizer)
    asked = make_questions(
        [SEED], filler, length=256, needles=2, count=questions,
        phrasings=phrasings("calibration", "held_out"),
    )  # fmt: skip
    return 100 * float(recalled(model, asked).mean())


def recall_text(recall: dict[str, dict[str, float]]) -> dict[str, str]:
    """Recall for a table: per split "1 / 4 / 16 needles"."""
    return {
        split: "/".join(f"{value:.0f}" for value in by_needles.values())
        for split, by_needles in recall.items()
    }


def share_closed(row: dict[str, Any], dense: dict[str, Any], window: dict[str, Any]) -> float:
    """How much of the window's loss over dense is gone, in percent, on the last quarter."""
    gap = window["loss_last"] - dense["loss_last"]
    return 100 * (window["loss_last"] - row["loss_last"]) / gap if gap else float("nan")
