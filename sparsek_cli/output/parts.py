"""Whether the parts of a converted folder are those that were written together."""

from pathlib import Path

from sparsek_cli.checkpoint_files.samples import check_samples
from sparsek_cli.checkpoint_files.seal import check_seal
from sparsek_cli.output.contents import SCORERS


def check_parts(folder: Path) -> None:
    """Nothing is known of a folder whose scorers are not in a file of their own.

    Raises:
        SparsekError: scorers are damaged, or fitted to another base than the one beside them.
    """
    if (folder / SCORERS).is_file():
        check_seal(folder / SCORERS)
        check_samples(folder)
