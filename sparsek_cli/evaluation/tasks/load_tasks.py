"""What a run consists of: one task at one length each; loading them, measuring their prompts."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparsek_cli import hub
from sparsek_cli.errors import SparsekError, UsageError
from sparsek_cli.evaluation.tasks.catalogue import TASK_FOLDER, Entry, catalogue
from sparsek_cli.evaluation.tasks.hub_data import how_to_place, redirected
from sparsek_cli.evaluation.tasks.local_text import WrongLength
from sparsek_cli.evaluation.tasks.skipped import Absent, explained, nothing_left
from sparsek_cli.silence import quiet_lm_eval

if TYPE_CHECKING:
    from sparsek_cli.evaluation.settings import Prompts, Samples

FEWSHOT_SEED = 1234  # lm-eval's default, so that its few-shot examples are the same
# Run where the first one's data is absent and the second one's is there.
STAND_INS = {"scrolls_narrativeqa": "scrolls_fairytaleqa"}
CUT_HINT = "--truncate left|middle cuts and counts them"


@dataclass(frozen=True)
class Unit:
    """One task at one length.

    Attributes:
        entry: the task. length: prompt tokens, or None where the data decides.
        task: lm-eval's loaded task object. chat: whether prompts are in the chat template.
        longest: tokens of its longest prompt with the answer; 0 before they are counted.
    """

    entry: Entry
    length: int | None
    task: Any
    chat: bool
    longest: int = 0

    @property
    def name(self) -> str:
        return unit_name(self.entry, self.length)

    @property
    def wrapped(self) -> bool:
        """Whether lm-eval puts prompts into the template: conversations stand in it already."""
        return self.chat and not _converses(self.entry)


def unit_name(entry: Entry, length: int | None) -> str:
    """recall_4@4096, or the task's name alone where the data decides on lengths."""
    return entry.name if length is None else f"{entry.name}@{length}"


def load_units(
    entries: list[Entry],
    samples: "Samples",
    *,
    tokenizer: Any,
    tokenizer_path: str,
    max_length: int,
    beyond: str,
    asked_length: int | None,
) -> tuple[list[Unit], list[Absent]]:
    """Loads every task at every length; data that is missing is reported, not fatal.

    Args:
        tokenizer: sizes generated prompts; has a chat template or not.
        tokenizer_path: where tasks load it from.
        max_length: lengths above it are left out unless asked for.
        beyond: the flags that allow more, for hints; see `ways_beyond`.
        asked_length: what the user gave for it.

    Raises:
        UsageError: --lengths beyond max_length, or not one task could be loaded.
    """
    too_long = [n for n in samples.lengths if n > max_length]
    if too_long and any(entry.lengths for entry in entries):
        raise UsageError(
            f"--lengths {too_long[0]} is beyond {_limit(asked_length, max_length)}",
            hint=f"name lengths up to {max_length}" + (f"; {beyond} allows more" if beyond else ""),
        )
    units: list[Unit] = []
    absent: list[Absent] = []
    queue = list(entries)
    for entry in queue:  # grows by tasks that stand in for absent ones
        chat = _uses_chat(entry, samples.chat_template, tokenizer)
        for length in _lengths(entry, samples.lengths, max_length):
            settings = {
                "tokenizer": tokenizer_path,
                "pretrained": tokenizer_path,
                "data": samples.data,
                "text": list(samples.text),
                "seed": samples.seed,
                "limit": samples.limit_of(entry.name),
                "chat": chat,
                "max_seq_lengths": _length_setting(entry, length or 4096),
            }
            try:
                with redirected(samples.data) as asked:
                    task = _load(entry, settings)
            except WrongLength as error:
                absent.append(Absent(unit_name(entry, length), error.message, error.hint))
                continue
            except _DATA_ERRORS as error:
                if entry in entries:
                    absent.append(_absent(entry, error, asked))
                other = catalogue().get(STAND_INS.get(entry.name, ""))
                if other is not None and other not in queue and samples.data is not None:
                    queue.append(other)
                break
            units.append(Unit(entry, length, task, chat))
    if not units:
        raise nothing_left(absent)
    return units, absent


def _length_setting(entry: Entry, length: int) -> list[int] | str:
    """A length as the task's own code wants it."""
    return f"{length // 1024}k" if entry.extra.get("length_names") == "k" else [length]


def _limit(asked: int | None, max_length: int) -> str:
    """`max_length` in words; `asked`: what --max-length said."""
    if asked is None:
        return f"the model's {max_length:,} tokens"
    return f"the {max_length:,} tokens of --max-length"


_DATA_ERRORS = (
    SparsekError,
    OSError,
    ImportError,
    ValueError,
    KeyError,
    RuntimeError,
    AssertionError,
)


def _absent(entry: Entry, error: Exception, asked: Sequence[str]) -> Absent:
    """Why a task could not be loaded, and what to do; `asked` are hub repositories it wanted."""
    if isinstance(error, UsageError):
        raise error
    if isinstance(error, SparsekError):
        return Absent(entry.name, error.message, error.hint)
    lines = str(error).strip().splitlines()
    reason = (lines[0] if lines else type(error).__name__)[:200]
    if isinstance(error, ImportError):
        extra = entry.source.partition("; ")[2]
        return Absent(entry.name, reason, extra or "install what it names")
    switch, repository = None, asked[-1] if entry.builtin and asked else None
    if _is_unreachable(error):
        switch = hub.switch("dataset")
        why = f"{switch} keeps the hub from being asked" if switch else hub.no_way()[0]
        reason = f"{repository or 'its data'} is not in the hub's cache, and {why}"
    remedy = how_to_place(repository) if repository else f"it is read from {entry.source}"
    return Absent(entry.name, reason, remedy, switch)


