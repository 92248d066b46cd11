"""sparsek's own commands as the phases of an experiment."""

import json
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparsek_cli.benchmarks.session import Session, shown
from sparsek_cli.reporter import Silent

if TYPE_CHECKING:
    from sparsek_cli.conversion.calibrate.method import Method

VARIANTS = ("outputs", "prefix_gates")  # words of `finetune` that no recipe has


class Steps:
    """sparsek's own commands, called as a library and shown as one would type them."""

    def __init__(self, session: Session, words: Sequence[str]):
        """`words`: dotted words that every fine-tuning run gets, e.g. device=cpu."""
        self._session, self._words = session, list(words)

    def finetune(self, recipe: str, out: Path, *words: str, model: Path | None = None) -> Any:
        """`sparsek finetune [MODEL] OUT --recipe RECIPE WORDS`; its Trained.

        Two words are none of recipes: outputs=WEIGHT adds a loss (variants/output_errors.py), and
        prefix_gates=STRENGTH puts scores into the softmax (variants/prefix_gates.py).
        """
        from experiments.variants.output_errors import OutputErrors
        from sparsek_cli.recipes.load import load_recipe
        from sparsek_cli.recipes.schema_finetune import FinetuneRecipe
        from sparsek_cli.training.plan import plan
        from sparsek_cli.training.run import run

        places = "" if model is None else f"{model} "
        every = [*self._words, *words]
        quoted = " ".join(map(_quoted, every))
        self._session.say(f"$ sparsek finetune {places}{out} --recipe {recipe} {quoted}")
        flags = {"out": str(out), "overwrite": True}
        flags["model"] = None if model is None else str(model)
        words, more = of_variants(every)
        lines = _Lines(self._session)
        planned = plan(load_recipe(FinetuneRecipe, recipe, words, flags, verb="finetune"), lines)
        if "outputs" in more:
            losses = (partial(OutputErrors, weight=more["outputs"]),)
            planned = replace(planned, settings=replace(planned.settings, layer_losses=losses))
        with gated(more):
            result = run(planned, lines)
        self._session.say(
            f"{result.steps} steps, loss {result.loss:.4f}, {result.tokens_per_second:,.0f} "
            f"tokens/s, held-out {shown(result.start_loss)} -> {shown(result.held_out_loss)}"
            + ("" if result.kept == "end" else f", kept: {result.kept}")
        )
        return result

    def convert(self, base: Path, out: Path, settings: dict[str, Any]) -> Any:
        """`sparsek convert BASE OUT WORDS`, the words being dotted keys; what it reports.

        Keys below "method." are fields of calibration's `Method`, which the command does not have.
        """
        from sparsek_cli.conversion.plan import plan
        from sparsek_cli.conversion.run import run
        from sparsek_cli.recipes.load import load_recipe
        from sparsek_cli.recipes.schema_convert import ConvertRecipe

        if settings.get("calibrate") == "none":  # beside it the command refuses how to calibrate
            settings = {key: settings[key] for key in settings if "calibrate_" not in key}
        settings, method = of_method(settings)
        words = [f"{key}={_yaml(value)}" for key, value in settings.items()]
        self._session.say(f"$ sparsek convert {base} {out} {' '.join(map(_quoted, words))}")
        if method is not None:
            self._session.say(f"  with {method}")
        flags = {"model": str(base), "out": str(out), "overwrite": True}
        recipe = load_recipe(ConvertRecipe, None, words, flags, verb="convert")
        done = run(plan(recipe, method))
        for line in done.text().splitlines():
            if line.startswith(("attention", "calibrated")):
                self._session.say(line)
        return done

    def bare(self, base: Path, out: Path, settings: dict[str, Any]) -> Path:
        """`convert` without calibration: what a window trains, which has no stand-ins."""
        self.convert(base, out, settings | {"calibrate": "none"})
        return out


def of_variants(words: Sequence[str]) -> tuple[list[str], dict[str, float]]:
    """Words of a recipe, and the numbers of those that only variants know."""
    split = {word: word.partition("=") for word in words}
    more = {name: float(n) for name, _, n in split.values() if name in VARIANTS}
    return [word for word in words if split[word][0] not in VARIANTS], more


def gated(more: dict[str, float]) -> AbstractContextManager:
    """Where models attend as they do in a run with these numbers of `of_variants`."""
    from experiments.variants.prefix_gates import prefix_gates

    return prefix_gates(more["prefix_gates"]) if "prefix_gates" in more else nullcontext()


def of_method(settings: dict[str, Any]) -> tuple[dict[str, Any], "Method | None"]:
    """Settings without those below "method.", and the `Method` that these make; None: no such."""
    from sparsek_cli.conversion.calibrate.method import Method

    words = {key: value for key, value in settings.items() if not key.startswith("method.")}
    fields = {
        key.removeprefix("method."): tuple(value) if isinstance(value, list) else value
        for key, value in settings.items()
        if key not in words
    }
    return words, Method(**fields) if fields else None


def _yaml(value: Any) -> str:
    return json.dumps(value) if isinstance(value, list | dict) else str(value)


def _quoted(word: str) -> str:
    return f"'{word}'" if set(word) & set("[]{} ") else word


class _Lines(Silent):
    """Progress of a training run as lines."""

    def __init__(self, session: Session):
        self._session = session

    def say(self, text: str = "") -> None:
        """A line, with its time unless it is a block of its own."""
        self._session.say(f"  {text}" if "\n" not in text else text)
