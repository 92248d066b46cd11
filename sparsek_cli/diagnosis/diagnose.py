"""All that `sparsek doctor` looks at; no check can stop the others."""

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from sparsek_cli.diagnosis.check import REPORT_IT, Check
from sparsek_cli.diagnosis.installation import devices, server, shadowing, versions
from sparsek_cli.diagnosis.kernels import attention, backend, operator
from sparsek_cli.diagnosis.model import model
from sparsek_cli.errors import SparsekError

if TYPE_CHECKING:
    import torch

    from sparsek_cli.hub import Checkpoint


def diagnose(
    checkpoint: "Checkpoint | None", device: "torch.device", dtype: "torch.dtype"
) -> Iterator[Check]:
    """All checks, cheap ones first."""
    yield from _guarded("versions", versions)
    yield from _guarded("shadowing", shadowing)
    yield from _guarded("devices", devices)
    yield from _guarded("backend", lambda: backend(device, dtype))
    yield from _guarded("server", lambda: server(checkpoint))
    yield from _guarded("operator", lambda: operator(device))
    yield from _guarded("attention", lambda: attention(device))
    if checkpoint is not None:
        yield from _guarded("model", lambda: model(checkpoint, device))


def _guarded(name: str, check: Callable[[], Iterator[Check]]) -> Iterator[Check]:
    try:
        yield from check()
    except SparsekError as error:
        yield Check(name, False, error.message, error.hint)
    except Exception as error:
        # A broken installation fails in ways nobody foresaw; that is what doctor is asked about.
        first = (str(error).splitlines() or [""])[0]
        hint = (
            "reinstall sparsek and what it needs" if isinstance(error, ImportError) else REPORT_IT
        )
        yield Check(name, False, f"{type(error).__name__}: {first}", hint)
