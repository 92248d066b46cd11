"""Where a server listens, and what clients call it."""

from __future__ import annotations

import ipaddress
import socket

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


def check(host: str, port: int) -> None:
    """Whether a server can listen there, now.

    Raises:
        UsageError: the address is taken, or is none of this machine.
    """
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
