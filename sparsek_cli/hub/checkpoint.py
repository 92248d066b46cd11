"""A name becomes a folder: a local checkpoint, a short name, or a hub id fetched into its cache."""

import logging
import os
from dataclasses import dataclass
from pathlib import Path

from sparsek_cli import model_folder
from sparsek_cli.disk import check_name
from sparsek_cli.errors import SparsekError, UsageError
from sparsek_cli.hub.download import TOKENIZER_WANTED, check_fetched, fetch
from sparsek_cli.hub.names import (
    is_hub_id,
    is_missed_here,
    is_short_name,
    no_such_name,
    two_meanings,
)
from sparsek_cli.hub.other_spellings import instead
from sparsek_cli.model_folder.short_names import BUNDLED, SHORT_NAMES

_LOG = logging.getLogger("sparsek_cli")


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
    check_name(name)
    folder = Path(os.path.expanduser(name))
    short, known = SHORT_NAMES.get(name.lower()), is_short_name(name)
    here = folder.is_dir() and ((folder / "config.json").is_file() or not known)
    if known and folder.is_dir():
        _LOG.warning("%s", two_meanings(name, here=here))
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
        return _fetched(name.lower(), short.hub_id, revision)
    missed = revision is None and is_missed_here(name)
    if missed or os.path.lexists(folder) or not is_hub_id(name):
        raise no_such_name(name, folder)
    return _fetched(name.split("/")[1], name, revision)


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
            _LOG.warning("%s", two_meanings(name, here=True))
        model_folder.check_special(folder)
        if said := model_folder.told_apart(folder):
            _LOG.warning("%s", said)
        return Checkpoint(folder.resolve(), folder.resolve().name, "folder")
    if name.lower() in BUNDLED:
        return bundled(name.lower())
    short = SHORT_NAMES.get(name.lower())
    there = os.path.lexists(folder)
    if short is None and not there and is_missed_here(name):
        raise no_such_name(name, folder)
    if short is None and (there or not is_hub_id(name)):
        hint = "name a folder with tokenizer.json, a short name or a hub id"
        if os.path.isfile(folder):
            hint = f"name its folder, '{folder.parent}'"
        elif said := instead(name):
            hint += f"; {said}"
        raise UsageError(f"tokenizer: '{name}' is no folder", hint=hint)
    hub_id = name if short is None else short.hub_id
    path = fetch(hub_id, None, TOKENIZER_WANTED)
    return Checkpoint(path, hub_id.split("/")[1], hub_id)


def bundled(name: str = "tiny") -> Checkpoint:
    """The model that ships inside the package, for use without a network."""
    path = Path(__file__).parent.parent / "bundled" / name
    if not (path / "config.json").is_file():
        raise SparsekError(
            f"the bundled model '{name}' is missing from this installation",
            hint="reinstall sparsek, or name a model: `sparsek convert --list-models`",
        )
    return Checkpoint(path, name, "bundled")


def _fetched(name: str, hub_id: str, revision: str | None) -> Checkpoint:
    path = fetch(hub_id, revision)
    check_fetched(path, hub_id, revision)
    return _checked(Checkpoint(path, name, hub_id, revision))


def _checked(checkpoint: Checkpoint) -> Checkpoint:
    model_folder.check(checkpoint.path, checkpoint.name)
    return checkpoint
