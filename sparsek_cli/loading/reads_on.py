"""Whether a dense model of a family that is not converted reads a text as it is read here.

That is from left to right, in pieces, over transformers' growing cache. Some classes take another
cache, or none, and would forget what they have read without a word; others see tokens ahead.
"""

import inspect
from typing import Any

from sparsek_cli.converted import is_converted
from sparsek_cli.errors import UsageError

# In bfloat16 hardly to be told from rounding.
_COUNT_ANEW = ("bamba",)
_PIECES = (16, 7, 1)  # tokens
_CHANGED = 8  # last tokens that another text differs in
# Differences of logits that rounding may cause, in units of their spread: in float32, and of
# numbers with fewer bits. Pieces are added up otherwise than a whole text, by kernels that round
# inside: there more may differ, and of few bits the mean counts.
_EXACT, _HALF = 1e-3, 0.1
_PIECES_EXACT, _PIECES_HALF = 2e-2, 0.1


def check_reads_on(model: Any) -> None:
    """Three short passes over a model of an unknown family; nothing for others.

    Raises:
        UsageError: it cannot be read in pieces, forgets them, or sees what comes after.
    """
    import torch

    from sparsek_cli.models import FAMILIES

    kind = model.config.model_type
    if is_converted(model.config) or kind in FAMILIES:
        return
    hint = "name a model whose class reads on over transformers' DynamicCache"
    forgets = UsageError(
        f"models of type {kind} say something else of what they read in pieces: transformers' "
        "class has no cache, keeps its state elsewhere, or counts positions anew",
        hint=hint,
    )
    if "past_key_values" not in inspect.signature(model.forward).parameters:
        raise forgets
    if kind in _COUNT_ANEW:
        raise forgets
    try:
        whole, ahead, pieces, cache = _logits(model)
    except torch.OutOfMemoryError:
        raise
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as e:
        reason = (str(e).strip().splitlines() or [type(e).__name__])[0][:200]
        said = f"models of type {kind} cannot be read in pieces: {reason}"
        raise UsageError(said, hint=hint) from e
    if _apart(whole, ahead)[:, :-_CHANGED].max() > (_EXACT if _is_exact(model) else _HALF):
        raise UsageError(
            f"this {kind} model sees tokens ahead: what follows changes what it says of a text",
            hint="name a model that generates text left to right; one that was trained as a "
            "decoder says is_decoder in its config.json",
        )
    if _without_state(cache) or _differ(model, whole, pieces):
        raise forgets


def stands_where_told(model: Any) -> bool:
    """Whether a text behind padding is read at the positions that are given for it.

    Decoders of models with an encoder (BART) take no positions, and say nothing of it: rows of
    several lengths would be answered from other places than their own. Known families all do.
    """
    import torch

    from sparsek_cli.models import FAMILIES

    if is_converted(model.config) or model.config.model_type in FAMILIES:
        return True
    text = _text(model)
    padded = torch.nn.functional.pad(text, (_CHANGED, 0), value=0)
    places = torch.arange(padded.shape[1], device=model.device)[None] - _CHANGED
    told = {"attention_mask": (places >= 0).long(), "position_ids": places.clamp(min=0)}
    with torch.no_grad():
        alone = model(input_ids=text, use_cache=False).logits.float()
        try:
            behind = model(input_ids=padded, use_cache=False, **told).logits.float()
        except TypeError:  # no such argument
            return False
    return not _differ(model, alone, behind[:, _CHANGED:])


def _logits(model: Any) -> tuple[Any, Any, Any, Any]:
    """Of one text [1, N, V]: read at once; with another end; in pieces, with their cache."""
    import torch
    from transformers import DynamicCache

    ids = _text(model)
    other = ids.clone()
    other[:, -_CHANGED:] = ids[:, :_CHANGED]
    cache, pieces = DynamicCache(config=model.config), []
    with torch.no_grad():
        whole, ahead = (
            model(input_ids=each, use_cache=False).logits.float() for each in (ids, other)
        )
        for piece in ids.split(_PIECES, dim=1):
            read = model(input_ids=piece, past_key_values=cache, use_cache=True)
            pieces.append(read.logits.float())
    return whole, ahead, torch.cat(pieces, dim=1), cache


def _text(model: Any) -> Any:
    """The same ids [1, N] each time, none of them padding."""
    import torch

    rows = model.get_input_embeddings().weight.shape[0]
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(0, rows, (1, sum(_PIECES)), generator=draw)
    padding = getattr(model.config, "pad_token_id", None)
    if padding is not None:
        ids[ids == padding] = (padding + 1) % rows
    return ids.to(model.device)


def _is_exact(model: Any) -> bool:
    import torch

    return model.dtype in (torch.float32, torch.float64)


def _differ(model: Any, a: Any, b: Any) -> bool:
    """Whether logits of one text differ by more than rounding."""
    apart = _apart(a, b)
    return bool(apart.max() > _PIECES_EXACT if _is_exact(model) else apart.mean() > _PIECES_HALF)


def _apart(a: Any, b: Any) -> Any:
    return (a - b).abs() / a.std().clamp_min(1e-6)


def _without_state(cache: Any) -> bool:
    """Whether a layer was meant to hold a state, and holds nothing."""
    from sparsek_cli.models.cache.bytes import pair_bytes, state_bytes

    return any(
        hasattr(layer, "conv_states") and not state_bytes(layer) + pair_bytes(layer)
        for layer in cache.layers
    )
