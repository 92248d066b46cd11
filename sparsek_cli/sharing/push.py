"""A folder goes to the hub, when it is asked for and not otherwise; private unless told."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparsek_cli import hub, model_folder
from sparsek_cli.checkpoint_files.file_hashes import check_as_written
from sparsek_cli.checkpoint_files.samples import check_samples
from sparsek_cli.checkpoint_files.seal import check_seal
from sparsek_cli.disk import check_name
from sparsek_cli.errors import SparsekError, UsageError, first_line
from sparsek_cli.loading import check_whole, load_tokenizer
from sparsek_cli.output.contents import (
    ADAPTERS,
    CONVERT_RECIPE,
    FINETUNE_RECIPE,
    MODEL,
    SCORERS,
    SCORERS_ALONE,
    Contents,
)
from sparsek_cli.output.scorers_file import check_finite
from sparsek_cli.output.tokenizer_files import holds_tokenizer
from sparsek_cli.output.written_config import say_changes
from sparsek_cli.reporter import Reporter, Silent
from sparsek_cli.scorers_alone.portable_recipe import portable
from sparsek_cli.sharing.hub_card import card, check_licence

_LOGIN = "run `hf auth login` (or set HF_TOKEN) with a token that may write"


@dataclass(frozen=True)
class Plan:
    """What will be sent.

    Attributes:
        folder: its place here. repo: owner/name. private: whether a new repository is.
        files: names relative to the folder, and their bytes.
        texts: files that are sent otherwise than they lie there: the card, recipes without paths.
        matter: the card's front matter.
    """

    folder: Path
    repo: str
    private: bool
    files: dict[str, int]
    texts: dict[str, str]
    matter: dict[str, Any]

    def data(self) -> dict[str, Any]:
        """For --json."""
        return {
            "folder": str(self.folder),
            "repo": self.repo,
            "private": self.private,
            "files": self.files,
            "card": self.texts["README.md"],
        }

    def text(self) -> str:
        """For a person."""
        kind = "private, if it is new" if self.private else "public, if it is new"
        total = sum(self.files.values())
        lines = [f"folder      {self.folder}", f"repository  {self.repo} ({kind})"]
        lines.append(f"files       {len(self.files)}, {total:,} bytes")
        lines += [f"            {name} ({size:,})" for name, size in sorted(self.files.items())]
        if "license" not in self.matter:
            lines.append("licence     not known: give --licence, as the hub names it")
        return "\n".join([*lines, "card", self.texts["README.md"].rstrip()])


@dataclass(frozen=True)
class Pushed:
    """What was sent, and where it is now."""

    plan: Plan
    url: str

    def data(self) -> dict[str, Any]:
        """For --json."""
        return {**self.plan.data(), "url": self.url}

    def text(self) -> str:
        """For a person."""
        total = sum(self.plan.files.values())
        return f"pushed {len(self.plan.files)} files, {total:,} bytes, to {self.url}"


def plan(
    folder: str | Path,
    repo: str,
    *,
    public: bool = False,
    licence: str | None = None,
    evaluation: str | Path | None = None,
    reporter: Reporter | None = None,
) -> Plan:
    """Checks what would be sent, files with a known hash to the bit; the network is not asked.

    Raises:
        UsageError: no folder of ours, files in it that are of nobody, or no valid name of the
            repository or the licence.
        SparsekError: a tokenizer that does not load, weights that are missing, of another shape or
            not those that were written, or scorers that are no numbers.
    """
    for name in (folder, evaluation):
        if name is not None:
            check_name(os.fspath(name))  # empty, it would be the folder that one is in
    check_licence(licence)
    place = Path(folder).expanduser()
    if not place.is_dir():
        raise UsageError(f"no such folder: '{folder}'", hint="name a folder that sparsek wrote")
    if not hub.is_hub_id(repo):
        raise UsageError(f"'{repo}' is no name on the hub", hint="name the repository owner/name")
    _check(place)
    _check_scorers(place)
    _check_files(place, reporter or Silent())
    paths = [path for path in sorted(place.rglob("*")) if path.is_file()]
    recipes = (CONVERT_RECIPE, FINETUNE_RECIPE)
    texts = {name: portable(place / name) for name in recipes if (place / name).is_file()}
    given = None if evaluation is None else Path(evaluation).expanduser()
    texts["README.md"], matter = card(place, licence=licence, evaluation=given)
    files = {path.relative_to(place).as_posix(): path.stat().st_size for path in paths}
    files |= {name: len(text.encode()) for name, text in texts.items()}
    return Plan(place, repo, not public, files, texts, matter)


def _check_scorers(place: Path) -> None:
    """Raises SparsekError for scorers, alone or among other weights, that are no numbers."""
    from safetensors import SafetensorError, safe_open

    for file in sorted(place.glob("*.safetensors")):
        try:
            if file.name == SCORERS:
                check_seal(file)
            with safe_open(file, "np") as opened:
                names = opened.keys()  # a mapping in name alone: it is not iterable everywhere
                names = [n for n in names if file.name == SCORERS or ".scorer." in n]
                check_finite({name: opened.get_tensor(name) for name in names}, str(place))
        except SafetensorError as error:
            raise SparsekError(
                f"'{file}' is damaged: {first_line(error)}", hint="fetch or write the folder again"
            ) from error


def _check_files(place: Path, reporter: Reporter) -> None:
    """Raises SparsekError for other files of weights that are not what was written."""
    files = [file for file in sorted(place.glob("*.safetensors")) if file.name != SCORERS]
    with reporter.progress("comparing files", sum(file.stat().st_size for file in files)) as bar:
        for file in files:
            check_as_written(file)
            bar.advance(file.stat().st_size)
    check_samples(place)  # all that is known of large files
    say_changes(place)


def _check(place: Path) -> None:
    """The folder is whole, and holds nothing that this tool did not write."""
    kind = _kind(place)
    if kind is MODEL:
        model_folder.check(place, place.name)
        check_whole(place, place.name)
        if holds_tokenizer(place):
            load_tokenizer(place)
    foreign = kind.foreign(place)
    if foreign is not None:
        raise UsageError(
            f"'{place}' holds '{foreign}', which sparsek did not write and does not send",
            hint="move it away, or push the folder with `hf upload`",
        )
    lacking = kind.lacks(place)
    if lacking is not None:
        raise UsageError(
            f"'{place}' is not {kind.name}: it has no {lacking}",
            hint="name a folder that convert, finetune or export wrote",
        )


def _kind(place: Path) -> Contents:
    if (place / "config.json").is_file():
        return MODEL  # adapters beside it are refused with all else that is no plain model
    return ADAPTERS if (place / "adapter_config.json").is_file() else SCORERS_ALONE


def run(plan: Plan, reporter: Reporter | None = None) -> Pushed:
    """Makes the repository, if there is none, and sends the files.

    Raises:
        SparsekError: the hub cannot be reached, or refuses.
    """
    import huggingface_hub
    from huggingface_hub import constants, errors

    reporter = reporter or Silent()
    if constants.HF_HUB_OFFLINE:
        raise SparsekError(
            f"{hub.switch()} is set: nothing was sent", hint="unset it, then push again"
        )
    message = f"{plan.folder.name}, by sparsek"
    try:
        made = huggingface_hub.create_repo(plan.repo, private=plan.private, exist_ok=True)
        reporter.say(f"sending {len(plan.files)} files to {made}")
        huggingface_hub.upload_folder(
            repo_id=plan.repo,
            folder_path=plan.folder,
            allow_patterns=sorted(plan.files),
            ignore_patterns=sorted(plan.texts),
            commit_message=message,
        )
        huggingface_hub.create_commit(
            plan.repo,
            [
                huggingface_hub.CommitOperationAdd(name, text.encode())
                for name, text in sorted(plan.texts.items())
            ],
            commit_message=f"{message}: card and recipe",
        )
    except (errors.LocalTokenNotFoundError, errors.RepositoryNotFoundError) as error:
        raise SparsekError(f"the hub does not let you write '{plan.repo}'", hint=_LOGIN) from error
    except errors.HfHubHTTPError as error:
        status = getattr(error.response, "status_code", None)
        first = first_line(error)
        raise SparsekError(
            f"the hub refused '{plan.repo}': {first}",
            hint=_LOGIN if status in (401, 403) else "try again later: what was sent is kept there",
        ) from error
    return Pushed(plan, str(made))
