"""Where a server listens, and what clients call it."""

from __future__ import annotations

import errno
import ipaddress
import socket
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from sparsek_cli.errors import UsageError

_HERE = {socket.AF_INET: "127.0.0.1", socket.AF_INET6: "::1"}


def url(host: str, port: int, *, encrypted: bool = False) -> str:
    """The base URL for clients; where `host` is every address, the one for this machine."""
    if listens_everywhere(host):
        host = _HERE[_family(host)]
    shown = f"[{host}]" if ":" in host else host
    return f"http{'s' if encrypted else ''}://{shown}:{port}/v1"


def listens_everywhere(host: str) -> bool:
    """Whether `host` stands for every address of this machine: 0.0.0.0, ::, and other spellings."""
    if not host:
        return True
    try:
        found = socket.getaddrinfo(host, None, flags=socket.AI_NUMERICHOST)
    except (OSError, ValueError):  # a name
        return False
    return ipaddress.ip_address(found[0][4][0]).is_unspecified


@contextmanager
def taken(host: str, port: int) -> Iterator[None]:
    """Holds an address where a server can listen now; also through `exec`, until it ends.

    A server listens once its model is read, and vLLM's would then share the port without a word, so
    that either answers. Another server that is started in this way is refused from now on. By an
    abstract Unix socket: it leaves no file and ends with its process. Only Linux has them, and not
    every sandbox: without them nothing is held.

    Raises:
        UsageError: the address is taken, or is none of this machine.
    """
    _check(host, port)
    if sys.platform != "linux":
        yield
        return
    with ExitStack() as until_exec:
        try:
            held = until_exec.enter_context(socket.socket(socket.AF_UNIX))
            held.bind(f"\0sparsek-serve-{port}")
            held.set_inheritable(True)
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                raise UsageError(
                    f"another `sparsek serve` has port {port}, or starts there",
                    hint="give another --port, or end that one first",
                ) from error
        yield


def _check(host: str, port: int) -> None:
    with socket.socket(_family(host)) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except (OSError, OverflowError, ValueError) as error:
            reason = getattr(error, "strerror", None) or str(error)
            raise UsageError(
                f"cannot listen on {host}:{port}: {reason}", hint="give another --port or --host"
            ) from error


def _family(host: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in host else socket.AF_INET
