"""load and chat: a model in this program."""

from typing import TYPE_CHECKING, Any

from sparsek_cli.api import values
from sparsek_cli.api.values import (
    Place,
    check_counts,
    check_numbers,
    check_words,
    place,
    place_or_none,
)

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from sparsek_cli.dialogue.session import Session


def load(
    model: Place,
    *,
    scorers: Place | None = None,
    revision: str | None = None,
    device: "str | int | torch.device" = "auto",
    dtype: "str | torch.dtype" = "auto",
    cache_dtype: str | None = None,
    yarn: float | None = None,
) -> "tuple[PreTrainedModel, PreTrainedTokenizerBase]":
    """A model in eval mode on its device, and its tokenizer; converted and dense ones alike.

    Args:
        model: folder, short name or hub id.
        scorers: file, folder or hub id of scorers alone, to put onto a dense `model`, which must
            be the one that they were made for. revision: of `model`, a hub id.
        device: auto, cpu, cuda, cuda:N, a torch.device, or N alone.
        dtype: auto, bfloat16, float16 or float32; or torch's own.
        cache_dtype: what a converted model's cache holds: auto (`dtype`) or int8; None: as
            converted.
        yarn: rotary positions are stretched (YaRN), to read so many times the model's own length.
            Some families (Phi-3) cannot be saved with it, which is said.
    """
    from sparsek_cli import hub
    from sparsek_cli.devices import choose_device, choose_dtype
    from sparsek_cli.loading import check_tokenizer, embedding_rows, load_model, load_tokenizer
    from sparsek_cli.loading.positions import say_unsaved

    dtype = values.plain(dtype)
    check_words(revision=revision, dtype=dtype, cache_dtype=cache_dtype)
    if yarn is not None:
        check_numbers(yarn=yarn)
    added, named = place_or_none("scorers", scorers), values.device(device)
    checkpoint, where = hub.resolve(place("model", model), revision), choose_device(named)
    tokenizer, number = load_tokenizer(checkpoint), choose_dtype(dtype, where)
    how: dict[str, Any] = {
        "device": where, "dtype": number, "cache_dtype": cache_dtype, "yarn": yarn,
    }  # fmt: skip
    if added is None:
        loaded = load_model(checkpoint, **how)
    else:
        from sparsek_cli.scorers_alone.find import read
        from sparsek_cli.sharing.merge import load_onto

        loaded = load_onto(checkpoint, read(added), **how)
    check_tokenizer(tokenizer, embedding_rows(loaded), checkpoint.name)
    if yarn is not None:
        say_unsaved(loaded.config, checkpoint.name)
    return loaded, tokenizer


def chat(
    model: Place,
    *,
    system: str | None = None,
    temperature: float = 0.0,
    top_p: float = 1.0,
    max_new_tokens: int = 256,
    seed: int = 0,
    revision: str | None = None,
    device: "str | int | torch.device" = "auto",
    dtype: "str | torch.dtype" = "auto",
    cache_dtype: str | None = None,
    yarn: float | None = None,
) -> "Session":
    """A conversation with a model.

    Args:
        system: the system message.
        temperature: 0 takes the likeliest token. top_p: draw from the likeliest mass. Penalties,
            bans and cut-offs of the model's generation_config.json count beside them.
        others: as of `load`.

    Returns:
        A session: `load(text)` reads a document, `ask(question)` yields the reply piece by piece,
        `stats()` says how long the conversation is and what it holds, `clear()` starts anew.
    """
    from sparsek_cli.dialogue.drawing.sampling import Sampling
    from sparsek_cli.dialogue.drawing.settings import check_sampling
    from sparsek_cli.dialogue.engine import Engine
    from sparsek_cli.dialogue.session import Session

    check_words(system=system)
    check_numbers(temperature=temperature, top_p=top_p)
    check_counts(max_new_tokens=max_new_tokens, seed=seed)
    sampling = Sampling(temperature, top_p, max_new_tokens, seed)
    check_sampling(sampling)
    weights, tokenizer = load(
        model, revision=revision, device=device, dtype=dtype, cache_dtype=cache_dtype, yarn=yarn
    )
    return Session(Engine(weights), tokenizer, sampling, system)
