"""Hub datasets of lm-eval's tasks: from --data DIR, the hub's cache or the hub; never a hang.

A dataset repository `owner/name` that lies in DIR/owner/name, as `hf download --repo-type dataset
owner/name --local-dir DIR/owner/name` puts it there, is read in place of the hub's.
"""

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

from sparsek_cli import hub
from sparsek_cli.evaluation.tasks.catalogue import Entry

HUB_PATIENCE = 3.0  # seconds to find out whether the hub answers


def needs_hub(entry: Entry, data: str | None) -> bool:
    """Whether the hub may be asked for a task's data."""
    return entry.builtin or (entry.data.startswith("hub") and data is None)


def hub_answers() -> bool:
    """Whether the Hugging Face hub can be reached, found out within seconds; by way of a proxy."""
    if hub.switch():
        return False
    from huggingface_hub import constants, get_session

    try:
        get_session().head(constants.ENDPOINT, timeout=HUB_PATIENCE)
    except Exception:  # of the HTTP client
        return False
    return True


def without_hub(entries: Iterable[Entry], data: str | None) -> AbstractContextManager[None]:
    """Around a run: where the hub does not answer and would be asked, nobody tries again."""
    if any(needs_hub(entry, data) for entry in entries) and not hub_answers():
        return hub.offline()
    return nullcontext()


@contextmanager
def redirected(folder: str | None) -> Iterator[list[str]]:
    """Within the block `datasets.load_dataset` reads repositories that lie under `folder` there.

    Yields:
        The names of the repositories asked for and not found there, as they come.
    """
    import datasets

    load, asked = datasets.load_dataset, []

    def load_dataset(path: str, *args: Any, **kwargs: Any) -> Any:
        local = Path(folder) / path if folder is not None else None
        if local is not None and local.is_dir():
            kwargs.pop("trust_remote_code", None)  # a folder of data has no code
            return load(str(local), *args, **kwargs)
        asked.append(path)
        return load(path, *args, **kwargs)

    datasets.load_dataset = load_dataset
    try:
        yield asked
    finally:
        datasets.load_dataset = load


def how_to_place(repository: str) -> str:
    """What to do about a dataset repository that is neither local, nor cached, nor reachable."""
    return (
        f"where the hub answers: hf download --repo-type dataset {repository} --local-dir "
        f"DIR/{repository}; then --data DIR here"
    )
