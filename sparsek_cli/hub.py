"""A name becomes a folder: a local checkpoint, a short name, or a hub id fetched into its cache."""

import logging
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path

from sparsek_cli import model_folder
from sparsek_cli.checkpoint_files.weights_beside import PICKLES
from sparsek_cli.disk import check_name
from sparsek_cli.errors import SparsekError, UsageError, first_line
from sparsek_cli.model_folder.short_names import BUNDLED, SHORT_NAMES

_LOG = logging.getLogger("sparsek_cli")
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

_WEIGHTS = (".safetensors", ".gguf", *PICKLES)  # what the names of files of weights end in
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint on this machine.

    Attributes:
        path: folder with config.json, *.safetensors and the tokenizer.
        name: what to call it, without slashes: folder name, short name or the hub id's last part.
        source: "folder", "bundled" or the hub id.
        revision: what the user asked for; None for folders and for the default branch.
    """

    path: Path
    name: str
    source: str
    revision: str | None = None

    @property
    def title(self) -> str:
        """What to call it among strangers: the hub id, else the name."""
        return self.source if "/" in self.source else self.name

    @property
    def operand(self) -> str:
        """What names it on a command line, from any folder."""
        if "/" in self.source:
            return self.source
        return self.name if self.source == "bundled" else str(self.path)

    def config(self) -> dict:
        """config.json as a dictionary."""
        return model_folder.read_config(self.path)


def resolve(name: str | os.PathLike, revision: str | None = None) -> Checkpoint:
    """Finds or fetches the checkpoint that `name` means, and checks that it is a causal LM.

    Args:
        name: a folder, a short name (see `model_folder.short_names`) or a hub id "owner/name".
        revision: branch, tag or commit on the hub; refused for folders.

    Raises:
        UsageError: the name means nothing, or what it names is no causal LM in safetensors.
        SparsekError: the hub could not be reached, or refused.
    """
    name = os.fspath(name)
    if not name.strip():
        raise UsageError("the model's name is empty", hint="name a folder, a hub id or a name")
    if "\0" in name:
        raise UsageError("the model's name holds a null byte", hint="name a folder or a hub id")
    check_name(name)
    folder = Path(os.path.expanduser(name))
    short, known = SHORT_NAMES.get(name.lower()), is_short_name(name)
    here = folder.is_dir() and ((folder / "config.json").is_file() or not known)
    if known and folder.is_dir():
        _LOG.warning("%s", _two_meanings(name, here=here))
    if here:
        if revision is not None:
            raise UsageError(
                f"--revision {revision} given, but '{name}' is a folder",
                hint="a revision belongs to a hub id; drop it, or name the hub id",
            )
        return _checked(Checkpoint(folder.resolve(), folder.resolve().name, "folder"))
    if name.lower() in BUNDLED:
        if revision is not None:
            raise UsageError(
                f"--revision {revision} given, but '{name}' ships with sparsek",
                hint="a revision belongs to a hub id; drop it, or name the hub id",
            )
        return bundled(name.lower())
    if short is not None:
        path = _download(short.hub_id, revision)
        return _checked(Checkpoint(path, name.lower(), short.hub_id, revision))
    missed = revision is None and is_missed_here(name)
    if missed or os.path.lexists(folder) or not is_hub_id(name):
        raise _no_such_name(name, folder)
    path = _download(name, revision)
    return _checked(Checkpoint(path, name.split("/")[1], name, revision))


def tokenizer_of(name: str) -> Checkpoint:
    """The folder with the tokenizer that `name` means; of a hub model no weights are fetched.

    Args:
        name: a folder, a short name or a hub id.

    Raises:
        UsageError: the name means nothing.
        SparsekError: the hub could not be reached, or refused.
    """
    check_name(name)
    folder = Path(os.path.expanduser(name))
    if folder.is_dir():
        if is_short_name(name):
            _LOG.warning("%s", _two_meanings(name, here=True))
        model_folder.check_special(folder)
        if said := model_folder.told_apart(folder):
            _LOG.warning("%s", said)
        return Checkpoint(folder.resolve(), folder.resolve().name, "folder")
    if name.lower() in BUNDLED:
        return bundled(name.lower())
    short = SHORT_NAMES.get(name.lower())
    if short is None and (os.path.lexists(folder) or not is_hub_id(name)):
        raise UsageError(
            f"tokenizer: '{name}' is no folder",
            hint="name a folder with tokenizer.json, a short name or a hub id",
        )
    if short is None and is_missed_here(name):
        raise _no_such_name(name, folder)
    hub_id = name if short is None else short.hub_id
    path = _download(hub_id, None, TOKENIZER_WANTED)
    return Checkpoint(path, hub_id.split("/")[1], hub_id)


def is_short_name(name: str) -> bool:
    """Whether a name is of a bundled model, or in the table of short names."""
    return name.lower() in BUNDLED or name.lower() in SHORT_NAMES


def is_hub_id(name: str) -> bool:
    """Whether a name can be one on the hub: owner/name, and no path."""
    return not _looks_like_path(name) and _HUB_ID.fullmatch(name) is not None


def fetch(hub_id: str, revision: str | None = None) -> Path:
    """The folder of a hub repository in the cache, whatever it holds; `resolve` is for models.

    Raises:
        UsageError, SparsekError: as `resolve`.
    """
    return _download(hub_id, revision)


def bundled(name: str = "tiny") -> Checkpoint:
    """The model that ships inside the package, for use without a network."""
    path = Path(__file__).parent / "bundled" / name
    if not (path / "config.json").is_file():
        raise SparsekError(
            f"the bundled model '{name}' is missing from this installation",
            hint="reinstall sparsek, or name a model: `sparsek convert --list-models`",
        )
    return Checkpoint(path, name, "bundled")


def _looks_like_path(name: str) -> bool:
    return name.startswith((".", "/", "~")) or name.count("/") != 1 or "\\" in name


def is_missed_here(name: str) -> bool:
    """Whether a name is of a file of weights in a folder that is here, and not of a fetched model.

    The hub is not asked then, which takes seconds; a revision says that it is meant.
    """
    file = name.lower().endswith(_WEIGHTS)
    if not (file and is_hub_id(name) and Path(name).parent.is_dir()):
        return False
    from huggingface_hub import constants

    # Not asked of their functions, which raise for what is no hub id; and of GGUF, scorers or a
    # tokenizer there is no config.json to look for.
    cached = Path(constants.HF_HUB_CACHE, f"models--{name.replace('/', '--')}")
    return not any(cached.glob("snapshots/*/*"))


def _two_meanings(name: str, *, here: bool) -> str:
    """Which of two is taken, where a folder is called as a known model is."""
    if here:
        return f"'{name}' is the folder here; the model of that short name is not read"
    return f"'{name}' is the model of that short name; the folder here has no config.json"


def _no_such_name(name: str, folder: Path) -> UsageError:
    if folder.is_file():
        return model_folder.file_error(folder)
    if os.path.lexists(folder):
        return UsageError(
            f"'{name}' is neither a folder nor a file that can be read", hint="name a folder"
        )
    if "/" in name or name.startswith((".", "~")):
        beside = [p.name for p in folder.parent.iterdir()] if folder.parent.is_dir() else []
        near = get_close_matches(folder.name, beside, n=1)
        hint = f"did you mean '{folder.parent / near[0]}'?" if near else "check the path"
        what = "file" if name.lower().endswith(_WEIGHTS) else "folder"
        return UsageError(f"no such {what}: '{name}'", hint=hint)
    beside = [p.name for p in Path().iterdir() if p.is_dir()]
    near = get_close_matches(name.lower(), [*BUNDLED, *SHORT_NAMES, *beside], n=1, cutoff=0.5)
    hint = f"did you mean '{near[0]}'? " if near else ""
    return UsageError(
        f"unknown model '{name}'",
        hint=hint + "`sparsek convert --list-models` shows the names; a folder or owner/name works",
    )


def _download(hub_id: str, revision: str | None, wanted: Sequence[str] = WANTED) -> Path:
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
        raise _no_such_file(hub_id, "the hub has no model of that name") or UsageError(
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


def _no_such_file(hub_id: str, why: str) -> UsageError | None:
    """What is wrong with a name that may be a file of weights here; `why` it is none on the hub."""
    if not hub_id.lower().endswith(_WEIGHTS):
        return None
    error = _no_such_name(hub_id, Path(hub_id))
    return UsageError(error.message, hint=f"{error.hint} ({why})")


def _unreachable(hub_id: str) -> SparsekError:
    from huggingface_hub import constants

    offline = constants.HF_HUB_OFFLINE
    why = "HF_HUB_OFFLINE is set" if offline else "the Hugging Face hub cannot be reached"
    return _no_such_file(hub_id, f"{why}, if it is a name there") or SparsekError(
        f"{why} and '{hub_id}' is not in the cache",
        hint=f"{'unset it' if offline else 'connect'}, or copy config.json, *.safetensors and the "
        "tokenizer files into a folder and name that folder; `tiny` works offline",
    )


def _checked(checkpoint: Checkpoint) -> Checkpoint:
    model_folder.check(checkpoint.path, checkpoint.name)
    return checkpoint
