"""Whether the hub answers: asked once, within seconds, by way of a proxy where there is one."""

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer

import huggingface_hub
import pytest
from huggingface_hub import constants

from sparsek_cli.evaluation.tasks.hub_data import hub_answers


class Proxy(BaseHTTPRequestHandler):
    def do_HEAD(self) -> None:
        self.send_response(200)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """A hub of a name that nobody knows."""
    for name in ("HF_HUB_OFFLINE", "HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://hub.invalid")
    huggingface_hub.close_session()
    yield monkeypatch
    huggingface_hub.close_session()


def test_a_hub_that_nobody_knows_does_not_answer(hub):
    assert not hub_answers()


def test_a_hub_behind_a_proxy_answers(hub):
    server = HTTPServer(("127.0.0.1", 0), Proxy)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    hub.setenv("HTTP_PROXY", f"http://127.0.0.1:{server.server_port}")
    try:
        assert hub_answers()
    finally:
        server.shutdown()
        server.server_close()


def test_nobody_asks_where_the_environment_says_offline(hub):
    hub.setenv("HF_HUB_OFFLINE", "1")
    assert not hub_answers()
