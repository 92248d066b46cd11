"""export, export_scorers and merge: a converted model taken apart and put together."""

from typing import TYPE_CHECKING

from sparsek_cli.api.values import (
    Place,
    check_reporter,
    check_switches,
    check_words,
    place,
    place_or_none,
)
from sparsek_cli.reporter import Reporter

if TYPE_CHECKING:
    from sparsek_cli.scorers_alone.take_scorers import Taken
    from sparsek_cli.sharing.dense import Exported
    from sparsek_cli.sharing.merge import Merged


def export(
    model: Place,
    out: Place | None = None,
    *,
    revision: str | None = None,
    copy: bool = False,
    overwrite: bool = False,
    reporter: Reporter | None = None,
) -> "Exported":
    """Writes the plain dense model that a converted one is made of, as `sparsek export` does.

    Args:
        model: folder or hub id of a converted model, fine-tuned or not. revision: of a hub id.
        out: the folder to write; default: `<name>-dense`.
        copy: copy weights that could be linked. overwrite: replace `out`.
        reporter: where progress goes; default: nowhere.

    Returns:
        `out`, and how the weights and the tokenizer came along.
    """
    from sparsek_cli.sharing.dense import plan, run

    check_switches(copy=copy, overwrite=overwrite)
    check_words(revision=revision)
    check_reporter(reporter)
    made = plan(
        place("model", model), place_or_none("out", out),
        revision=revision, copy=copy, overwrite=overwrite,
    )  # fmt: skip
    return run(made, reporter)


def export_scorers(
    model: Place,
    out: Place | None = None,
    *,
    revision: str | None = None,
    overwrite: bool = False,
    reporter: Reporter | None = None,
) -> "Taken":
    """Writes the scorers of a converted model alone, as `sparsek export --scorers` does.

    Args:
        out: the folder to write, or a file that ends in .safetensors; default: `<name>-scorers`.
        others: as of `export`.

    Returns:
        `out`, and the hash of the weights that they belong to.
    """
    from sparsek_cli.scorers_alone.take_scorers import plan, run

    check_switches(overwrite=overwrite)
    check_words(revision=revision)
    check_reporter(reporter)
    made = plan(
        place("model", model), place_or_none("out", out), revision=revision, overwrite=overwrite
    )
    return run(made, reporter)


def merge(
    base: Place,
    scorers: Place,
    out: Place | None = None,
    *,
    revision: str | None = None,
    copy: bool = False,
    overwrite: bool = False,
    reporter: Reporter | None = None,
) -> "Merged":
    """Puts scorers onto the base that they were made for, as `sparsek merge` does.

    Args:
        base: folder, short name or hub id of the dense model. revision: of a hub id.
        scorers: a file, a folder or a hub id.
        out: the folder to write; default: `<name>-sparsek`.
        others: as of `export`.

    Returns:
        `out`, and what was verified.
    """
    from sparsek_cli.sharing.merge import plan, run

    check_switches(copy=copy, overwrite=overwrite)
    check_words(revision=revision)
    check_reporter(reporter)
    made = plan(
        place("base", base), place("scorers", scorers), place_or_none("out", out),
        revision=revision, copy=copy, overwrite=overwrite,
    )  # fmt: skip
    return run(made, reporter)
