"""transformers' server as `sparsek serve` starts it: how it ends, and what it says it serves."""

import os
import signal
import subprocess
import sys
import types

import pytest
from patience import PATIENCE

from sparsek_cli.errors import SparsekError
from sparsek_cli.serving import module, transformers_server


@pytest.mark.parametrize("kind", ["refused", "broken", "ended while loading", "ended", "no"])
def test_transformers_server_ends_as_vllm_s_does(kind, monkeypatch, capsys):
    """In one line where we refuse or it is interrupted; its own errors keep their traceback."""
    handlers = {}

    class Server:
        config = types.SimpleNamespace(app=None)

        def run(self):
            handlers[signal.SIGTERM](signal.SIGTERM, None)  # as uvicorn, once it has ended

    def run(module, **options):
        assert module == "transformers.cli.transformers" and options["run_name"] == "__main__"
        if kind == "ended while loading":
            handlers[signal.SIGINT](signal.SIGINT, None)
        if kind == "ended":
            sys.modules["uvicorn"].Server().run()
        if kind in ("refused", "broken"):
            refused = SparsekError("no such attention", hint="leave it out")
            raise RuntimeError("did not load") from (refused if kind == "refused" else None)

    monkeypatch.setitem(sys.modules, "uvicorn", types.SimpleNamespace(Server=Server))
    monkeypatch.setattr(transformers_server, "guarded", lambda app: app)
    for name in ("draw_where_asked", "leave_prompts_open", "refuse_longer_prompts"):
        monkeypatch.setattr(transformers_server, name, lambda kind: None)
    monkeypatch.setattr(signal, "signal", handlers.__setitem__)
    monkeypatch.setattr(module.runpy, "run_module", run)
    try:
        code = transformers_server.main()
    except SystemExit as end:
        code = end.code
    said = capsys.readouterr().err.splitlines()
    if kind == "broken":
        assert said[0].startswith("Traceback") and len(said) > 4
        said = said[-2:]
    assert code == {"refused": 1, "broken": 1, "ended while loading": 130}.get(kind, 0)
    assert said == {
        "refused": ["error: no such attention", "hint: leave it out"],
        "broken": [
            "error: the server failed: RuntimeError: did not load",
            f"hint: {transformers_server.HINT}",
        ],
        "ended while loading": [
            "error: interrupted before it served", "hint: run the same command again"
        ],
    }.get(kind, [])  # fmt: skip


@pytest.mark.parametrize(
    "number, seconds", [(signal.SIGINT, transformers_server.PATIENCE), (signal.SIGTERM, None)]
)
def test_replies_are_cut_by_ctrl_c_and_not_by_a_restart(number, seconds, monkeypatch):
    """Who sends SIGTERM waits as long as it likes, and kills afterwards."""

    monkeypatch.setattr(transformers_server, "guarded", lambda app: app)

    class Server:
        config = types.SimpleNamespace(timeout_graceful_shutdown=None, app=None)
        ending = []

        def run(self):
            self.handle_exit(number, None)

        def handle_exit(self, sig, frame):
            self.ending.append(sig)

    server = transformers_server._watched(Server, [])()
    server.run()
    assert server.ending == [number] and server.config.timeout_graceful_shutdown == seconds


@pytest.mark.parametrize("code", [3, 0])
def test_a_port_that_another_took_while_the_model_was_read(code, monkeypatch, capsys):
    """uvicorn says it among its own words, and ends with 3."""
    monkeypatch.setattr(transformers_server, "guarded", lambda app: app)

    class Server:
        config = types.SimpleNamespace(app=None)

        def run(self):
            raise SystemExit(code)

    with pytest.raises(SystemExit):
        transformers_server._watched(Server, [])().run()
    said = ["error: the server ended before it served", f"hint: {transformers_server.UNHEARD}"]
    assert capsys.readouterr().err.splitlines() == (said if code else [])


