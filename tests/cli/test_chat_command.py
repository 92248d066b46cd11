"""`sparsek chat` from the outside: one-shot answers, bad inputs, and a real terminal."""

import json
import os
import pty
import select
import signal
import sys
import time
from typing import NoReturn

import pytest
import torch
from patience import PATIENCE

import sparsek_cli as api
from sparsek_cli.app import main


@pytest.fixture
def model(dense_checkpoint):
    return dense_checkpoint()


@pytest.fixture(autouse=True)
def _no_terminal(monkeypatch):
    import io

    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"")))


def pipe(monkeypatch, content: bytes):
    import io

    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))


def test_prompt_answers_once_and_stdout_is_only_the_answer(sparsek, model):
    shown = sparsek("chat", model, "--prompt", "Hi?", "--max-new-tokens", "5", "--device", "cpu")
    assert shown.code == 0
    assert shown.out.endswith("\n")
    assert shown.err.startswith(f"loading {model.name}\n"), "seconds of imports follow"
    assert "dense model" in shown.err and "tokens" in shown.err
    assert "the reply was cut at 5 tokens (--max-new-tokens)\n" in shown.err
    again = sparsek("chat", model, "--prompt", "Hi?", "--max-new-tokens", "5", "-q")
    assert again.out == shown.out and again.err == ""


def test_pipe_and_document(sparsek, model, monkeypatch, tmp_path):
    (tmp_path / "doc.txt").write_text("The code is 42.", encoding="utf-8")
    pipe(monkeypatch, b"What is the code?\n")
    shown = sparsek(
        "chat", model, "--load", tmp_path / "doc.txt", "--max-new-tokens", "3", "--json"
    )
    data = json.loads(shown.out)
    assert shown.code == 0 and data["reply_tokens"] <= 3 and data["context_tokens"] > 30
    assert data["kv_bytes"] == data["dense_kv_bytes"] > 0


def test_a_context_beyond_the_model_s_own_is_told_and_the_hint_works(
    sparsek, converted, tmp_path, monkeypatch
):
    config = json.loads((converted / "config.json").read_text())
    (converted / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 64}))
    (tmp_path / "doc.txt").write_text("The code is 42. " * 12, encoding="utf-8")
    line = ["chat", converted, "--load", tmp_path / "doc.txt", "--prompt", "Code?"]
    line += ["--max-new-tokens", "3", "--device", "cpu"]
    shown = sparsek(*line)
    said = "longer than the 64 tokens that this model was made for; if it reads badly, start with "
    assert shown.code == 0 and said in shown.err
    factor = shown.err.split(said)[1].split()[1]
    stretched = sparsek(*line, "--yarn", factor)
    assert stretched.code == 0 and "made for" not in stretched.err
    assert int(factor) >= 2 and stretched.out != shown.out
    assert sparsek(*line, "--yarn", "1").failed(2)
    # A state holds keys as they were turned.
    pipe(monkeypatch, b"")
    session = api.chat(converted, device="cpu", yarn=int(factor))
    session.load("The code is 42. " * 12)
    list(session.ask("Code?"))
    session.save_state(tmp_path / "state")
    state = ["chat", converted, "--state", tmp_path / "state", "--prompt", "Code?"]
    assert "stretched otherwise" in sparsek(*state).err
    assert sparsek(*state, "--yarn", factor, "--max-new-tokens", "2").code == 0


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (["--prompt", " "], "the prompt is empty"),
        ([], "the prompt is empty"),
        (["--prompt", "x", "--load", "nowhere.txt"], "no such file: 'nowhere.txt'"),
        (["--prompt", "x", "--device", "tpu"], "device 'tpu'"),
        (["--prompt", "x", "--device", "cuda:99"], "device 'cuda:99' is not there"),
        (["--prompt", "x", "--dtype", "int3"], "unknown dtype 'int3'"),
        (["--prompt", "x", "--top-p", "0"], "top_p"),
        (["--prompt", "x", "--max-new-tokens", "0"], "--max-new-tokens"),
        (["--prompt", "x", "--temperature", "-1"], "--temperature"),
    ],
)
def test_bad_requests(sparsek, model, words, error):
    shown = sparsek("chat", model, *words)
    assert shown.failed(2), shown
    assert error in shown.err and shown.out == ""


