"""What libraries raise while a checkpoint loads, as one line that names it."""

from collections.abc import Iterator
from contextlib import contextmanager

from sparsek_cli.errors import SparsekError, first_line, reason
from sparsek_cli.families.positions import rotary_error

DAMAGED = "the folder is incomplete or damaged: fetch or convert it again"
_UNFIT = (
    "correct what its config.json says if the weights are right, else fetch or convert it again"
)
_MISFIT = "a package that loading it needs does not fit the installed transformers: upgrade both"


def tokenizer_reason(error: Exception) -> str:
    """Why a tokenizer does not load, in one line that can be acted on."""
    text = str(error)
    if "instantiate the backend tokenizer" in text:
        return "tokenizer.json, or what stands for it, is missing"
    if "trust_remote_code" in text or "custom code" in text:
        return "it needs code of its own (auto_map in tokenizer_config.json), which is not run"
    # Of values of another type Python's own words are left, which name no file or key.
    slipped = isinstance(error, TypeError | AttributeError | LookupError)
    return f"{reason(error)} (in one of its files)" if slipped else first_line(error)


@contextmanager
def readable_errors(name: str) -> Iterator[None]:
    """What libraries raise while a checkpoint loads, as one line that names it.

    Raises:
        SparsekError: in place of any such error.
    """
    from safetensors import SafetensorError

    try:
        yield
    except SparsekError:
        raise
    except SafetensorError as error:
        raise SparsekError(
            f"the weights of '{name}' cannot be read: {first_line(error)}", hint=DAMAGED
        ) from error
    except MemoryError:
        raise
    except Exception as error:
        if type(error).__name__ == "OutOfMemoryError":
            raise
        text = str(error)
        if "can't allocate memory" in text:
            raise SparsekError(
                f"'{name}' needs more memory than there is: {text[text.index('you tried') :]}"
                if "you tried" in text
                else f"'{name}' needs more memory than there is",
                hint="check the sizes in its config.json; else take --dtype bfloat16, or a machine "
                "with more memory",
            ) from error
        if "trust_remote_code" in text or "custom code" in text:
            raise SparsekError(
                f"'{name}' needs code of its own (auto_map in config.json), which is not run",
                hint="name a model of a family that transformers knows by itself",
            ) from error
        if told := rotary_error(text):
            raise told from error
        hint = _MISFIT if isinstance(error, ImportError) else _UNFIT
        raise SparsekError(f"'{name}' cannot be loaded: {reason(error)}", hint=hint) from error
