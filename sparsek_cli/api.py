"""The verbs as Python functions: what the command line does, called from a program.

    import sparsek_cli as sparsek

    done = sparsek.convert("tiny", "tiny-sparsek", budget=512)
    tuned = sparsek.finetune(done.out, "tiny-tuned", data="my-documents/", steps=100)
    found = sparsek.evaluate(tuned.out, tasks=["ppl", "recall"], limit=4)
    model, tokenizer = sparsek.load(tuned.out)
    print("".join(sparsek.chat(tuned.out).ask("What is SparseK?")))

Settings are the keys of the recipes (`sparsek recipes show NAME`); nested ones are mappings, or
words such as {"evaluation.every": 50}. Every function checks them all before it starts, raises
`sparsek_cli.errors.UsageError` for what is wrong with them and `SparsekError` for what failed, and
returns an object with `text()` and `data()`.
"""

from collections.abc import Mapping, Sequence
from os import PathLike, fspath
from typing import TYPE_CHECKING, Any, TypeVar

from sparsek_cli.errors import UsageError
from sparsek_cli.recipes.load import Draft
from sparsek_cli.reporter import Reporter

if TYPE_CHECKING:
    from pydantic import BaseModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from sparsek_cli.conversion.run import Converted
    from sparsek_cli.dialogue.session import Session
    from sparsek_cli.evaluation.run import Evaluated
    from sparsek_cli.scorers_alone.take_scorers import Taken
    from sparsek_cli.sharing.dense import Exported
    from sparsek_cli.sharing.merge import Merged
    from sparsek_cli.training.run import Trained

    Recipe = TypeVar("Recipe", bound=BaseModel)

Place = str | PathLike[str]


def convert(
    model: Place,
    out: Place | None = None,
    *,
    recipe: str | None = None,
    reporter: Reporter | None = None,
    **settings: Any,
) -> "Converted":
    """Gives a model SparseK attention, as `sparsek convert` does.

    Args:
        model: folder, short name or hub id of the base.
        out: the folder to write; default: `<name>-sparsek`.
        recipe: a recipe's name or file, below the settings.
        reporter: where progress goes; default: nowhere.
        settings: keys of a conversion recipe: budget, topk, window, calibrate, overwrite, ...

    Returns:
        `out`, the plan, what was written and verified, and what calibration found.
    """
    from sparsek_cli.conversion.plan import plan
    from sparsek_cli.conversion.run import run
    from sparsek_cli.recipes.schema_convert import ConvertRecipe

    draft = Draft(recipe, verb="convert")
    return run(plan(_validated(ConvertRecipe, draft, model, out, settings)), reporter)


def finetune(
    model: Place | None = None,
    out: Place | None = None,
    *,
    data: str | Sequence[str] | None = None,
    recipe: str | None = None,
    resume: bool = False,
    reporter: Reporter | None = None,
    **settings: Any,
) -> "Trained":
    """Trains a model's scorers, adapters or all of it, as `sparsek finetune` does.

    Args:
        model: what to start from; None with a recipe that says init: random.
        out: the folder to write; default: `<name>-finetuned`.
        data: text to train on: files, folders, globs, or one hub id, in place of the recipe's.
        recipe: a recipe's name or file, below the settings.
        resume: go on with an unfinished run of the same settings.
        reporter: where progress goes; default: nowhere.
        settings: keys of a fine-tuning recipe: train, steps, learning_rate, overwrite, ...

    Returns:
        `out`, losses before and after, speed and memory.
    """
    from sparsek_cli.recipes.data import set_text
    from sparsek_cli.recipes.schema_finetune import FinetuneRecipe
    from sparsek_cli.training.plan import plan
    from sparsek_cli.training.run import run

    draft = Draft(recipe, verb="finetune")
    if data is not None and not isinstance(data, Mapping):
        set_text(draft, [data] if isinstance(data, str | PathLike) else list(data), "data")
    elif data is not None:
        settings["data"] = data
    made = _validated(FinetuneRecipe, draft, model, out, settings)
    return run(plan(made, reporter, resume=resume), reporter)


def evaluate(
    model: Place,
    out: Place | None = None,
    *,
    recipe: str | None = None,
    resume: bool = False,
    reporter: Reporter | None = None,
    **settings: Any,
) -> "Evaluated":
    """Measures a model against its dense self and others at equal bytes, as `sparsek evaluate`.

    Args:
        model: folder, short name or hub id; converted or dense.
        out: the result folder; default: `runs/evaluate/<model>/<settings>`.
        recipe: a recipe's name or file, below the settings.
        resume: keep what an interrupted run of the same settings finished.
        reporter: where progress goes; default: nowhere.
        settings: keys of an evaluation recipe: tasks, baselines, lengths, limit, overwrite, ...

    Returns:
        `score(task, policy)`, the whole `report`, and `text()`: the table.
    """
    from sparsek_cli.evaluation.plan import plan
    from sparsek_cli.evaluation.run import run
    from sparsek_cli.recipes.schema_evaluate import EvaluateRecipe

    draft = Draft(recipe, verb="evaluate")
    made = _validated(EvaluateRecipe, draft, model, out, settings)
    return run(plan(made, resume=resume), reporter)


