"""Texts of a dataset on the hub, by streaming."""

from collections.abc import Iterator

from sparsek_cli.data.text.columns import text_of
from sparsek_cli.errors import SparsekError, UsageError


def hub_rows(
    hub_id: str, name: str | None, split: str, column: str | None
) -> Iterator[dict[str, str]]:
    from datasets import load_dataset

    try:
        rows = load_dataset(hub_id, name, split=split, streaming=True)
    except ValueError as error:  # unknown configuration or split; the message lists the known ones
        raise UsageError(
            f"dataset '{hub_id}': {str(error).splitlines()[0]}",
            hint="set 'name' and 'split' to ones it has",
        ) from error
    except Exception as error:
        raise SparsekError(
            f"dataset '{hub_id}' cannot be read from the hub: {str(error).splitlines()[0]}",
            hint="check the id and the network, or name a local file or folder",
        ) from error
    empty = True
    for row in rows:
        text = text_of(row, column, hub_id)
        if text.strip():
            empty = False
            yield {"text": text}
    if empty:
        raise UsageError(f"dataset '{hub_id}' ({split}) holds no text", hint="try another split")
