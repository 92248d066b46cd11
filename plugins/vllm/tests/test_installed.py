"""vLLM finds the plugin by its entry point, or is not there and the other tests are left out."""

from importlib.metadata import entry_points

import pytest
from sparsek_vllm import __main__ as supervisor
from sparsek_vllm import server

from sparsek_cli.errors import SparsekError
from sparsek_cli.serving import module

pytestmark = pytest.mark.core


def test_vllm_finds_the_plugin():
    pytest.importorskip("vllm", reason="vLLM is not installed here: run `make vllm-test`")
    [found] = entry_points(group="vllm.general_plugins", name="sparsek")
    found.load()()
    found.load()()  # vLLM may call it again in the same process
    from vllm import ModelRegistry

    assert "SparseKQwen3ForCausalLM" in ModelRegistry.get_supported_archs()


@pytest.mark.parametrize("kind", ["refused", "refused on the way", "interrupted", "broken"])
def test_a_server_that_does_not_start_says_why(kind, monkeypatch, capsys):
    """In one line where this package or the user ended it; vLLM's errors keep their traceback."""
    error = SparsekError("no such cache", hint="leave it out")
    ends = {"refused": error, "interrupted": KeyboardInterrupt()}

    def run(*asked, **options):
        if kind in ends:
            raise ends[kind]
        raise RuntimeError("engine failed") from (error if kind != "broken" else None)

    monkeypatch.setattr(module.runpy, "run_module", run)
    assert server.main() == (130 if kind == "interrupted" else 1)
    lines = capsys.readouterr().err.splitlines()
    told = ["error: no such cache", "hint: leave it out"]
    if kind == "broken":
        assert lines[0].startswith("Traceback") and len(lines) > 4
        lines = lines[-2:]
        told = ["error: the server failed: RuntimeError: engine failed", f"hint: {server.HINT}"]
    stopped = ["error: interrupted before it served", "hint: run the same command again"]
    assert lines == (stopped if kind == "interrupted" else told)


@pytest.mark.parametrize(
    "code, asked, shown, said",
    [
        (server.SERVED, True, 0, ""),
        (server.SERVED, False, 1, "error: vLLM's engine died"),
        (-9, False, 137, "error: vLLM's server was killed (SIGKILL)"),
        (-15, True, 143, ""),
        (0, False, 0, ""),  # --help
        (2, False, 2, ""),
    ],
)
def test_an_end_that_nobody_asked_for_is_an_error(code, asked, shown, said, capsys):
    assert supervisor.outcome(code, asked) == shown
    told = capsys.readouterr().err.splitlines()
    assert len(told) == (2 if said else 0) and (told or [""])[0].startswith(said)


def test_onednn_keeps_little_unless_told_otherwise(monkeypatch):
    monkeypatch.setattr(supervisor, "choice", lambda given: ({"LD_PRELOAD": "it"}, ""))
    name = "ONEDNN_PRIMITIVE_CACHE_CAPACITY"
    expected = {"HOME": "/root", name: "128", "LD_PRELOAD": "it"}
    assert supervisor.environment({"HOME": "/root"}) == expected
    assert supervisor.environment({name: "7"})[name] == "7"