def load(
    model: Place,
    *,
    scorers: Place | None = None,
    revision: str | None = None,
    device: str = "auto",
    dtype: str = "auto",
    cache_dtype: str | None = None,
) -> "tuple[PreTrainedModel, PreTrainedTokenizerBase]":
    """A model in eval mode on its device, and its tokenizer; converted and dense ones alike.

    Args:
        model: folder, short name or hub id.
        scorers: file, folder or hub id of scorers alone, to put onto a dense `model`, which must
            be the one that they were made for. revision: of `model`, a hub id.
        device: auto, cpu, cuda or cuda:N. dtype: auto, bfloat16, float16 or float32.
        cache_dtype: what a converted model's cache holds: auto (`dtype`) or int8; None: as
            converted.
    """
    from sparsek_cli import hub
    from sparsek_cli.devices import choose_device, choose_dtype
    from sparsek_cli.loading import load_model, load_tokenizer

    checkpoint, where = hub.resolve(fspath(model), revision), choose_device(device)
    tokenizer, number = load_tokenizer(checkpoint), choose_dtype(dtype, where)
    if scorers is None:
        weights = load_model(checkpoint, device=where, dtype=number, cache_dtype=cache_dtype)
        return weights, tokenizer
    from sparsek_cli.scorers_alone.find import read
    from sparsek_cli.sharing.merge import load_onto

    weights = load_onto(
        checkpoint, read(scorers), device=where, dtype=number, cache_dtype=cache_dtype
    )
    return weights, tokenizer


def export(
    model: Place,
    out: Place | None = None,
    *,
    revision: str | None = None,
    copy: bool = False,
    overwrite: bool = False,
    reporter: Reporter | None = None,
) -> "Exported":
    """Writes the plain dense model that a converted one is made of, as `sparsek export` does.

    Args:
        model: folder or hub id of a converted model, fine-tuned or not. revision: of a hub id.
        out: the folder to write; default: `<name>-dense`.
        copy: copy weights that could be linked. overwrite: replace `out`.
        reporter: where progress goes; default: nowhere.

    Returns:
        `out`, and how the weights and the tokenizer came along.
    """
    from sparsek_cli.sharing.dense import plan, run

    _check_switches(copy=copy, overwrite=overwrite)
    place = None if out is None else fspath(out)
    made = plan(fspath(model), place, revision=revision, copy=copy, overwrite=overwrite)
    return run(made, reporter)


def export_scorers(
    model: Place,
    out: Place | None = None,
    *,
    revision: str | None = None,
    overwrite: bool = False,
    reporter: Reporter | None = None,
) -> "Taken":
    """Writes the scorers of a converted model alone, as `sparsek export --scorers` does.

    Args:
        out: the folder to write, or a file that ends in .safetensors; default: `<name>-scorers`.
        others: as of `export`.

    Returns:
        `out`, and the hash of the weights that they belong to.
    """
    from sparsek_cli.scorers_alone.take_scorers import plan, run

    _check_switches(overwrite=overwrite)
    place = None if out is None else fspath(out)
    return run(plan(fspath(model), place, revision=revision, overwrite=overwrite), reporter)


def merge(
    base: Place,
    scorers: Place,
    out: Place | None = None,
    *,
    revision: str | None = None,
    copy: bool = False,
    overwrite: bool = False,
    reporter: Reporter | None = None,
) -> "Merged":
    """Puts scorers onto the base that they were made for, as `sparsek merge` does.

    Args:
        base: folder, short name or hub id of the dense model. revision: of a hub id.
        scorers: a file, a folder or a hub id.
        out: the folder to write; default: `<name>-sparsek`.
        others: as of `export`.

    Returns:
        `out`, and what was verified.
    """
    from sparsek_cli.sharing.merge import plan, run

    _check_switches(copy=copy, overwrite=overwrite)
    made = plan(
        fspath(base), fspath(scorers), None if out is None else fspath(out),
        revision=revision, copy=copy, overwrite=overwrite,
    )  # fmt: skip
    return run(made, reporter)


def chat(
    model: Place,
    *,
    system: str | None = None,
    temperature: float = 0.0,
    top_p: float = 1.0,
    max_new_tokens: int = 256,
    seed: int = 0,
    revision: str | None = None,
    device: str = "auto",
    dtype: str = "auto",
    cache_dtype: str | None = None,
) -> "Session":
    """A conversation with a model.

    Args:
        system: the system message.
        temperature: 0 takes the likeliest token. top_p: draw from the likeliest mass.
        others: as of `load`.

    Returns:
        A session: `load(text)` reads a document, `ask(question)` yields the reply piece by piece,
        `stats()` says how long the conversation is and what it holds, `clear()` starts anew.
    """
    from sparsek_cli.dialogue.engine import Engine
    from sparsek_cli.dialogue.sampling import Sampling
    from sparsek_cli.dialogue.session import Session
    from sparsek_cli.dialogue.settings import check_sampling

    sampling = Sampling(temperature, top_p, max_new_tokens, seed)
    check_sampling(sampling)
    weights, tokenizer = load(
        model, revision=revision, device=device, dtype=dtype, cache_dtype=cache_dtype
    )
    return Session(Engine(weights), tokenizer, sampling, system)


def _check_switches(**given: object) -> None:
    """Raises UsageError for what is neither true nor false: overwrite="no" replaced a folder."""
    for name, value in given.items():
        if not isinstance(value, bool):
            raise UsageError(
                f"{name} should be True or False, not {value!r}",
                hint=f"give {name}=True, or leave it out",
            )


def _validated(
    kind: "type[Recipe]",
    draft: Draft,
    model: Place | None,
    out: Place | None,
    settings: Mapping[str, Any],
) -> "Recipe":
    """The recipe with what the caller gave on top."""
    places = {"model": model, "out": out}
    given = {key: fspath(value) for key, value in places.items() if value is not None}
    for key, value in {**settings, **given}.items():
        draft.set(key, _own(value), f"{key}=")
    return draft.validated(kind)


def _own(value: Any) -> Any:
    """A value whose numbers are Python's: those of NumPy, and its arrays, count as such."""
    if type(value).__module__ == "numpy" and hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, dict):
        return {_own(key): _own(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        parts = [_own(part) for part in value]
        return tuple(parts) if isinstance(value, tuple) else parts
    return value
