"""Whether the hub answers: asked once, within seconds, by way of a proxy where there is one."""

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer

import huggingface_hub
import pytest
from huggingface_hub import constants
from verbs import evaluate

from sparsek_cli.errors import SparsekError
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
    switches = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE")
    for name in (*switches, "HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
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


@pytest.mark.parametrize("switch", ["HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"])
def test_who_is_kept_from_asking_is_told_by_what(hub, recipe, console, switch):
    """It said that the hub does not answer, which had not been asked."""
    hub.setenv(switch, "1")
    with pytest.raises(SparsekError) as caught:
        evaluate(recipe(tasks=["gsm8k", "babilong"], data=None), console)
    assert f"gsm8k is not in the hub's cache, and {switch} keeps the hub" in caught.value.message
    assert caught.value.hint.startswith(f"unset {switch}, or else: where the hub answers: hf ")
    assert caught.value.hint.count("unset") == 1, "said once"


def test_a_silent_hub_is_told_apart_from_one_that_was_not_asked(hub, recipe, console):
    """And it is asked again the next time: after one run all others counted as offline."""
    import datasets

    hub.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    with pytest.raises(SparsekError, match="the Hugging Face hub cannot be reached") as caught:
        evaluate(recipe(tasks=["gsm8k"], data=None), console)
    assert "unset" not in caught.value.hint
    assert not constants.HF_HUB_OFFLINE and not datasets.config.HF_HUB_OFFLINE
