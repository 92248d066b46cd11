"""Texts of a dataset on the hub, by streaming."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

from sparsek_cli import hub
from sparsek_cli.data.text.columns import text_of
from sparsek_cli.errors import SparsekError, UsageError


def hub_rows(
    hub_id: str, name: str | None, split: str, column: str | None
) -> Iterator[dict[str, str]]:
    """Rows with the text of each document, as the key `text`, blank ones left out.

    Where the hub cannot be reached they are those of the cache.

    Raises:
        UsageError: no such configuration or split, or no text.
        SparsekError: the hub cannot be reached and the cache has no such dataset, or none is there.
    """
    from datasets import load_dataset

    there = hub.is_reachable(hub_id, "dataset")
    try:
        with nullcontext() if there else _cached_alone():
            rows = load_dataset(hub_id, name, split=split, streaming=True)
    except ValueError as error:  # unknown configuration or split; the message lists the known ones
        raise UsageError(
            f"dataset '{hub_id}': {str(error).splitlines()[0]}",
            hint="set 'name' and 'split' to ones it has",
        ) from error
    except Exception as error:
        if not there or hub.switch("dataset"):
            why, way = hub.no_way("dataset")
            raise SparsekError(
                f"{why} and dataset '{hub_id}' is not in the cache",
                hint=f"{way}, or name a local file or folder",
            ) from error
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


@contextmanager
def _cached_alone() -> Iterator[None]:
    """Within the block datasets come from the cache; the hub would be asked for half a minute."""
    from datasets import config

    before, config.HF_HUB_OFFLINE = config.HF_HUB_OFFLINE, True
    try:
        yield
    finally:
        config.HF_HUB_OFFLINE = before
