"""A repository of the hub becomes a folder in its cache, or an error that says what to do."""

import json
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from shlex import quote

from sparsek_cli.checkpoint_files.shards import INDEX, read_shard
from sparsek_cli.errors import SparsekError, UsageError, first_line
from sparsek_cli.hub.names import cached_revisions, check_revision, no_such_file
from sparsek_cli.hub.offline import no_way

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
        UsageError: there is none of that name or revision, or it can be none.
        SparsekError: the hub could not be reached, or refused; or its cache cannot be used.
    """
    check_revision(revision)
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
        raise _unreachable(hub_id, revision) from error


def check_fetched(path: Path, hub_id: str, revision: str | None = None) -> None:
    """A model's folder in the cache is whole as far as the hub is needed to make it so.

    Where it cannot be reached it gives what there is of an earlier, interrupted download; and of a
    file that is there it never looks whether it is damaged.

    Raises:
        SparsekError: files are missing, and the hub cannot be reached; or one is damaged.
    """
    for file in sorted(path.glob("*.safetensors")):
        if not file.is_file():
            continue
        try:
            read_shard(file)
        except SparsekError as error:
            at = f" --revision {quote(revision)}" if revision else ""
            raise SparsekError(
                error.message, hint=f"`hf download {hub_id}{at} --force-download` fetches it anew"
            ) from error
    lacking = _lacking(path)
    if lacking is None or is_reachable(hub_id):
        return
    why, way = no_way()
    raise SparsekError(
        f"{why}, and the cache has '{hub_id}' without {lacking}",
        hint=f"{way} and run the same command again: what is missing is fetched then",
    )


def _lacking(path: Path) -> str | None:
    """What a fetched model lacks, in words; None: nothing of which one can know."""
    gone = sorted(file.name for file in path.iterdir() if not file.exists())
    if gone:
        return gone[0]
    if not (path / "config.json").is_file():
        return "config.json"
    named: set[str] = set()
    with suppress(OSError, ValueError, AttributeError, TypeError):  # for others to tell
        named = {*json.loads((path / INDEX).read_text(encoding="utf-8"))["weight_map"].values()}
    missing = sorted(name for name in named if not (path / str(name)).is_file())
    if missing:
        return missing[0]
    return None if any(path.glob("*.safetensors")) else "its weights"


def is_reachable(hub_id: str, kind: str = "model") -> bool:
    """Whether the hub answers when it is asked for a repository, be it that there is none.

    Asked once: who fetches something asks again and again, for half a minute.

    Args:
        kind: `model` or `dataset`.
    """
    import huggingface_hub
    from huggingface_hub import errors

    try:
        huggingface_hub.HfApi().repo_info(hub_id, repo_type=kind, timeout=HUB_TIMEOUT)
    except errors.HfHubHTTPError:
        return True
    except Exception:  # of the HTTP client, see above
        return False
    return True


def _unreachable(hub_id: str, revision: str | None) -> SparsekError:
    why, way = no_way()
    if error := no_such_file(hub_id, f"{why}, if it is a name there"):
        return error
    there = cached_revisions(hub_id)
    if there:
        return SparsekError(
            f"{why} and the cache has no {revision or 'main'} of '{hub_id}'",
            hint=f"{way}, or name what is there: --revision {there[0]}",
        )
    return SparsekError(
        f"{why} and '{hub_id}' is not in the cache",
        hint=f"{way}, or copy config.json, *.safetensors and the tokenizer files into a folder and "
        "name that folder; `tiny` works offline",
    )
