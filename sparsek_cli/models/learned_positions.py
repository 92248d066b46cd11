"""Texts beyond a table of learned positions (GPT-2's, OPT's), refused before they are looked up.

There it is torch's IndexError, and on a GPU the end of the process.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch

from sparsek_cli.converted import is_converted
from sparsek_cli.errors import SparsekError
from sparsek_cli.families import TABLE
from sparsek_cli.families.positions import learned_positions


def check_positions(model: Any, kwargs: Mapping[str, Any]) -> None:
    """Looks at the arguments of a base model's forward.

    On a GPU nothing waits for it while the tokens themselves fit.

    Raises:
        SparsekError: a token stands beyond the table.
    """
    rows, tokens = model.learned_rows, kwargs.get("input_ids")
    tokens = kwargs.get("inputs_embeds") if tokens is None else tokens
    if rows is None or tokens is None or _is_recorded(tokens):
        return
    cache, positions = kwargs.get("past_key_values"), kwargs.get("position_ids")
    end = tokens.shape[1] + (0 if cache is None else cache.get_seq_length())
    if positions is not None and (end > rows or tokens.device.type == "cpu"):
        end = int(positions.max()) + 1
    elif end > rows and _counts_by_mask(model, kwargs):
        end = int(kwargs["attention_mask"].sum(-1).max())
    if end > rows:
        raise _beyond(model, f"the text has {end:,} tokens")


def guard(model: Any) -> None:
    """Has a dense model of a known family look at its arguments, as converted ones do."""
    rows = learned_positions(model)
    if rows is None or is_converted(model.config) or model.config.model_type not in TABLE:
        return
    for part in (model, model.base_model):  # OPT's class for generation passes its base model by
        part.learned_rows = rows
        part.register_forward_pre_hook(_look, with_kwargs=True)


def _look(model: Any, args: tuple, kwargs: dict[str, Any]) -> None:
    named = dict(zip(inspect.signature(model.forward).parameters, args, strict=False))
    check_positions(model, named | kwargs)


class Room:
    """The places that are left for a decoding step, which on a GPU looks at no argument.

    Args:
        positions: int64 [B], where the next token of each row stands.
    """

    def __init__(self, model: Any, positions: torch.Tensor):
        self._model, rows = model, model.learned_rows
        self._left = None if rows is None else rows - int(positions.max())

    def take(self, count: int = 1) -> None:
        """Raises SparsekError where `count` further tokens of each row find no place."""
        if self._left is None:
            return
        self._left -= count
        if self._left < 0:
            raise _beyond(self._model, "there is no place for the next token")


def _beyond(model: Any, what: str) -> SparsekError:
    rows = model.learned_rows
    return SparsekError(
        f"{what}: this {model.config.model_type.removeprefix('sparsek_')} has learned positions "
        f"for {rows:,} tokens only",
        hint=f"keep prompt and max_new_tokens together within {rows:,} tokens, or convert a model "
        "with rotary positions",
    )


def _counts_by_mask(model: Any, kwargs: Mapping[str, Any]) -> bool:
    """OPT counts what is no padding; GPT-2, of which nobody says positions, all tokens."""
    mask = kwargs.get("attention_mask")
    plain = any(type(module) is torch.nn.Embedding and name.endswith("wpe")
                for name, module in model.named_modules())  # fmt: skip
    return isinstance(mask, torch.Tensor) and mask.ndim == 2 and not plain


def _is_recorded(tokens: torch.Tensor) -> bool:
    """Whether what runs is captured or compiled, and no value is there to be looked at."""
    if torch.compiler.is_compiling() or tokens.is_meta:
        return True
    return tokens.is_cuda and torch.cuda.is_current_stream_capturing()
