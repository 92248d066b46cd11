"""Whether the parts of a converted folder are those that were written together."""

from pathlib import Path

from sparsek_cli.checkpoint_files.samples import check_samples
from sparsek_cli.checkpoint_files.seal import check_seal
from sparsek_cli.output.contents import SCORERS
from sparsek_cli.output.written_config import say_changes


def check_parts(folder: Path) -> None:
    """Of a folder that says what was written in it; a changed config is warned of.

    Raises:
        SparsekError: scorers are damaged, or weights are others than those that were written.
    """
    if (folder / SCORERS).is_file():
        check_seal(folder / SCORERS)
    check_samples(folder)
    say_changes(folder)
