"""The address that a server is to listen on: free, and held until it does."""

import errno
import socket
import subprocess
import sys

import pytest
from patience import PATIENCE

from sparsek_cli.serving import address, engines
from sparsek_cli.serving import plan as serving


def test_it_becomes_the_server_unless_the_port_is_taken(
    sparsek, converted, all_installed, monkeypatch
):
    became = []
    monkeypatch.setattr(serving.os, "execv", lambda *call: became.append(call))
    moved = []
    monkeypatch.setattr(serving.os, "dup2", lambda *call: moved.append(call))
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        for more in ([], ["--json"]):
            shown = sparsek("serve", converted, "--port", port, *more)
            assert shown.failed(2) and "--port" in shown.err and not became
            assert not shown.out, "a result that is none"
    shown = sparsek("serve", converted, "--port", port)
    assert shown.code == 0 and f"127.0.0.1:{port}" in shown.out and "requests in 1 GiB" in shown.out
    [(program, command)] = became
    assert program == command[0] == sys.executable and str(port) in command
    assert moved == [(2, 1)], "what the server says goes to stderr, or --json would be no JSON"


@pytest.mark.skipif(sys.platform != "linux", reason="abstract sockets are Linux's")
def test_a_server_that_does_not_listen_yet_has_its_port(
    sparsek, converted, all_installed, monkeypatch
):
    """For 20 s a second one was started on it, and then shared it where both run vLLM."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    becomes = f"""
import os, sys
from sparsek_cli.serving import address
with address.taken("127.0.0.1", {port}):
    os.execv(sys.executable, [sys.executable, "-c", "print(1, flush=True); input()"])
"""
    loading = subprocess.Popen(
        [sys.executable, "-c", becomes], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert loading.stdout.readline() == "1\n"
    became = []
    monkeypatch.setattr(serving, "start", became.append)
    for engine in engines.ENGINES:
        line = ["serve", converted, "--port", port, "--engine", engine]
        shown = sparsek(*line)
        assert shown.failed(2) and f"another `sparsek serve` has port {port}" in shown.err
        assert "another --port" in shown.err and not shown.out and not became
    loading.communicate("\n", timeout=PATIENCE)
    assert sparsek(*line).code == 0 and became


@pytest.mark.skipif(sys.platform != "linux", reason="abstract sockets are Linux's")
def test_a_sandbox_without_unix_sockets_is_no_other_server(monkeypatch):
    class Sandboxed(socket.socket):
        def __init__(self, family=socket.AF_INET, *rest, **named):
            if family == socket.AF_UNIX:
                raise PermissionError(errno.EPERM, "Operation not permitted")
            super().__init__(family, *rest, **named)

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    monkeypatch.setattr(address.socket, "socket", Sandboxed)
    with address.taken("127.0.0.1", port):
        pass
