"""What a run consists of: one task at one length each; loading them, measuring their prompts."""

import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparsek_cli.errors import SparsekError, UsageError
from sparsek_cli.evaluation.catalogue import TASK_FOLDER, Entry, catalogue

FEWSHOT_SEED = 1234  # lm-eval's default, so that its few-shot examples are the same
# Run where the first one's data is absent and the second one's is there.
STAND_INS = {"scrolls_narrativeqa": "scrolls_fairytaleqa"}
CUT_HINT = "--truncate left|middle cuts them and counts it; --max-length N raises the limit"
HUB_PATIENCE = 3.0  # seconds to find out whether the hub answers


@dataclass(frozen=True)
class Unit:
    """One task at one length.

    Attributes:
        entry: the task. length: prompt tokens, or None where the data decides.
        task: lm-eval's loaded task object. chat: whether prompts go through the chat template.
    """

    entry: Entry
    length: int | None
    task: Any
    chat: bool

    @property
    def name(self) -> str:
        return self.entry.name if self.length is None else f"{self.entry.name}@{self.length}"


@dataclass(frozen=True)
class Absent:
    """A task whose data is not here: why, and what to do."""

    name: str
    reason: str
    remedy: str

    def as_dict(self) -> dict[str, str]:
        return {"task": self.name, "reason": self.reason, "remedy": self.remedy}


def load_units(
    entries: list[Entry],
    recipe: Any,
    *,
    tokenizer: Any,
    tokenizer_path: str,
    max_length: int,
    say: Callable[[str], None],
) -> tuple[list[Unit], list[Absent]]:
    """Loads every task at every length; data that is missing is reported, not fatal.

    Args:
        recipe: an EvaluateRecipe.
        tokenizer: sizes generated prompts; has a chat template or not.
        tokenizer_path: where tasks load it from.
        max_length: lengths above it are left out unless asked for.

    Raises:
        UsageError: --lengths beyond max_length, or not one task could be loaded.
    """
    too_long = [n for n in recipe.lengths if n > max_length]
    if too_long and any(entry.lengths for entry in entries):
        raise UsageError(
            f"--lengths {too_long[0]} is beyond the model's {max_length} tokens",
            hint=f"name lengths up to {max_length}, or raise --max-length if the model can take it",
        )
    if any(_needs_hub(entry, recipe) for entry in entries) and not hub_answers():
        _go_offline()
    units: list[Unit] = []
    absent: list[Absent] = []
    queue = list(entries)
    for entry in queue:  # grows by tasks that stand in for absent ones
        chat = _uses_chat(entry, recipe, tokenizer)
        for length in _lengths(entry, recipe, max_length):
            settings = {
                "tokenizer": tokenizer_path,
                "pretrained": tokenizer_path,
                "data": recipe.data,
                "text": recipe.text,
                "seed": recipe.seed,
                "limit": recipe.limit_of(entry.name),
                "chat": chat,
                "max_seq_lengths": [length or 4096],
            }
            try:
                task = _load(entry, settings)
            except _DATA_ERRORS as error:
                if entry in entries:
                    absent.append(_absent(entry, recipe, error))
                other = catalogue().get(STAND_INS.get(entry.name, ""))
                if other is not None and other not in queue and recipe.data is not None:
                    queue.append(other)
                break
            units.append(Unit(entry, length, task, chat))
    for item in absent:
        say(f"skipped {item.name}: {item.reason} ({item.remedy})")
    if not units:
        raise SparsekError(
            f"no data for {', '.join(item.name for item in absent)}: {absent[0].reason}",
            hint=absent[0].remedy,
        )
    return units, absent


_DATA_ERRORS = (
    SparsekError,
    OSError,
    ImportError,
    ValueError,
    KeyError,
    RuntimeError,
    AssertionError,
)


def _absent(entry: Entry, recipe: Any, error: Exception) -> Absent:
    if isinstance(error, UsageError):
        raise error
    if isinstance(error, SparsekError):
        return Absent(entry.name, error.message, error.hint)
    lines = str(error).strip().splitlines()
    reason = lines[0] if lines else type(error).__name__
    if isinstance(error, ImportError):
        return Absent(entry.name, reason, "install what it names")
    remedy = entry.source or "connect to the hub once, or set HF_HOME to a cache that has it"
    return Absent(entry.name, reason[:200], remedy)


def _uses_chat(entry: Entry, recipe: Any, tokenizer: Any) -> bool:
    has = bool(getattr(tokenizer, "chat_template", None))
    if recipe.chat_template == "on" and not has:
        raise UsageError(
            "--chat-template on, but the tokenizer has no chat template", hint="drop the flag"
        )
    return has and (recipe.chat_template == "on" or (recipe.chat_template == "auto" and entry.chat))


def _lengths(entry: Entry, recipe: Any, max_length: int) -> list[int | None]:
    if not entry.lengths:
        return [None]
    if recipe.lengths:
        return list(recipe.lengths)
    return [n for n in entry.lengths if n <= max_length] or [max_length]


def _needs_hub(entry: Entry, recipe: Any) -> bool:
    return entry.builtin or (entry.data.startswith("hub") and recipe.data is None)


