"""All that `sparsek doctor` looks at; no check can stop the others."""

from collections.abc import Callable, Iterator

from sparsek_cli.devices import choose_device, choose_dtype
from sparsek_cli.diagnosis.check import REPORT_IT, Check
from sparsek_cli.diagnosis.installation import devices, pytorch, server, shadowing, versions
from sparsek_cli.diagnosis.kernels import attention, backend, operator
from sparsek_cli.errors import SparsekError


def diagnose(
    model: str | None,
    *,
    revision: str | None = None,
    device: str | None = None,
    dtype: str | None = None,
    say: Callable[[str], None],
) -> Iterator[Check]:
    """All checks, each as soon as it is known: first what needs no import, a model last.

    A name is looked up before all else: one that means nothing is refused without a row.

    Args:
        model: its name, as `hub.resolve` takes it. revision: of a hub model.
        device, dtype: as flags say them.
        say: hears what takes seconds, before it begins.

    Raises:
        UsageError: the model, the device or the dtype means nothing.
        SparsekError: the hub could not be reached, or refused.
    """
    checkpoint = None
    if model is not None:
        from sparsek_cli import hub

        checkpoint = hub.resolve(model, revision)
    yield from _guarded("versions", versions)
    yield from _guarded("shadowing", shadowing)
    say("loading PyTorch")
    broken = [*_guarded("pytorch", pytorch)]
    yield from broken
    if broken:
        return
    where = choose_device(device)
    precision = choose_dtype(dtype, where)
    yield from _guarded("devices", devices)
    yield from _guarded("backend", lambda: backend(where, precision))
    yield from _guarded("server", lambda: server(checkpoint))
    say(f"checking the kernels on {where}")
    yield from _guarded("operator", lambda: operator(where))
    yield from _guarded("attention", lambda: attention(where))
    if checkpoint is not None:
        from sparsek_cli.diagnosis.model import model as check_model

        say(f"loading and checking {checkpoint.name}")
        yield from _guarded("model", lambda: check_model(checkpoint, where))


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
