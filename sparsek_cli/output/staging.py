"""A folder that appears whole or not at all."""

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from sparsek_cli.disk import umask
from sparsek_cli.errors import SparsekError
from sparsek_cli.output.contents import MODEL, Contents
from sparsek_cli.output.leftovers import held, make_beside
from sparsek_cli.output.place import absolute
from sparsek_cli.output.swap_folders import exchange
from sparsek_cli.termination import sigterm_interrupts


@contextlib.contextmanager
def staged(out: Path, *, overwrite: bool = False, contents: Contents = MODEL) -> Iterator[Path]:
    """Yields an empty sibling folder; on success it takes the name `out` in one step.

    On any failure, Ctrl-C or SIGTERM the sibling and the parents made for it are removed and `out`
    is as before; what kill -9 leaves is for `leftovers.clear`.

    Args:
        out: absent or an empty folder; with `overwrite` also one that this tool wrote.
        overwrite: replace it. contents: what this tool writes there.

    Raises:
        SparsekError: the folder cannot be made (no permission, disk full), or another `out` has
            appeared meanwhile: the finished folder then stays under the name that is told.
    """
    out = absolute(out)
    made = [parent for parent in out.parents if not parent.exists()]
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        sibling = make_beside(out)
    except OSError as error:
        _remove_empty(made)
        raise SparsekError(
            f"cannot write in {out.parent}: {error.strerror}",
            hint="check its permissions and free space, or choose another OUT",
        ) from error
    with held(sibling):
        try:
            # mkdtemp makes private folders; a checkpoint is as readable as any other new folder.
            sibling.chmod(0o777 & ~umask())
            with sigterm_interrupts():
                yield sibling
                if not take_name(sibling, out, contents, overwrite=overwrite):
                    raise _kept_elsewhere(sibling, out)
        except BaseException:
            shutil.rmtree(sibling, ignore_errors=True)
            _remove_empty(made)
            raise


def take_name(sibling: Path, out: Path, contents: Contents, *, overwrite: bool) -> bool:
    """Gives a finished folder its name; what stood there, if it may be replaced, is removed after.

    Args:
        sibling: beside `out`. out, contents, overwrite: as of `staged`.

    Returns:
        Whether `out` is now what `sibling` was; False: something else stands there.
    """
    if not (overwrite and out.is_dir() and not out.is_symlink() and any(out.iterdir())):
        try:
            # Over an empty folder this is one step, too; over anything else it fails.
            sibling.rename(out)
        except OSError:
            if os.path.lexists(out):
                return False
            raise
        return True
    if contents.foreign(out) is not None or contents.lacks(out) is not None:
        return False
    if exchange(sibling, out):
        _remove_replaced(sibling, out)
        return True
    _replace_in_two_steps(sibling, out)
    return True


def _remove_replaced(old: Path, out: Path) -> None:
    """Removes what was `out`; killed meanwhile, the next run knows it by its name and goes on.

    Under the name of a sibling such as OUT.part it would pass for something of others.
    """
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):  # no room for one more folder
            aside = make_beside(out, "old.")
            stack.enter_context(held(aside))
            old.rename(aside / out.name)
            old = aside
        shutil.rmtree(old, ignore_errors=True)


def _replace_in_two_steps(sibling: Path, out: Path) -> None:
    """Where names cannot be exchanged; killed between the steps, the next run puts `out` back."""
    aside = make_beside(out, "old.")
    with held(aside):
        out.rename(aside / out.name)
        try:
            sibling.rename(out)
        except BaseException:
            (aside / out.name).rename(out)
            aside.rmdir()
            raise
        shutil.rmtree(aside, ignore_errors=True)


def _kept_elsewhere(sibling: Path, out: Path) -> SparsekError:
    number = 1
    while os.path.lexists(kept := out.with_name(f"{out.name}-{number}")):
        number += 1
    sibling.rename(kept)
    return SparsekError(
        f"another '{out}' appeared meanwhile and is left alone: the finished model is in {kept}",
        hint="use it from there, or rename it",
    )


def _remove_empty(parents: list[Path]) -> None:
    for parent in parents:
        with contextlib.suppress(OSError):
            parent.rmdir()
