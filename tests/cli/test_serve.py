"""`sparsek serve` chooses a server, says what a request costs, and becomes that server."""

import json
import re
import shlex
import socket
import sys
import types
from pathlib import Path

import pytest

from sparsek_cli.serving import engines
from sparsek_cli.serving import plan as serving


@pytest.fixture
def converted(dense_model, tokenizer, tmp_path):
    from transformers import AutoModelForCausalLM

    from sparsek_cli.models import sparsek_config_from

    config = sparsek_config_from(dense_model("llama").config, {"topk": 8, "window": 8, "sinks": 2})
    folder = tmp_path / "converted"
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def installed(monkeypatch):
    """`installed("vllm", ...)`: these packages are there, and no other that serves."""
    packages = ("vllm", "sparsek_vllm", *engines._SERVER_PARTS)
    real = engines.importlib.util.find_spec

    def install(*names):
        def find_spec(name, *rest):
            return (object() if name in names else None) if name in packages else real(name, *rest)

        monkeypatch.setattr(engines.importlib.util, "find_spec", find_spec)
        plugin = types.SimpleNamespace(FAMILIES=("llama", "qwen3"))
        monkeypatch.setitem(sys.modules, "sparsek_vllm", plugin)

    return install


ALL = ("vllm", "sparsek_vllm", *engines._SERVER_PARTS)


def test_vllm_where_its_plugin_is_and_transformers_elsewhere(sparsek, converted, installed):
    installed(*ALL)
    plan = json.loads(sparsek("serve", converted, "--dry-run", "--json").out)
    assert plan["engine"] == "vllm" and plan["model"] == "converted"
    assert plan["url"] == "http://127.0.0.1:8000/v1"
    assert plan["command"][1:5] == ["-m", "sparsek_vllm", "--model", str(converted)]
    installed("vllm", *engines._SERVER_PARTS)
    shown = sparsek("serve", converted, "--dry-run")
    assert "plugin sparsek-vllm is not installed" in shown.out, "it says why it is not vLLM"
    assert "one request at a time" in shown.out
    installed()
    shown = sparsek("serve", converted, "--dry-run")
    assert shown.failed(2) and "sparsek[serve]" in shown.err


def test_bytes_are_the_cache_s(sparsek, converted, installed):
    from transformers import AutoConfig

    from sparsek_cli.models import sparsek_cache_bytes

    installed(*ALL)
    plan = json.loads(sparsek("serve", converted, "--dry-run", "--json", "--dtype", "float32").out)
    import torch

    expected = sparsek_cache_bytes(AutoConfig.from_pretrained(converted), torch.float32)
    assert plan["request_bytes"] == expected
    assert plan["requests_per_gib"] == 2**30 // expected


def test_what_stands_after_the_dashes_goes_to_the_server(sparsek, converted, installed):
    installed(*ALL)
    line = f"serve {shlex.quote(str(converted))} --port 8111 --json --dry-run -- --max-num-seqs 9"
    plan = json.loads(sparsek(*shlex.split(line)).out)
    assert plan["command"][-2:] == ["--max-num-seqs", "9"] and ":8111/" in plan["url"]
    shown = sparsek("serve", converted, "--", "--port", "1")
    assert shown.failed(2) and "give --port before the --" in shown.err
    shown = sparsek("serve", converted, "8111")
    assert shown.failed(2) and "come after --" in shown.err


@pytest.mark.parametrize(
    "change, words",
    [
        ({"model_type": "sparsek_gpt2"}, "not gpt2"),
        ({"sparsek": {"gate": "log"}}, "gate log"),
        ({"sparsek": {"scorer": {"type": "random"}}}, "random scores"),
        ({"quantization_config": {"quant_method": "fp8"}}, "quantised weights"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "mix layers"),
    ],
)
def test_what_the_plugin_cannot_serve_goes_to_transformers(change, words, installed):
    installed(*ALL)
    config = {"model_type": "sparsek_llama", "sparsek": {}}
    assert engines.choose(config)[0] == "vllm"
    name, why = engines.choose({**config, **change})
    assert name == "transformers" and words in why
    with pytest.raises(Exception, match=words):
        engines.choose({**config, **change}, "vllm")


def test_a_dense_model_is_refused_and_the_hint_works(sparsek, dense_checkpoint, installed):
    installed(*ALL)
    shown = sparsek("serve", dense_checkpoint(), "--dry-run")
    assert shown.failed(2) and "is dense" in shown.err and "sparsek convert" in shown.err
    assert sparsek("serve", "nothing-here").failed(2)
    assert sparsek("serve", "tiny", "--engine", "triton").failed(2)


def test_it_becomes_the_server_unless_the_port_is_taken(sparsek, converted, installed, monkeypatch):
    installed(*ALL)
    became = []
    monkeypatch.setattr(serving.os, "execv", lambda *call: became.append(call))
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        shown = sparsek("serve", converted, "--port", port)
        assert shown.failed(2) and "--port" in shown.err and not became
    shown = sparsek("serve", converted, "--port", port)
    assert shown.code == 0 and f"127.0.0.1:{port}" in shown.out and "requests in 1 GiB" in shown.out
    [(program, command)] = became
    assert program == command[0] == sys.executable and str(port) in command


def test_doctor_says_which_server_would_run(installed):
    from sparsek_cli import diagnosis

    installed(*ALL)
    assert [row.detail for row in diagnosis.server(None)] == ["vllm: installed, with its plugin"]
    installed()
    [row] = diagnosis.server(None)
    assert row.ok is None and row.detail.startswith("none: no server can run")


README = Path(__file__).parents[2] / "README.md"


def test_the_readme_s_block_serves(sparsek, converted, installed, monkeypatch):
    """The version that it installs, the command, and the request that it sends."""
    (block,) = re.findall(r"```sh\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    install, serve, request = block.replace("\\\n", " ").strip().splitlines()
    (version,) = re.findall(r"vllm==(\S+)", install)
    plugin = (README.parent / "plugins/vllm/README.md").read_text(encoding="utf-8")
    assert set(re.findall(r"vllm(?:-cpu)?==(\S+?)[`\s]", plugin)) == {version}
    for place in re.findall(r"-e (\S+)", install):
        assert (README.parent / place / "pyproject.toml").is_file()
    installed(*ALL)
    words = shlex.split(serve)
    converted = converted.rename(converted.with_name(words[2]))
    monkeypatch.chdir(converted.parent)
    plan = json.loads(sparsek(*words[1:], "--dry-run", "--json").out)
    words = shlex.split(request)
    assert words[:2] == ["curl", f"{plan['url']}/completions"]
    sent = json.loads(words[words.index("-d") + 1])
    assert sent["model"] == plan["model"] and {"prompt", "max_tokens"} < set(sent)
