"""Documents as one stream, wherever their text lies."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from sparsek_cli.data.text.find_files import find_files, is_hub_id
from sparsek_cli.data.text.hub_rows import hub_rows
from sparsek_cli.data.text.read_files import file_rows


def iterate_texts(
    spec: str | Path | Sequence[str | Path],
    *,
    name: str | None = None,
    split: str = "train",
    column: str | None = None,
) -> Iterator[str]:
    """The texts of documents, in a fixed order, blank ones left out.

    A .txt, .md or .py file is one document; each row of a .jsonl or .parquet file is one.

    Args:
        spec: files, folders (searched below), globs, or one hub dataset id "owner/name".
        name, split: configuration and split of a hub dataset.
        column: column that holds the text; default "text".

    Raises:
        UsageError: nothing there, unknown file type, no such column, or not UTF-8. What is wrong
            with the contents is raised when the document is reached.
        SparsekError: the hub cannot be reached.
    """
    if is_hub_id(spec):
        rows = hub_rows(hub_id=str(spec), name=name, split=split, column=column)
    else:
        rows = file_rows(files=tuple(map(str, find_files(spec))), column=column)
    for row in rows:
        yield row["text"]
