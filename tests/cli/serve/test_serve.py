"""`sparsek serve` chooses a server, says what a request costs, and becomes that server."""

import json
import re
import shlex
import sys
from pathlib import Path

import pytest

from sparsek_cli.loading import weights
from sparsek_cli.serving import engines
from sparsek_cli.serving.flags import Flags

ROOT = Path(__file__).parents[3]


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
    assert shown.failed(2) and ".[serve]" in shown.err


def test_bytes_are_the_cache_s_in_the_dtype_that_the_server_is_told(sparsek, converted, installed):
    """The checkpoint is in float32, of which vLLM, left alone, makes 16-bit weights."""
    import torch
    from transformers import AutoConfig

    from sparsek_cli.models import sparsek_cache_bytes

    config = AutoConfig.from_pretrained(converted)
    for engine, given, kept in (
        ("vllm", [], torch.float32),
        ("vllm", ["--dtype", "bfloat16"], torch.bfloat16),
        ("transformers", [], torch.float32),
        ("transformers", ["--dtype", "float16"], torch.float16),
    ):
        installed(*ALL)
        words = ["serve", converted, "--engine", engine, "--dry-run", "--json", *given]
        plan = json.loads(sparsek(*words).out)
        exact, command = sparsek_cache_bytes(config, kept), plan["command"]
        assert exact <= plan["request_bytes"] < exact + (400 if engine == "vllm" else 1)
        assert plan["requests_per_gib"] == 2**30 // plan["request_bytes"]
        assert f"torch.{command[command.index('--dtype') + 1]}" == str(kept)


def test_it_says_what_keeps_the_server_s_memory_flat(sparsek, converted, installed, monkeypatch):
    installed(*ALL)
    import sparsek_vllm.allocator as allocator

    words = ["serve", converted, "--dry-run"]
    for said in ("what is free goes back", ""):
        monkeypatch.setattr(allocator, "choice", lambda given, said=said: ({}, said))
        assert ("memory   what is free goes back" in sparsek(*words).out) == bool(said)
        assert json.loads(sparsek(*words, "--json").out)["memory"] == (said or None)
    assert "memory  " not in sparsek(*words, "--engine", "transformers").out


def test_an_older_plugin_is_told_to_be_updated(sparsek, converted, installed, monkeypatch):
    """Without the file that this sparsek asks it was a ModuleNotFoundError."""
    installed(*ALL)
    monkeypatch.setitem(sys.modules, "sparsek_vllm.allocator", None)
    shown = sparsek("serve", converted, "--dry-run")
    assert shown.failed(2) and "sparsek-vllm is older" in shown.err and "update it" in shown.err
    assert sparsek("serve", converted, "--dry-run", "--engine", "transformers").code == 0


def test_a_checkpoint_that_names_no_dtype_is_served_in_that_of_its_weights(
    sparsek, converted, installed
):
    installed(*ALL)
    file = converted / "config.json"
    fields = json.loads(file.read_text())
    for named, kept in ((None, "float32"), ("half", "float16")):
        file.write_text(json.dumps({**fields, "dtype": named}))
        assert json.loads(sparsek("serve", converted, "--dry-run", "--json").out)["dtype"] == kept
    file.write_text(json.dumps({**fields, "dtype": "float64"}))
    shown = sparsek("serve", converted, "--dry-run")
    assert shown.failed(2) and "dtype is float64" in shown.err
    assert sparsek("serve", converted, "--dry-run", "--dtype", "bfloat16").code == 0


def test_a_server_may_tie_what_the_verbs_do_not(sparsek, converted, installed, caplog):
    """vLLM takes the input embedding for both; what was measured had the output's own."""
    installed(*ALL)
    weights._warn_untied.cache_clear()
    file = converted / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"tie_word_embeddings": True}))
    assert sparsek("serve", converted, "--dry-run").code == 0
    assert "input and output embeddings differ" in caplog.text


def test_what_stands_after_the_dashes_goes_to_the_server(sparsek, converted, installed):
    installed(*ALL)
    line = f"serve {shlex.quote(str(converted))} --port 8111 --json --dry-run -- --max-num-seqs 9"
    plan = json.loads(sparsek(*shlex.split(line)).out)
    assert plan["command"][-2:] == ["--max-num-seqs", "9"] and ":8111/" in plan["url"]
    shown = sparsek("serve", converted, "8111")
    assert shown.failed(2) and "come after --" in shown.err


