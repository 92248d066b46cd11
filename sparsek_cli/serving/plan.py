"""What `sparsek serve` will start: the server's command line, and what a request costs."""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sparsek_cli.converted import is_converted
from sparsek_cli.errors import UsageError
from sparsek_cli.hub import Checkpoint
from sparsek_cli.loading import check_tokenizer, load_config, load_tokenizer
from sparsek_cli.serving.engines import TRANSFORMERS, choose

# Flags of the servers that say what flags of ours say.
_OURS = {"--host": "--host", "--port": "--port", "--served-model-name": "MODEL", "--model": "MODEL"}


@dataclass(frozen=True)
class ServePlan:
    """One server, not yet started.

    Attributes:
        engine: `vllm` or `transformers`. why: why it is this one.
        model: what clients write as `model`. url: what they take as base URL.
        request_bytes: of one request's cache, whatever its length.
        command: to be run in place of this process.
    """

    engine: str
    why: str
    model: str
    url: str
    request_bytes: int
    command: tuple[str, ...]

    @property
    def requests_per_gib(self) -> int:
        """Requests whose caches one GiB holds."""
        return 2**30 // self.request_bytes

    def text(self) -> str:
        rows = [
            f"url      {self.url}",
            f"model    {self.model}",
            f"server   {self.engine} ({self.why})",
            f"cache    {self.request_bytes:,} bytes for each request, whatever its length: "
            f"{self.requests_per_gib:,} requests in 1 GiB",
        ]
        if self.engine == TRANSFORMERS:
            rows.append("limit    one request at a time: others wait")
        return "\n".join(rows)

    def data(self) -> dict[str, Any]:
        return {
            "engine": self.engine,
            "why": self.why,
            "model": self.model,
            "url": self.url,
            "request_bytes": self.request_bytes,
            "requests_per_gib": self.requests_per_gib,
            "command": list(self.command),
        }


def plan(
    checkpoint: Checkpoint,
    *,
    engine: str = "auto",
    host: str = "127.0.0.1",
    port: int = 8000,
    dtype: str | None = None,
    flags: Sequence[str] = (),
) -> ServePlan:
    """Chooses the server and writes its command line; starts nothing.

    Args:
        engine: `auto`, `vllm` or `transformers`.
        dtype: of weights and cache, or None for the checkpoint's.
        flags: handed on to the server as they are.

    Raises:
        UsageError: a dense model, no server, or a flag that says what one of ours says.
        SparsekError: no tokenizer that loads and fits.
    """
    config = checkpoint.config()
    if not is_converted(config):
        raise UsageError(
            f"{checkpoint.name} is dense: its cache grows with every token",
            hint=f"convert it first: sparsek convert {checkpoint.name}",
        )
    for flag in flags:
        ours = _OURS.get(flag.partition("=")[0])
        if ours is not None:
            raise UsageError(
                f"{flag.partition('=')[0]} is handed on to the server",
                hint=f"give {ours} before the --",
            )
    # What the server would say later, and not in one line.
    check_tokenizer(load_tokenizer(checkpoint), config["vocab_size"], checkpoint.name)
    name, why = choose(config, engine)
    path = str(checkpoint.path)
    if name == TRANSFORMERS:
        model = path
        command = [
            "-m", "transformers.cli.transformers", "serve", path, "--trust-remote-code",
            "--host", host, "--port", str(port),
        ]  # fmt: skip
    else:
        model = checkpoint.name
        command = [
            "-m", "sparsek_vllm", "--model", path, "--served-model-name", model,
            "--host", host, "--port", str(port),
        ]  # fmt: skip
    command += [] if dtype is None else ["--dtype", dtype]
    shown = f"[{host}]" if ":" in host else host
    return ServePlan(
        engine=name,
        why=why,
        model=model,
        url=f"http://{shown}:{port}/v1",
        request_bytes=_request_bytes(checkpoint, dtype),
        command=(sys.executable, *command, *flags),
    )


def _request_bytes(checkpoint: Checkpoint, dtype: str | None) -> int:
    import torch

    from sparsek_cli.models import sparsek_cache_bytes

    config = load_config(checkpoint.path, checkpoint.name)
    kept = dtype or config.dtype or "float32"
    return sparsek_cache_bytes(config, getattr(torch, str(kept).removeprefix("torch.")))


def start(plan: ServePlan, host: str, port: int) -> None:
    """Becomes the server: signals reach it directly, and nothing is left when it ends.

    Raises:
        UsageError: the address is taken, or is none of this machine.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except (OSError, OverflowError) as error:
            reason = getattr(error, "strerror", None) or str(error)
            raise UsageError(
                f"cannot listen on {host}:{port}: {reason}", hint="give another --port or --host"
            ) from error
    sys.stdout.flush()
    os.execv(plan.command[0], plan.command)
