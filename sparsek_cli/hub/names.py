"""What a name can mean: a short name, a hub id or a path; and what is said where it means none."""

import os
import re
from difflib import get_close_matches
from pathlib import Path

from sparsek_cli import model_folder
from sparsek_cli.checkpoint_files.weights_beside import PICKLES
from sparsek_cli.errors import UsageError
from sparsek_cli.hub.other_spellings import instead
from sparsek_cli.model_folder.short_names import BUNDLED, SHORT_NAMES

_WEIGHTS = (".safetensors", ".gguf", *PICKLES)  # what the names of files of weights end in
_HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*", re.ASCII)
_LONGEST = 96  # characters of an owner's name, and of a repository's
_NEVER = re.compile(r"--|\.\.|[-.](/|$)|\.git$")
# What git allows in the name of a branch or tag: the hub's cache makes a path of it.
_REVISION = re.compile(r"(?!-)(?!.*(?:\.\.|//|@\{|/\.|\.lock(?:/|$)))[^\x00-\x20\x7f~^:?*\[\\]+")


def is_short_name(name: str) -> bool:
    """Whether a name is of a bundled model, or in the table of short names."""
    return name.lower() in BUNDLED or name.lower() in SHORT_NAMES


def is_hub_id(name: str) -> bool:
    """Whether a name can be one on the hub: owner/name, by the hub's own rules."""
    return (
        _HUB_ID.fullmatch(name) is not None
        and _NEVER.search(name) is None
        and all(len(part) <= _LONGEST for part in name.split("/"))
    )


def check_revision(revision: str | None) -> None:
    """Raises UsageError where a revision can be no branch, tag or commit."""
    if revision is None:
        return
    named = _REVISION.fullmatch(revision) and revision.strip("/.") == revision
    if named and len(os.fsencode(revision)) < 250 and revision.isprintable():
        return
    if not revision.strip():
        raise UsageError(
            "the revision is empty",
            hint="name a branch, tag or commit, or leave it out; in a shell, the variable may not "
            "be set",
        )
    raise UsageError(
        f"{revision[:60]!r} is no name of a revision",
        hint="name a branch, a tag or a commit of the repository",
    )


def cached_revisions(hub_id: str) -> list[str]:
    """Branches and tags of a model whose files are in the hub's cache, or were."""
    from huggingface_hub import constants

    folder = Path(constants.HF_HUB_CACHE, f"models--{hub_id.replace('/', '--')}")
    names = (file for file in folder.glob("refs/**/*") if file.is_file())
    return sorted(
        file.relative_to(folder / "refs").as_posix()
        for file in names
        if (folder / "snapshots" / file.read_text(errors="replace").strip()).is_dir()
    )


def is_missed_here(name: str) -> bool:
    """Whether a name is of a file of weights in a folder here, and not of a fetched model.

    The hub is not asked then, which takes seconds; a revision says that it is meant.
    """
    file = name.lower().endswith(_WEIGHTS)
    if not (file and Path(name).parent.is_dir()):
        return False
    from huggingface_hub import constants

    # Of GGUF, scorers or a tokenizer there is no config.json to look for.
    cached = Path(constants.HF_HUB_CACHE, f"models--{name.replace('/', '--')}")
    return not any(cached.glob("snapshots/*/*"))


def two_meanings(name: str, *, here: bool) -> str:
    """Which of two is taken, where a folder is called as a known model is."""
    if here:
        return f"'{name}' is the folder here; the model of that short name is not read"
    return f"'{name}' is the model of that short name; the folder here has no config.json"


def no_such_name(name: str, folder: Path) -> UsageError:
    """What to raise of a name that means nothing; `folder` is its path."""
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
        if said := instead(name):
            hint += f"; {said}"
        if _HUB_ID.fullmatch(name) and not is_hub_id(name):
            hint += (
                "; a name on the hub has no --, no .. and no .git at its end, ends in a letter, a "
                f"digit or _, and either part has at most {_LONGEST} characters"
            )
        what = "file" if name.lower().endswith(_WEIGHTS) else "folder"
        return UsageError(f"no such {what}: '{name}'", hint=hint)
    beside = [p.name for p in Path().iterdir() if p.is_dir()]
    near = get_close_matches(name.lower(), [*BUNDLED, *SHORT_NAMES, *beside], n=1, cutoff=0.5)
    hint = f"did you mean '{near[0]}'? " if near else ""
    return UsageError(
        f"unknown model '{name}'",
        hint=hint + "`sparsek convert --list-models` shows the names; a folder or owner/name works",
    )


def no_such_file(hub_id: str, why: str) -> UsageError | None:
    """What is wrong with a name that may be a file of weights here; `why` it is none on the hub."""
    if not hub_id.lower().endswith(_WEIGHTS):
        return None
    error = no_such_name(hub_id, Path(hub_id))
    return UsageError(error.message, hint=f"{error.hint} ({why})")
