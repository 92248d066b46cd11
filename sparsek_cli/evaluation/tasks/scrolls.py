"""lm-eval's seven SCROLLS tasks, made to load offline and beside transformers >= 5.20.

The prompts, requests and per-sample scoring stay lm-eval's: its classes are subclassed. Replaced
are the three things that cannot work here: the import of
`transformers.data.metrics.squad_metrics`, which transformers dropped; `download()`, which only
knows a hub address that the offline switches do not reach; and the corpus metric, code fetched
from the hub, for which there is an equivalent below (Shaham et al. 2022: F1 over words and ROUGE,
best reference, times 100, rounded to four digits).
"""

import re
import string
import sys
from collections import Counter
from collections.abc import Sequence
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

from sparsek_cli.data.text.columns import whole
from sparsek_cli.data.text.read_files import json_rows
from sparsek_cli.errors import SparsekError

SQUAD_METRICS = "transformers.data.metrics.squad_metrics"
HUB = "https://huggingface.co/datasets/tau/scrolls"


def normalize_answer(text: str) -> str:
    """Lower case, no punctuation, no articles, single spaces: SQuAD's notion of the same answer."""
    text = "".join(c for c in text.lower() if c not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def _lm_eval_scrolls() -> ModuleType:
    """lm-eval's module of SCROLLS tasks, with what it needs from an older transformers supplied."""
    try:
        missing = find_spec(SQUAD_METRICS) is None
    except ModuleNotFoundError:
        missing = True
    if missing:
        supplied = ModuleType(SQUAD_METRICS)
        supplied.normalize_answer = normalize_answer
        names = ("transformers.data", "transformers.data.metrics")
        parents = {n: ModuleType(n) for n in names if n not in sys.modules}
        parents[names[1]] = parent = parents.get(names[1]) or sys.modules[names[1]]
        had = hasattr(parent, "squad_metrics")
        parent.squad_metrics = supplied
        sys.modules.update(parents | {SQUAD_METRICS: supplied})
        try:
            import lm_eval.tasks.scrolls.task as module
        finally:  # nobody else should believe that transformers has it again
            del sys.modules[SQUAD_METRICS]
            if not had:
                del parent.squad_metrics
        return module
    import lm_eval.tasks.scrolls.task as module

    return module


_scrolls = _lm_eval_scrolls()


class LocalMetric:
    """What `evaluate.load(tau/scrolls metric)` would return: `compute(predictions, references)`."""

    def __init__(self, config: str):
        self.rouge = config in ("gov_report", "summ_screen_fd", "qmsum")

    def compute(self, predictions: Sequence[str], references: Sequence[list[str]]) -> dict:
        """Corpus scores, 0 to 100.

        Args:
            predictions: one text per sample.
            references: the acceptable texts of each sample; the best one counts.
        """
        pairs = list(zip(predictions, references, strict=True))
        score = _rouge if self.rouge else _f1
        scores = [[score(prediction, one) for one in many] for prediction, many in pairs]
        names = scores[0][0]
        best = {name: [max(one[name] for one in many) for many in scores] for name in names}
        return {name: round(100 * sum(v) / len(v), 4) for name, v in best.items()}


def _f1(prediction: str, reference: str) -> dict[str, float]:
    ours, theirs = normalize_answer(prediction).split(), normalize_answer(reference).split()
    same = sum((Counter(ours) & Counter(theirs)).values())
    return {"f1": 2 * same / (len(ours) + len(theirs)) if same else 0.0}


def _rouge(prediction: str, reference: str) -> dict[str, float]:
    scores = _rouge_scorer().score(target=reference, prediction=prediction)
    return {f"rouge/{name}": score.fmeasure for name, score in scores.items()}


@lru_cache(maxsize=1)
def _rouge_scorer() -> Any:
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(["rouge1", "rouge2", "rougeL"], use_stemmer=False)


class _Offline:
    """Mixin before lm-eval's class: data from a folder when one is given, the local metric."""

    def __init__(self, config: dict[str, Any] | None = None):
        from lm_eval.api.task import ConfigurableTask

        config = dict(config or {})
        metadata = {"version": self.VERSION} | dict(config.get("metadata") or {})
        self._folder, self._limit = metadata.get("data"), metadata.get("limit")
        ConfigurableTask.__init__(self, config={"metadata": metadata, "task": config.get("task")})
        self.metric = LocalMetric(self.DATASET_NAME)

    def download(self, *args: Any, **kwargs: Any) -> None:
        """Fills `self.dataset` with the splits found, duplicates of a question joined."""
        if self._folder is None:
            super().download(*args, **kwargs)
            return
        from datasets import Dataset, DatasetDict

        files = local_files(self._folder, self.DATASET_NAME)
        if "validation" not in files:
            raise SparsekError(
                f"no {self.DATASET_NAME}/validation.jsonl[.zst] under {self._folder}",
                hint=where(self.DATASET_NAME),
            )
        # Training rows would only serve few-shot examples, which these prompts have no room for.
        rows = _scrolls._drop_duplicates_in_input(Dataset.from_list(_rows(files["validation"])))
        if self._limit:  # lm-eval takes the first ones too, but goes through all of them first
            rows = rows.select(range(min(self._limit, len(rows))))
        self.dataset = DatasetDict({"validation": rows})

    def has_training_docs(self) -> bool:
        return "train" in self.dataset


def local_files(folder: str | Path, config: str) -> dict[str, Path]:
    """The files of one dataset by split, from FOLDER/<config>/ or below scrolls/ there."""
    found = {}
    for base in (Path(folder) / config, Path(folder) / "scrolls" / config):
        for split in ("train", "validation", "test"):
            for ending in ("jsonl", "jsonl.zst"):
                file = base / f"{split}.{ending}"
                if file.is_file():
                    found.setdefault(split, file)
    return found


def where(config: str) -> str:
    """Where a missing dataset is to be had and to be put."""
    if config == "fairytale_qa":
        return "make it from github.com/uci-soe/FairytaleQAData: id, pid, input, output"
    # The same text for all of them: whoever lacks several is told once.
    return f"unzip {HUB}/resolve/main/<set>.zip there, or connect and drop --data"


def _rows(file: Path) -> list[dict[str, str]]:
    """The rows of a file, with the four columns every SCROLLS dataset has."""
    rows = []
    for place, row in json_rows(file):
        found = {key: row.get(key) for key in ("id", "pid", "input", "output")}
        wrong = [key for key, value in found.items() if not isinstance(value, str)]
        if wrong:
            raise SparsekError(
                f"{place}: not a SCROLLS row ('{wrong[0]}' is no text)",
                hint="each line is a JSON object with id, pid, input and output",
            )
        rows.append({key: whole(value, place) for key, value in found.items()})
    if not rows:
        raise SparsekError(f"{file} is empty", hint=where(file.parent.name))
    return rows


class GovReport(_Offline, _scrolls.GovReport):
    """Summaries of government reports."""


class SummScreenFD(_Offline, _scrolls.SummScreenFD):
    """Recaps of television episodes from their scripts."""


class QMSum(_Offline, _scrolls.QMSum):
    """Query-based summaries of meetings."""


class Qasper(_Offline, _scrolls.Qasper):
    """Questions about research papers."""


class NarrativeQA(_Offline, _scrolls.NarrativeQA):
    """Questions about books and film scripts."""


class FairytaleQA(_Offline, _scrolls.NarrativeQA):
    """NarrativeQA's prompt and metric over fairy tales; its own name, for the scores differ."""

    DATASET_NAME = "fairytale_qa"


class QuALITY(_Offline, _scrolls.QuALITY):
    """Multiple choice about long stories."""


class ContractNLI(_Offline, _scrolls.ContractNLI):
    """Entailed, contradicted or not mentioned by a contract."""