@pytest.mark.parametrize(
    "words, told",
    [
        ("--port 1", "give --port before the --"),
        ("--dtype=float32", "give --dtype before the --"),
        ("--served_model_name x", "give MODEL before the --"),
        ("--served-model x", "give MODEL before the --"),  # vLLM takes beginnings of names
        ("--uds /tmp/socket", "leave --uds out"),
        ("--tensor-parallel-size many", "a number of GPUs"),
        ("-tp 3", "divides both"),
        ("--kv_cache_dtype fp8", "leave --kv-cache-dtype out"),
    ],
)
def test_flags_that_would_make_what_is_printed_untrue_are_refused(
    words, told, sparsek, converted, installed
):
    installed(*ALL)
    shown = sparsek("serve", converted, "--dry-run", "--", *words.split())
    assert shown.failed(2) and told in shown.err and not shown.out


def test_bytes_on_each_gpu_are_those_of_its_heads(sparsek, converted, installed):
    installed(*ALL)

    def planned(*flags):
        return json.loads(sparsek("serve", converted, "--dry-run", "--json", "--", *flags).out)

    alone = planned()
    for flags in (["-tp", "2"], ["-tp=2"], ["--tensor_parallel_size=2"], ["--tensor-par", "2"]):
        shared = planned(*flags)
        assert shared["ranks"] == 2 and shared["command"][-len(flags) :] == flags
        assert alone["request_bytes"] / 2 <= shared["request_bytes"] < alone["request_bytes"] * 0.6
    assert planned("-tp", "2", "-tp", "1")["request_bytes"] == alone["request_bytes"]
    shown = sparsek("serve", converted, "--dry-run", "--", "-tp", "2")
    assert "bytes on each of 2 GPUs" in shown.out and "in 1 GiB of each" in shown.out


@pytest.mark.parametrize(
    "words, why",
    [
        ("--config server.yaml", "--config: its file may hold any flag"),
        ("--hf-overrides.sparsek.topk 4", "--hf-overrides: it changes"),
        ("--no-enable-prefix-caching --enable_prefix_caching", "--enable-prefix-caching: further"),
    ],
)
def test_no_figure_where_nobody_can_know_it(words, why, sparsek, converted, installed):
    installed(*ALL)
    given = ["serve", converted, "--dry-run", "--", *words.split()]
    shown = sparsek(*given)
    assert shown.code == 0 and f"not known beforehand; {why}" in shown.out
    assert "GiB" not in shown.out
    plan = json.loads(sparsek(*given[:3], "--json", *given[3:]).out)
    assert plan["request_bytes"] is plan["requests_per_gib"] is None
    assert plan["bytes_unknown"].startswith(why)
    off = sparsek(*given[:4], "--enable-prefix-caching", "--no-enable-prefix-caching")
    assert "requests in 1 GiB" in off.out, "the last of them counts"


@pytest.mark.parametrize(
    "host, url",
    [
        ("0.0.0.0", "http://127.0.0.1:8000/v1"),
        ("0", "http://127.0.0.1:8000/v1"),
        ("::", "http://[::1]:8000/v1"),
        ("0:0:0:0:0:0:0:0", "http://[::1]:8000/v1"),
    ],
)
def test_every_address_is_no_address_for_clients(host, url, sparsek, converted, installed):
    installed(*ALL)
    shown = sparsek("serve", converted, "--dry-run", "--host", host)
    assert url in shown.out and "on every address of this machine" in shown.out
    shown = sparsek("serve", converted, "--dry-run", "--host", "::1")
    assert "http://[::1]:8000/v1" in shown.out and "every address" not in shown.out


@pytest.mark.parametrize("host", ["", " "])
def test_an_empty_host_is_a_variable_that_is_not_set(host, sparsek, converted, installed):
    """And was every address of this machine, for anybody to reach."""
    installed(*ALL)
    shown = sparsek("serve", converted, "--dry-run", "--host", host)
    assert shown.failed(2) and "--host is empty" in shown.err and not shown.out
    assert sparsek("serve", converted, "--dry-run", "--host", "0.0.0.0").code == 0


def test_a_server_with_a_certificate_speaks_https(sparsek, converted, installed):
    installed(*ALL)
    flags = ["--ssl-keyfile", "key.pem", "--ssl-certfile", "cert.pem"]
    assert "https://127.0.0.1" in sparsek("serve", converted, "--dry-run", "--", *flags).out


def test_paths_that_transformers_server_would_misread_are_refused(
    sparsek, converted, installed, tmp_path, monkeypatch
):
    """It looked on the hub for the first half of them, and ended in a traceback."""
    installed(*ALL)
    line = ["--engine", "transformers", "--dry-run"]
    (tmp_path / "me@home").mkdir()
    inside = converted.rename(tmp_path / "me@home" / "model")
    shown = sparsek("serve", inside, *line)
    assert shown.failed(2) and "takes what follows @" in shown.err
    assert f"cd {inside.parent}, and name model" in shown.err
    monkeypatch.chdir(inside.parent)
    assert sparsek("serve", "./model", *line).code == 0  # as hinted
    assert sparsek("serve", inside, "--engine", "vllm", "--dry-run").code == 0
    monkeypatch.chdir(tmp_path)
    for name, mark in (("a@b", "@"), ("a:b.gguf", ":")):
        inside = inside.rename(tmp_path / name)
        shown = sparsek("serve", f"./{name}", *line)
        assert shown.failed(2) and f"takes what follows {mark}" in shown.err
        assert f"rename the folder '{name}'" in shown.err


