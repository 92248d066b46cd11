"""How many slots and how much calibration text: what the request leaves open, and its limits."""

import math
from fractions import Fraction
from typing import Any

import numpy as np

from sparsek_cli.conversion.geometry import Geometry
from sparsek_cli.errors import UsageError
from sparsek_cli.recipes.limits import LONGEST
from sparsek_cli.recipes.schema_convert import ConvertRecipe

# A sixteenth of the context is where selection still keeps recall while a window does not.
_SHARE_OF_CONTEXT = Fraction(1, 16)
# Half of the slots as a window lost facts where slots were few, three quarters text too; an eighth
# was better than that in one base and no better in another (docs/results, ablations).
_SHARE_OF_WINDOW = Fraction(1, 4)
_LARGEST_WINDOW = 128
_SMALLEST_BUDGET = 64
# Maps are fitted on short sequences, and compared on long ones: how much age may count depends
# on the distance over which something must be kept.
_FIT_LENGTH = (2048, 4096)
_CALIBRATION_LENGTH = 32_768
# Calibration must drop keys to learn which: sequences several times as long as the slots.
_LENGTH_PER_SLOT = 4
# Closed-form maps have one unknown per feature: this many rows for each.
_ROWS_PER_FEATURE = 128
_LEAST_TOKENS = 131_072
_MOST_TOKENS = 1_048_576


def slots(
    context: int, *, budget: int | str | None, topk: int | None, window: int | None, sinks: int
) -> tuple[int, int]:
    """(topk, window) per KV head; with the sinks they make the budget.

    Args:
        context: tokens the model was made for. budget: tokens, or a share of them like "1/16".
        topk, window: None where they follow from the budget.

    Raises:
        UsageError: budget and topk together, a budget with no room to select, or more slots than
            any text has.
    """
    tokens = max(int(context * _SHARE_OF_CONTEXT), _SMALLEST_BUDGET)
    if budget is not None:
        if topk is not None:
            raise UsageError(
                f"budget {budget} and topk {topk} are both given",
                hint="a budget is sinks + topk + window: give one of the two, with or without a "
                "window (topk=null or budget=null drops a recipe's)",
            )
        tokens = budget if isinstance(budget, int) else int(context * Fraction(budget))
    window = window or max(1, min(_LARGEST_WINDOW, int(tokens * _SHARE_OF_WINDOW)))
    # Of a model that is converted already: "never evict" may stand there as a number.
    for name, size in {"topk": topk or 0, "window": window, "sinks": sinks}.items():
        if size > LONGEST:
            raise UsageError(
                f"{name} is {size:,}, more than the {LONGEST:,} that can be converted with",
                hint='write less under "sparsek" in the config.json that it comes from',
            )
    topk = topk or tokens - window - sinks
    if topk < 1 and budget is not None:
        written = f"{budget}" + ("" if budget == tokens else f" ({tokens} tokens)")
        raise UsageError(
            f"budget {written} leaves nothing to select beside {sinks} sinks and a window "
            f"of {window}",
            hint=f"give at least {sinks + window + 1}, or a smaller --window",
        )
    if topk > LONGEST:
        raise UsageError(
            f"a context of {context:,} tokens gives {topk:,} selected keys per KV head, more than "
            f"the {LONGEST:,} that make sense",
            hint="give --budget a number of tokens, or correct max_position_embeddings in the "
            "model's config.json",
        )
    return max(1, topk), window


def calibration_size(
    sizes: Geometry, budget: int, *, tokens: int | None, length: int | None
) -> tuple[int, int]:
    """(tokens to fit on, tokens of a document to compare on), None filled in.

    Args:
        sizes: of the base model.
        budget: slots per KV head.

    Raises:
        UsageError: documents longer than the context, or so short that all of it fits.
    """
    if length is None:
        length = min(max(_CALIBRATION_LENGTH, _LENGTH_PER_SLOT * budget), sizes.context)
    if length > sizes.context:
        raise UsageError(
            f"calibrate_length {length} is longer than the model's context {sizes.context}",
            hint=f"give at most {sizes.context}",
        )
    if length <= budget:
        raise UsageError(
            f"sequences of {length} tokens fit into {budget} slots: nothing to choose from",
            hint="give a smaller topk or window, a larger calibrate_length, or "
            "--calibrate none and no calibrate_length",
        )
    if tokens is None:
        tokens = min(max(_ROWS_PER_FEATURE * sizes.hidden, _LEAST_TOKENS), _MOST_TOKENS)
    short = fit_length(length)
    return max(tokens // short, 8) * short, length


def fit_length(length: int) -> int:
    """Tokens of a sequence that maps are fitted on, for documents of `length`."""
    return min(length, max(length // 4, _FIT_LENGTH[0]), _FIT_LENGTH[1])


def with_settings_of(recipe: ConvertRecipe, block: dict[str, Any]) -> ConvertRecipe:
    """The request with the model's own slots, cache_dtype and gate, where it names none."""
    given = recipe.model_fields_set
    has = {"cache_dtype": "auto", **block}
    kept = ("window", "sinks", "gate", "cache_dtype")
    settings = {key: has[key] for key in kept if key not in given}
    if not given & {"topk", "budget"}:
        topk = block["topk"]
        layers = [x for x in topk if x is not None] if isinstance(topk, list) else [topk]
        settings["topk"] = max(1, math.ceil(np.mean([np.mean(layer) for layer in layers])))
    return recipe.model_copy(update=settings)
