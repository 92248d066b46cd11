"""A repository of the hub becomes a folder in its cache, or an error that says what to do."""

from collections.abc import Sequence
from pathlib import Path

from sparsek_cli.errors import SparsekError, UsageError, first_line
from sparsek_cli.hub.names import no_such_file

# Only what a causal LM needs; never pickles, and nothing below the top folder (onnx/, original/)
# but additional_chat_templates/: such patterns know no "but", so folders in "add" pass.
WANTED = ("*.safetensors", "*.json", "*.txt", "*.model", "*.jinja", "tokenizer*", "README.md")
# Of a model whose tokenizer alone is wanted; config.json says what class reads it.
TOKENIZER_WANTED = ("*.json", "*.txt", "*.model", "*.jinja", "tokenizer*")
UNWANTED = (
    "[!a]*/*",
    "a[!d]*/*",
    "ad[!d]*/*",
    "consolidated*",
    "*.bin",
    "*.pt",
    "*.pth",
    "*.pkl",
    "*.ot",
    "*.msgpack",
    "*.h5",
)
HUB_TIMEOUT = 8  # seconds for each answer of the hub; a slow network must not look like a hang


def fetch(hub_id: str, revision: str | None = None, wanted: Sequence[str] = WANTED) -> Path:
    """The folder of a repository in the cache, whatever it holds; `resolve` is for models.

    Args:
        revision: branch, tag or commit. wanted: patterns of the files that are fetched.

    Raises:
        UsageError: there is none of that name or revision.
        SparsekError: the hub could not be reached, or refused; or its cache cannot be used.
    """
    # Imported here: half a second that no other source of a model needs.
    import huggingface_hub
    from huggingface_hub import errors

    where = f"https://huggingface.co/{hub_id}"
    try:
        return Path(
            huggingface_hub.snapshot_download(
                hub_id,
                revision=revision,
                allow_patterns=list(wanted),
                ignore_patterns=list(UNWANTED),
                etag_timeout=HUB_TIMEOUT,
            )
        )
    except errors.GatedRepoError as error:
        raise SparsekError(
            f"'{hub_id}' is gated: its licence must be accepted first",
            hint=f"accept it at {where}, then run `hf auth login` (or set HF_TOKEN)",
        ) from error
    except errors.RevisionNotFoundError as error:
        raise UsageError(
            f"'{hub_id}' has no revision '{revision}'",
            hint=f"see {where}/tree/main for its branches",
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise no_such_file(hub_id, "the hub has no model of that name") or UsageError(
            f"the hub has no model '{hub_id}'",
            hint="check the spelling; for a private model run `hf auth login` (or set HF_TOKEN)",
        ) from error
    except errors.HFValidationError as error:
        raise UsageError(f"'{hub_id}' is no valid hub id", hint="a hub id is owner/name") from error
    except errors.HfHubHTTPError as error:
        raise SparsekError(
            f"the hub refused '{hub_id}': {first_line(error)}", hint="try again later"
        ) from error
    except Exception as error:
        # Besides LocalEntryNotFoundError this is the HTTP client's own family of connection errors,
        # which changed its package name between hub releases; an OSError of the disk is not theirs.
        if isinstance(error, OSError) and not isinstance(
            error, errors.LocalEntryNotFoundError | ConnectionError | TimeoutError
        ):
            raise SparsekError(
                f"the hub's cache cannot be used: {error.strerror or error}"
                + (f" ({error.filename})" if error.filename else ""),
                hint="set HF_HOME to a folder that can be written and has room",
            ) from error
        raise _unreachable(hub_id) from error


def _unreachable(hub_id: str) -> SparsekError:
    from huggingface_hub import constants

    offline = constants.HF_HUB_OFFLINE
    why = "HF_HUB_OFFLINE is set" if offline else "the Hugging Face hub cannot be reached"
    return no_such_file(hub_id, f"{why}, if it is a name there") or SparsekError(
        f"{why} and '{hub_id}' is not in the cache",
        hint=f"{'unset it' if offline else 'connect'}, or copy config.json, *.safetensors and the "
        "tokenizer files into a folder and name that folder; `tiny` works offline",
    )