def test_of_a_flag_given_twice_the_last_one_counts():
    assert Flags(["-tp", "4", "--tensor-parallel-size", "2"]).ranks == 2
    assert Flags(["--", "--max-model-len", "9"]).ranks == 1


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


def test_doctor_says_which_server_would_run(installed):
    from sparsek_cli.diagnosis import installation

    installed(*ALL)
    assert [row.detail for row in installation.server(None)] == ["vllm: installed, with its plugin"]
    installed()
    [row] = installation.server(None)
    assert row.ok is None and row.detail.startswith(
        "optional, for serving; none: no server can run"
    )


def test_without_a_server_the_hint_serves_who_has_no_checkout(sparsek, converted, installed):
    installed()
    shown = sparsek("serve", converted)
    assert shown.code == 2 and "hint: pip install 'transformers[serving]'" in shown.err


README = ROOT / "README.md"


def test_the_readme_s_block_serves(sparsek, converted, installed, monkeypatch):
    """The version that it installs, the command, and the request that it sends."""
    (block,) = re.findall(r"```sh\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    install, *_, serve, request = block.replace("\\\n", " ").strip().splitlines()
    (version,) = re.findall(r"vllm==(\S+)", install)
    plugin = (README.parent / "plugins/vllm/README.md").read_text(encoding="utf-8")
    assert set(re.findall(r"vllm(?:-cpu)?==(\S+?)[`\s]", plugin)) == {version}
    for place in re.findall(r"-e (\S+)", install):
        assert (README.parent / place / "pyproject.toml").is_file()
    installed(*ALL)
    words = shlex.split(serve)
    converted = converted.rename(converted.with_name(words[2]))
    monkeypatch.chdir(converted.parent)
    asked = shlex.split(request)
    sent = json.loads(asked[asked.index("-d") + 1])
    assert {"prompt", "max_tokens"} < set(sent)
    for engine in engines.ENGINES:
        line = [*words[1:], "--dry-run", "--json", "--engine", engine]
        plan = json.loads(sparsek(*line).out)
        assert asked[:2] == ["curl", f"{plan['url']}/completions"]
        assert sent["model"] == plan["model"], engine
    # From elsewhere transformers' server knows it by its path.
    monkeypatch.chdir("/")
    plan = json.loads(sparsek("serve", converted, *line[2:]).out)
    assert plan["model"] == str(converted) == plan["command"][4]


def test_every_text_installs_vllm_as_the_readme_does():
    """And what make installs for the tests, which are what was seen to work."""
    texts = ("README.md", "plugins/vllm/README.md", "docs/guides/serving.md", "Makefile")
    said = {}
    for name in texts:
        text = (ROOT / name).read_text(encoding="utf-8")
        (beside,) = re.findall(
            r"install (?:--quiet --no-compile )?(?:vllm==\S+|\$\(VLLM\))((?: [a-z]+)+)", text
        )
        (removed,) = re.findall(r"uninstall (?:--quiet --yes )?((?:torch\w+ ?)+)", text)
        said[name] = {*beside.split()} - {"pytest"}, {*removed.split()}
    assert len({str(sorted(map(sorted, both))) for both in said.values()}) == 1, said


def test_prompts_that_are_closed_before_they_are_completed_are_told(
    sparsek, converted, installed, tokenizer
):
    """transformers' server is ours to mend, vLLM's reads the tokenizer by itself."""
    from tokenizers import processors

    installed(*ALL)
    words = ["serve", converted, "--dry-run"]
    assert "prompts " not in sparsek(*words).out
    ends = [("<s>", 1), ("</s>", 2)]
    for closed, repair in (("<s> $A </s>", True), ("bert", False)):
        tokenizer.backend_tokenizer.post_processor = (
            processors.TemplateProcessing(closed, special_tokens=ends)
            if repair
            else processors.BertProcessing(ends[1], ends[0])
        )
        tokenizer.save_pretrained(converted)
        shown = sparsek(*words)
        assert "prompts  of /v1/completions get </s> behind them" in shown.out
        assert json.loads(sparsek(*words, "--json").out)["closing_tokens"] == ["</s>"]
        shown = sparsek(*words, "--engine", "transformers")
        assert shown.code == (0 if repair else 1) and "behind them" not in shown.out
        assert ("add_eos_token" in shown.err) == (not repair)
