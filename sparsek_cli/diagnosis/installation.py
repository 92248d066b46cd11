"""What is installed: versions, names in the way, devices, servers."""

import importlib
import importlib.metadata
import importlib.util
import platform
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from sparsek_cli.diagnosis.check import Check

if TYPE_CHECKING:
    from sparsek_cli.hub import Checkpoint

PACKAGES = (
    "torch",
    "triton",
    "transformers",
    "safetensors",
    "huggingface_hub",
    "datasets",
    "lm_eval",
    "accelerate",
    "peft",
)
# Optional where the platform has none; the PyTorch backend does without.
OPTIONAL = ("triton",)


def versions() -> Iterator[Check]:
    """Python, sparsek and the libraries that matter, without importing them."""
    from sparsek_cli import __version__

    yield Check("sparsek", None, f"{__version__} in {Path(__file__).parents[1]}")
    yield Check("python", None, f"{platform.python_version()} on {platform.platform()}")
    for package in PACKAGES:
        try:
            yield Check(package, None, importlib.metadata.version(package))
        except importlib.metadata.PackageNotFoundError:
            missing = package not in OPTIONAL
            yield Check(
                package,
                False if missing else None,
                "not installed",
                f"pip install {package}" if missing else "",
            )


def shadowing() -> Iterator[Check]:
    """Hugging Face's package `kernels` must not resolve into our source tree."""
    ours = Path(__file__).resolve().parents[2] / "kernels"
    spec = importlib.util.find_spec("kernels")
    if spec is None:
        yield Check("shadowing", True, "no package `kernels`: nothing to mix up")
    elif spec.origin is None:
        # A folder without __init__.py on the path; transformers knows that this is no package.
        yield Check("shadowing", True, "`kernels` is a plain folder on the path, not a package")
    else:
        inside = Path(spec.origin).resolve().is_relative_to(ours)
        yield Check(
            "shadowing",
            not inside,
            f"`kernels` is {spec.origin}",
            f"remove {ours / '__init__.py'}: that folder is a source root, not a package",
        )


def pytorch() -> Iterator[Check]:
    """Imports it. No row where it can be; else all that is left to check would fail alike."""
    import torch  # noqa: F401

    yield from ()


def devices() -> Iterator[Check]:
    """What PyTorch can compute on."""
    import torch

    yield Check("cpu", None, f"{platform.machine()}, {torch.get_num_threads()} threads")
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        memory = properties.total_memory / 2**30
        yield Check(
            f"cuda:{index}",
            None,
            f"{properties.name}, {memory:.0f} GiB, sm_{properties.major}{properties.minor}",
        )
    if torch.backends.mps.is_available():
        yield Check("mps", None, "Apple GPU, not used: no float64")


def server(checkpoint: "Checkpoint | None") -> Iterator[Check]:
    """What `sparsek serve` would start here, or what it lacks: no failure, it is optional."""
    from sparsek_cli.converted import is_converted
    from sparsek_cli.errors import UsageError
    from sparsek_cli.serving.engines import choose

    config = None if checkpoint is None else checkpoint.config()
    try:
        name, why = choose(config if config is not None and is_converted(config) else None)
        yield Check("server", None, f"{name}: {why}")
    except UsageError as error:
        yield Check("server", None, f"optional, for serving; none: {error.message}")