def test_transformers_server_lists_the_model_that_it_serves(monkeypatch):
    """Not the hub's cache on this machine, without which it would fail."""
    from transformers.cli.serving.model_manager import ModelManager

    monkeypatch.setattr(ModelManager, "get_gen_models", ModelManager.get_gen_models)
    transformers_server._lists_what_it_serves(ModelManager)
    manager = ModelManager()
    manager.force_model = "converted"
    [listed] = manager.get_gen_models()
    assert listed["id"] == "converted" and listed["object"] == "model"


ENDED = """
import sys, threading, time
from sparsek_cli.serving import transformers_server as server

def main():
    threading.Thread(target=time.sleep, args=(600,)).start()
    print("the last words")
    {ending}

server.main = main
server._exit()
"""


@pytest.mark.parametrize("read", [True, False])
@pytest.mark.parametrize(
    "ending, code, last",
    [
        ("return 0", 0, None),
        ("raise SystemExit(3)", 3, None),
        ("raise RuntimeError('did not load')", 1, "RuntimeError: did not load"),
        ("raise KeyboardInterrupt", 1, "KeyboardInterrupt"),
    ],
)
def test_no_writer_of_a_reply_is_waited_for_however_it_ends(ending, code, last, read):
    process = subprocess.Popen(
        [sys.executable, "-c", ENDED.format(ending=ending)],
        # Written when it ends, and not where `main` prints.
        env={**os.environ, "PYTHONUNBUFFERED": ""},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        if not read:
            process.stdout.close()
            process.stderr.close()
        assert process.wait(timeout=PATIENCE) == code
    finally:
        process.kill()
        process.wait()
    if read:
        assert process.stdout.read() == "the last words\n"
        assert (process.stderr.read().splitlines() or [None])[-1] == last


def test_the_server_loads_its_model_with_stretched_positions(
    tmp_path, monkeypatch, sparse_model, tokenizer
):
    import torch
    from transformers.cli.serving.model_manager import ModelManager

    from sparsek_cli.hub import resolve
    from sparsek_cli.loading import load_model
    from sparsek_cli.serving import stretched

    sparse_model("llama").save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    monkeypatch.setattr(ModelManager, "_load_model", ModelManager._load_model)
    words = ["serve", "model", "--yarn", "4.0", "--dtype", "float32"]
    factor = stretched.take_factor(words)
    assert words == ["serve", "model", "--dtype", "float32"] and factor == 4
    assert stretched.take_factor(words) is None
    monkeypatch.chdir(tmp_path)
    ids = torch.arange(3, 33)[None]
    said = []
    for kind in ("own", "stretched"):
        if kind == "stretched":
            stretched.stretch_what_it_loads(ModelManager, factor)
        manager = ModelManager(device="cpu", dtype="float32", force_model="model")
        [loaded] = manager.loaded_models.values()
        said.append(loaded.model(ids).logits)
    options = {"device": torch.device("cpu"), "dtype": torch.float32}
    own, long = (load_model(resolve("model"), yarn=yarn, **options) for yarn in (None, factor))
    assert torch.equal(said[0], own(ids).logits) and torch.equal(said[1], long(ids).logits)
    assert not torch.allclose(said[0], said[1])
    assert loaded.model.config.max_position_embeddings == 4 * own.config.max_position_embeddings


def test_prompts_are_not_closed_before_they_are_completed(
    tmp_path, monkeypatch, sparse_model, tokenizer
):
    """The model was to go on after the end of a text."""
    from tokenizers import processors
    from transformers.cli.serving.model_manager import ModelManager

    from sparsek_cli.serving import guard

    sparse_model("llama").save_pretrained(tmp_path / "model")
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        "<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    tokenizer.save_pretrained(tmp_path / "model")
    monkeypatch.setattr(ModelManager, "_load_processor", ModelManager._load_processor)
    monkeypatch.chdir(tmp_path)
    read = []
    for _ in range(2):
        manager = ModelManager(device="cpu", dtype="float32", force_model="model")
        read.append(next(iter(manager.loaded_models.values())).processor("It was").input_ids)
        guard.leave_prompts_open(ModelManager)
    assert read[0] == [*read[1], 2] and read[1][0] == 1
