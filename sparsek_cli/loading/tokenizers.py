"""The tokenizer of a checkpoint, whose ids fit the model."""

import json
import logging
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparsek_cli.checkpoint_files.template_steps import check_template
from sparsek_cli.errors import SparsekError
from sparsek_cli.loading.configs import load_config
from sparsek_cli.loading.library_errors import tokenizer_reason
from sparsek_cli.silence import quiet_transformers

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from sparsek_cli.hub import Checkpoint

_LOG = logging.getLogger("sparsek_cli")


def load_tokenizer(source: "Checkpoint | str | Path") -> "PreTrainedTokenizerBase":
    """The tokenizer of a checkpoint, in a folder, or of a hub id.

    Raises:
        SparsekError: there is none, it cannot be used, or its chat template does not end; or the
            config.json beside it is none.
    """
    from transformers import AutoTokenizer

    import sparsek_cli.models  # noqa: F401  (a sparsek_* config must be known to AutoTokenizer)

    place, name = source, str(source)
    if not isinstance(source, str | Path):
        place, name = source.path, source.name
    if (Path(place) / "config.json").is_file():
        load_config(Path(place), name)  # AutoTokenizer reads it, too, and would blame itself
    hint = "copy tokenizer.json and tokenizer_config.json of the base model into its folder"
    try:
        # Silenced: a class that is no tokenizer's may load a model, and report on it.
        with quiet_transformers():
            tokenizer = AutoTokenizer.from_pretrained(place, trust_remote_code=False)
        probe = tokenizer("a word and 1").input_ids
    except Exception as error:
        # Every tokenizer library fails in its own way; all of them mean the same to the user.
        raise SparsekError(
            f"'{name}' has no usable tokenizer: {tokenizer_reason(error)}", hint=hint
        ) from error
    if not probe:
        raise SparsekError(
            f"'{name}' has no usable tokenizer: it makes no tokens of any text", hint=hint
        )
    check_template(tokenizer, name)
    return tokenizer


def load_open_tokenizer(source: "Checkpoint | str | Path") -> "PreTrainedTokenizerBase":
    """As `load_tokenizer`, for texts that go on: nothing is put behind them.

    Raises:
        SparsekError: as `load_tokenizer` and `leave_open`.
    """
    tokenizer = load_tokenizer(source)
    leave_open(tokenizer, str(source) if isinstance(source, str | Path) else source.name)
    return tokenizer


def leave_open(tokenizer: "PreTrainedTokenizerBase", name: str) -> None:
    """Has a tokenizer put nothing behind a text; what it puts before stays.

    Those saved for training close every text (`add_eos_token`). A prompt would be closed before
    its answer, and of a choice's tokens the closing one would be scored.

    Raises:
        SparsekError: it closes texts in a way that cannot be left out.
    """
    if not closing_tokens(tokenizer):
        return
    backend = getattr(tokenizer, "backend_tokenizer", None)
    processor = getattr(backend, "post_processor", None)
    if processor is not None:
        state = json.loads(processor.__getstate__())
        processor.__setstate__(json.dumps(_left_open(state)).encode())
        backend.post_processor = processor
    if closing := closing_tokens(tokenizer):
        raise SparsekError(
            f"the tokenizer of '{name}' puts {closing} behind every text, so that prompts end "
            "before their answers",
            hint='set "add_eos_token": false in its tokenizer_config.json',
        )


def closing_tokens(tokenizer: Any) -> list[str]:
    """Tokens that stand behind every text."""
    bare = tokenizer("a word", add_special_tokens=False).input_ids
    whole = tokenizer("a word").input_ids
    for start in range(len(whole) - len(bare) + 1):
        if whole[start : start + len(bare)] == bare:
            return tokenizer.convert_ids_to_tokens(whole[start + len(bare) :])
    return []


def _left_open(processor: dict[str, Any]) -> dict[str, Any]:
    """A post-processor of a tokenizer.json without what it puts behind a text."""
    if processor["type"] == "Sequence":
        inner = [_left_open(one) for one in processor["processors"]]
        return processor | {"processors": inner}
    if processor["type"] != "TemplateProcessing":
        return processor
    pieces = processor["single"]
    last = max(place for place, piece in enumerate(pieces) if "Sequence" in piece)
    return processor | {"single": pieces[: last + 1]}


def check_tokenizer(tokenizer: "PreTrainedTokenizerBase", rows: int, name: str) -> None:
    """The tokenizer's ids must be rows of the embedding.

    A padding token that is none is replaced by the end-of-text token, in memory, and that is told.

    Args:
        rows: of the embedding.

    Raises:
        SparsekError: an id of any other token is beyond them.
    """
    vocabulary, pad = tokenizer.get_vocab(), tokenizer.pad_token
    ends = (tokenizer.bos_token, tokenizer.eos_token)
    if tokenizer.unk_token not in ends:
        # A class may add a token for the unknown that its byte-level vocabulary never gives.
        vocabulary.pop(tokenizer.unk_token, None)
    for end in ends:
        if vocabulary.get(end, 0) >= rows:
            raise SparsekError(
                f"the tokenizer of '{name}' begins or ends texts with {end!r}, whose id "
                f"{vocabulary[end]} is beyond the model's {rows} embeddings: its class made it up",
                hint='name the model\'s own in tokenizer_config.json: "eos_token": "..."; or put '
                "the whole tokenizer beside the weights that they were trained with",
            )
    largest = max(vocabulary.items(), key=lambda item: item[1], default=("", 0))
    if largest[1] >= rows and largest[0] == pad and tokenizer.eos_token is not None:
        tokenizer.pad_token = tokenizer.eos_token
        _warn_pad(name.rpartition("/")[2], pad, largest[1], rows, tokenizer.eos_token)
        rest = (item for item in vocabulary.items() if item[0] != pad)
        largest = max(rest, key=lambda item: item[1])
    if largest[1] >= rows:
        raise SparsekError(
            f"the tokenizer of '{name}' has token {largest[0]!r} with id {largest[1]}, and the "
            f"model has embeddings for {rows} ids",
            hint="put the tokenizer beside the weights that they were trained with, or resize the "
            "embeddings: model.resize_token_embeddings(len(tokenizer)), save_pretrained",
        )


@cache
def _warn_pad(name: str, pad: str, number: int, rows: int, end: str) -> None:
    """Once: a verb may look at a tokenizer more than once."""
    _LOG.warning(
        "the tokenizer of '%s' pads with %r, whose id %d is beyond the model's %d embeddings: %r "
        "pads in its place here; name it as pad_token in tokenizer_config.json for other programs",
        name, pad, number, rows, end,
    )  # fmt: skip