def _is_unreachable(error: Exception) -> bool:
    signs = ("offline", "reach", "ConnectionError", "LocalEntryNotFound", "resolve")
    return any(sign in f"{type(error).__name__}: {error}" for sign in signs)


def _uses_chat(entry: Entry, wanted: str, tokenizer: Any) -> bool:
    has = bool(getattr(tokenizer, "chat_template", None))
    if wanted == "on" and not has:
        raise UsageError(
            "chat_template=on, but the tokenizer has no chat template",
            hint="leave chat_template out",
        )
    return has and (wanted == "on" or (wanted == "auto" and (entry.chat or _converses(entry))))


def _converses(entry: Entry) -> bool:
    """Whether a task's prompts are of several turns, which it puts into the template itself."""
    return bool(entry.extra.get("turns"))


def _lengths(entry: Entry, wanted: Sequence[int], max_length: int) -> list[int | None]:
    if not entry.lengths:
        return [None]
    if wanted:
        return list(wanted)
    return [n for n in entry.lengths if n <= max_length] or [max_length]


def _load(entry: Entry, settings: dict[str, Any]) -> Any:
    """One lm-eval task object, configured as lm-eval's own command line would."""
    with quiet_lm_eval():
        import lm_eval.tasks

        theirs = Path(lm_eval.tasks.__file__).parent
        manager = lm_eval.tasks.TaskManager(
            include_path=[str(theirs / name) for name in entry.folders] or str(TASK_FOLDER),
            # Its whole index takes seconds: only for tasks whose folder is not known.
            include_defaults=entry.builtin and not entry.folders,
            metadata=settings,
        )
        asked: Any = entry.name
        if entry.settings:  # as lm-eval takes them: of a member of a group
            asked = {"group": "changed", "task": [{"task": entry.name, **entry.settings}]}
        [task] = manager.load([asked])["tasks"].values()
        if task.get_config("num_fewshot") is None:
            task.set_config(key="num_fewshot", value=0)
        task.set_fewshot_seed(seed=FEWSHOT_SEED)
        return task


def refuse_unfit(
    units: list[Unit],
    lm: Any,
    samples: "Samples",
    prompts: "Prompts",
    beyond: str,
    processes: int = 1,
) -> tuple[list[Unit], list[Absent]]:
    """Leaves out tasks with prompts that do not fit, unless the user said how to cut them.

    And those whose answers are not greedy, and those that have no sample for one of the processes.
    Found out for all tasks before anything has run. Nothing is ever cut without being asked for.

    Args:
        processes: that share the samples.

    Returns:
        The units that fit, with their longest prompt's length, and the refused ones with how many
        prompts are over the limit.

    Raises:
        UsageError: none fits.
    """
    fitting: list[Unit] = []
    refused: list[Absent] = []
    for unit in units:
        build_requests(unit, lm, samples.limit_of(unit.entry.name))
        if lm.wants_chance_or_beams(unit.task.instances):
            reason = "its answers are sampled or searched for with beams; only greedy ones count"
            refused.append(Absent(unit.name, reason, "name a task with greedy answers"))
            continue
        found = len({request.doc_id for request in unit.task.instances})
        if found < processes:
            reason = f"{found} sample{'s' * (found > 1)} for {processes} processes"
            remedy = "start no more processes than there are samples, or raise --limit"
            refused.append(Absent(unit.name, reason, remedy))
            continue
        count, longest = lm.over_limit(unit.task.instances)
        if len(units) > 1:  # those of all tasks take gigabytes, and one is measured at a time
            lm.forget_encodings()
        if not count or prompts.truncate != "refuse":
            # Passages are cut to the length asked for, or to what the model takes.
            longest = min(longest or unit.length or lm.max_length, lm.max_length)
            fitting.append(replace(unit, longest=longest))
            continue
        reason = (
            f"{count} of {len(unit.task.instances)} prompts are longer than "
            f"{_limit(prompts.max_length, lm.max_length)} (longest {longest:,})"
        )
        hint = CUT_HINT + (f"; {beyond} allows more" if beyond else "")
        refused.append(Absent(unit.name, reason, hint))
    if not fitting:
        groups = explained(refused)
        shown = "; ".join(line for lines, _ in groups for line in lines)
        raise UsageError(shown, hint="; ".join(remedy for _, remedy in groups))
    return fitting, refused


def build_requests(unit: Unit, lm: Any, limit: int | None) -> None:
    """Fills `unit.task.instances`, exactly as lm-eval's evaluate() will again."""
    from lm_eval.evaluator_utils import get_sample_size

    with quiet_lm_eval():
        unit.task.build_all_requests(
            limit=get_sample_size(unit.task, limit),
            rank=lm.rank,
            world_size=lm.world_size,
            apply_chat_template=unit.wrapped,
            fewshot_as_multiturn=unit.wrapped,
            chat_template=lm.apply_chat_template if unit.wrapped else None,
            tokenizer_name=lm.tokenizer_name if unit.wrapped else "",
        )
