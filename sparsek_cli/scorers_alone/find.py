"""Scorers alone at a path or in a hub repository."""

import os
from pathlib import Path

from sparsek_cli import hub
from sparsek_cli.converted import lacking
from sparsek_cli.disk import check_name
from sparsek_cli.errors import SparsekError, UsageError
from sparsek_cli.output.contents import SCORERS
from sparsek_cli.output.scorers_file import Scorers, header
from sparsek_cli.plain_files import check_no_pointer, check_plain


def read(place: str | os.PathLike, revision: str | None = None) -> Scorers:
    """The scorers at a path or in a hub repository.

    Args:
        place: the file, a folder that holds it as `sparsek.safetensors`, or a hub id.
        revision: of a hub id.

    Raises:
        UsageError: there are none; the message says what is there instead.
        SparsekError: the hub could not be reached, or refused; or settings beside the scorers are
            missing.
    """
    name = os.fspath(place)
    check_name(name)
    path = Path(os.path.expanduser(name))
    asked = revision is not None or not hub.is_missed_here(name)
    if not os.path.lexists(path) and hub.is_hub_id(name) and asked:
        path = hub.fetch(name, revision)
    if path.is_dir():
        if (path / "config.json").is_file():
            raise UsageError(
                f"'{name}' is a whole model, not scorers alone",
                hint="use it as it is; `sparsek export --scorers` takes the scorers out of one",
            )
        path = path / SCORERS
    check_plain(path, hint=f"name a file or folder of scorers ({SCORERS})")
    check_no_pointer(path)
    if not path.is_file():
        hint = f"name a file or folder that `sparsek export --scorers` wrote ({SCORERS})"
        if said := hub.instead(name):
            hint += f"; {said}"
        raise UsageError(f"there are no scorers at '{name}'", hint=hint)
    found = header(path)
    if found is None:
        raise UsageError(
            f"'{path}' holds no scorers of a base that it names",
            hint="`sparsek export --scorers MODEL OUT` writes such a file",
        )
    if missing := lacking(found.block):
        raise SparsekError(
            f"the scorers in {path} are damaged: their settings lack {missing}",
            hint="fetch or export them again, or convert the base again",
        )
    return found
