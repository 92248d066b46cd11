"""A checkpoint on disk becomes a model and its tokenizer, ready to run."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from sparsek_cli.errors import SparsekError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from sparsek_cli.hub import Checkpoint


def load_model(
    checkpoint: "Checkpoint", *, device: "torch.device", dtype: "torch.dtype", **options: Any
) -> "PreTrainedModel":
    """The causal LM in eval mode; sparse and plain dense checkpoints alike.

    Args:
        options: passed on to `from_pretrained`, `attn_implementation` for instance.

    Raises:
        SparsekError: weights that cannot be read, are missing, or do not fit the config.
    """
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM

    import sparsek_cli.models  # noqa: F401  (registers the sparsek_* model types)

    damaged = "the folder is incomplete or damaged: fetch or convert it again"
    try:
        with _no_progress_bar():
            model, report = AutoModelForCausalLM.from_pretrained(
                checkpoint.path,
                dtype=dtype,
                output_loading_info=True,
                use_safetensors=True,
                **options,
            )
    except SafetensorError as error:
        raise SparsekError(
            f"the weights of '{checkpoint.name}' cannot be read: {_first_line(error)}", hint=damaged
        ) from error
    except SparsekError:
        raise
    except (OSError, ValueError, RuntimeError) as error:
        raise SparsekError(
            f"'{checkpoint.name}' cannot be loaded: {_first_line(error)}", hint=damaged
        ) from error
    missing = sorted(report["missing_keys"])
    if missing:
        raise SparsekError(
            f"'{checkpoint.name}' lacks {len(missing)} weights, the first is {missing[0]}",
            hint=damaged,
        )
    return model.to(device).eval()


def load_tokenizer(checkpoint: "Checkpoint") -> "PreTrainedTokenizerBase":
    """The tokenizer beside the weights.

    Raises:
        SparsekError: there is none, or it cannot be read.
    """
    from transformers import AutoTokenizer

    import sparsek_cli.models  # noqa: F401  (a sparsek_* config must be known to AutoTokenizer)

    try:
        return AutoTokenizer.from_pretrained(checkpoint.path)
    except Exception as error:
        # Every tokenizer library fails in its own way; all of them mean the same to the user.
        raise SparsekError(
            f"'{checkpoint.name}' has no usable tokenizer: {_first_line(error)}",
            hint="copy tokenizer.json and tokenizer_config.json of the base model into its folder",
        ) from error


@contextmanager
def _no_progress_bar() -> Iterator[None]:
    # Seconds at most, and it would stand between the user and the first line of a result.
    from huggingface_hub.utils import are_progress_bars_disabled
    from transformers.utils import logging

    shown = not are_progress_bars_disabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