def hub_answers() -> bool:
    """Whether the Hugging Face hub can be reached, found out within seconds."""
    if os.environ.get("HF_HUB_OFFLINE", "") in ("1", "true", "ON", "YES"):
        return False
    import socket
    from urllib.parse import urlparse

    url = urlparse(os.environ.get("HF_ENDPOINT") or "https://huggingface.co")
    try:
        address = (url.hostname or "huggingface.co", url.port or 443)
        with socket.create_connection(address, timeout=HUB_PATIENCE):
            return True
    except OSError:
        return False


def _go_offline() -> None:
    """Makes every later attempt to reach the hub fail at once; what is cached still loads."""
    os.environ["HF_HUB_OFFLINE"] = os.environ["HF_DATASETS_OFFLINE"] = "1"
    import datasets
    import huggingface_hub.constants

    huggingface_hub.constants.HF_HUB_OFFLINE = True
    datasets.config.HF_DATASETS_OFFLINE = datasets.config.HF_HUB_OFFLINE = True


def _load(entry: Entry, settings: dict[str, Any]) -> Any:
    """One lm-eval task object, configured as lm-eval's own command line would."""
    with quiet_lm_eval():
        from lm_eval.tasks import TaskManager

        manager = TaskManager(
            include_path=str(TASK_FOLDER), include_defaults=entry.builtin, metadata=settings
        )
        [task] = manager.load([entry.name])["tasks"].values()
        if task.get_config("num_fewshot") is None:
            task.set_config(key="num_fewshot", value=0)
        task.set_fewshot_seed(seed=FEWSHOT_SEED)
        return task


@contextmanager
def quiet_lm_eval() -> Iterator[None]:
    """Keeps the bars and notes of lm-eval, datasets and transformers off the terminal."""
    import datasets
    import lm_eval.api.model
    import lm_eval.api.task
    from transformers.utils import logging as transformers_logging

    names = ("lm_eval", "datasets", "huggingface_hub")
    before = {name: logging.getLogger(name).level for name in names}
    verbosity = transformers_logging.get_verbosity()
    datasets_bars = datasets.utils.logging.is_progress_bar_enabled()
    modules = (lm_eval.api.task, lm_eval.api.model)
    bars = [module.tqdm for module in modules]
    for name in names:
        logging.getLogger(name).setLevel(logging.ERROR)
    transformers_logging.set_verbosity_error()
    datasets.disable_progress_bars()
    for module in modules:  # drawn without asking
        module.tqdm = lambda items, **options: items
    try:
        yield
    finally:
        for name, level in before.items():
            logging.getLogger(name).setLevel(level)
        transformers_logging.set_verbosity(verbosity)
        if datasets_bars:
            datasets.enable_progress_bars()
        for module, bar in zip(modules, bars, strict=True):
            module.tqdm = bar


def refuse_long(units: list[Unit], lm: Any, recipe: Any) -> tuple[list[Unit], list[Absent]]:
    """Leaves out tasks with prompts that do not fit, unless the user said how to cut them.

    Found out for all tasks before anything has run. Nothing is ever cut without being asked for.

    Returns:
        The units that fit, and the refused ones with how many prompts are over the limit.

    Raises:
        UsageError: none fits.
    """
    fitting: list[Unit] = []
    refused: list[Absent] = []
    for unit in units:
        build_requests(unit, lm, recipe)
        count, longest = lm.over_limit(unit.task.instances)
        if not count or recipe.truncate != "refuse":
            fitting.append(unit)
            continue
        reason = (
            f"{count} of {len(unit.task.instances)} prompts are longer than the model's "
            f"{lm.max_length:,} tokens (longest {longest:,})"
        )
        refused.append(Absent(unit.name, reason, CUT_HINT))
    if not fitting:
        shown = "; ".join(f"{item.name}: {item.reason}" for item in refused)
        raise UsageError(shown, hint=CUT_HINT)
    return fitting, refused


def build_requests(unit: Unit, lm: Any, recipe: Any) -> None:
    """Fills `unit.task.instances`, exactly as lm-eval's evaluate() will again."""
    from lm_eval.evaluator_utils import get_sample_size

    with quiet_lm_eval():
        unit.task.build_all_requests(
            limit=get_sample_size(unit.task, recipe.limit_of(unit.entry.name)),
            rank=lm.rank,
            world_size=lm.world_size,
            apply_chat_template=unit.chat,
            fewshot_as_multiturn=unit.chat,
            chat_template=lm.apply_chat_template if unit.chat else None,
            tokenizer_name=lm.tokenizer_name if unit.chat else "",
        )


def data_fingerprint(recipe: Any) -> list[tuple[str, int, int]]:
    """Name, size and time of change of every local file a run may read."""
    files: list[Path] = []
    if recipe.text:
        from sparsek_cli.data.text import find_files

        files += find_files(recipe.text)
    if recipe.data is not None:
        folder = Path(recipe.data)
        if not folder.is_dir():
            raise UsageError(f"--data: no such folder '{folder}'", hint="check the path")
        files += sorted(p for p in folder.rglob("*") if p.is_file())
    return [(str(f), f.stat().st_size, f.stat().st_mtime_ns) for f in files]