def test_a_byte_order_mark_is_no_part_of_the_question(sparsek, model, monkeypatch):
    found = []
    for mark in (b"", b"\xef\xbb\xbf"):
        pipe(monkeypatch, mark + b"What is it?\n")
        shown = sparsek("chat", model, "--max-new-tokens", "3", "--json")
        found.append(json.loads(shown.out)["context_tokens"])
    assert found[0] == found[1]


def test_pipe_that_is_not_utf8(sparsek, model, monkeypatch):
    pipe(monkeypatch, b"\xff\xfe\xfd")
    shown = sparsek("chat", model)
    assert shown.failed(2) and "not UTF-8" in shown.err


def test_damaged_models(sparsek, model):
    weights = model / "model.safetensors"
    content = weights.read_bytes()
    for damaged in (content[: len(content) // 2], b"nonsense"):
        weights.write_bytes(damaged)
        shown = sparsek("chat", model, "--prompt", "x")
        assert shown.failed(1), shown
    weights.write_bytes(content)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (model / file).unlink()
    shown = sparsek("chat", model, "--prompt", "x")
    assert shown.failed(1) and "tokenizer" in shown.err


def test_last_model_is_taken_and_named(sparsek, model):
    from sparsek_cli.commands import last_model

    last_model.remember(model)
    shown = sparsek("chat", "--prompt", "x", "--max-new-tokens", "1")
    assert shown.code == 0 and f"model: {model}" in shown.err


def chat_in_a_fork(*words: str) -> NoReturn:
    """What `python -m sparsek_cli` does at this terminal, without the seconds of imports."""
    ended = 1
    try:
        # Threads do not outlive a fork: libgomp would wait for those of its parent for ever.
        os.environ["OMP_NUM_THREADS"] = "1"
        torch.set_num_threads(1)
        sys.argv = ["sparsek", *words]
        sys.stdin, sys.stdout, sys.stderr = os.fdopen(0), os.fdopen(1, "w"), os.fdopen(2, "w")
        main()
    except SystemExit as end:
        ended = end.code or 0
    finally:
        os._exit(ended)


@pytest.mark.skipif(sys.platform != "linux", reason="needs a pseudo terminal")
def test_conversation_at_a_terminal(model, tmp_path):
    """A person types: a question, a wrong command, /stats, Ctrl-D."""
    child, terminal = pty.fork()
    if child == 0:
        os.environ.update(TERM="xterm", COLUMNS="100", LINES="30")
        chat_in_a_fork("chat", str(model), "--max-new-tokens", "4", "--device", "cpu")
    shown = ""

    def wait_for(text: str, seconds: float = PATIENCE) -> None:
        """Reads until `text`; what came before it is gone afterwards."""
        nonlocal shown
        end = time.monotonic() + seconds
        while text not in shown:
            assert time.monotonic() < end, f"waiting for {text!r} in {shown!r}"
            if select.select([terminal], [], [], 0.2)[0]:
                data = os.read(terminal, 65536).decode(errors="replace")
                shown += data
                if "\x1b[6n" in data:  # the line editor asks where the cursor is
                    os.write(terminal, b"\x1b[1;1R")
        shown = shown.split(text, 1)[1]

    try:
        wait_for("Ctrl-D leaves")
        wait_for("KV 0 B")  # the toolbar: from here on the editor reads the keys
        os.write(terminal, b"Hello?\r")
        wait_for("tokens/s")
        os.write(terminal, b"/stast\r")
        wait_for("did you mean /stats?")
        wait_for("tokens/s")
        os.write(terminal, b"/stats\r")
        wait_for("dense would hold")
        wait_for("(dense, grows)")
        os.write(terminal, b"\x04")
        end = time.monotonic() + PATIENCE
        while (ended := os.waitpid(child, os.WNOHANG)) == (0, 0):
            assert time.monotonic() < end, "Ctrl-D does not leave"
            time.sleep(0.1)
        child = 0
        assert os.waitstatus_to_exitcode(ended[1]) == 0
    finally:
        os.close(terminal)
        if child:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
