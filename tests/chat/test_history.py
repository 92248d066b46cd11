"""Going back, going on from a file, other branches, and the dense answer beside the sparse one."""

import json
from contextlib import contextmanager
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from sparsek_cli.dialogue.drawing.sampling import Sampling
from sparsek_cli.dialogue.engine import Engine
from sparsek_cli.dialogue.heard import Heard
from sparsek_cli.dialogue.repl import Repl
from sparsek_cli.dialogue.session import MOMENTS, Session
from sparsek_cli.errors import SparsekError, UsageError
from sparsek_cli.models import SparseKCache, save_state


@contextmanager
def no_progress(description, total):
    yield SimpleNamespace(advance=lambda steps: None)


@pytest.fixture
def session(sparse_model, tokenizer):
    model = sparse_model("llama", topk=12, window=8, sinks=2)
    return Session(Engine(model, chunk=16), tokenizer, Sampling(max_new_tokens=4))


@pytest.fixture
def said():
    return []


@pytest.fixture
def repl(session, said):
    return Repl(session, say=said.append, show=partial(print, end=""), progress=no_progress)


def ask(session, question):
    return "".join(session.ask(question))


def test_undo_takes_back_exactly_one_question(session):
    session.load("The code is 42. " * 5)
    first = ask(session, "What is the code?")
    stood = session.engine.tokens, list(session.messages)
    second = ask(session, "Are you sure?")
    assert session.undo() == "Are you sure?"
    assert (session.engine.tokens, session.messages) == stood
    assert ask(session, "Are you sure?") == second
    session.undo()
    assert session.undo() == "What is the code?"
    assert session.messages == []
    assert ask(session, "What is the code?") == first  # the document is still read
    session.undo()
    with pytest.raises(UsageError, match="nothing to take back"):
        session.undo()
    for _ in range(MOMENTS + 2):
        ask(session, "And?")
    assert len(session._moments) == MOMENTS


def test_retry_draws_again_and_says_when_that_changes_nothing(repl, said, capsys):
    repl.handle("Hello there?")
    first = capsys.readouterr().out
    repl.handle("/retry")
    assert capsys.readouterr().out == first and "temperature is 0" in said[-1]
    repl.handle("/set temperature=5")
    repl.handle("/retry")
    assert repl.session.sampling.seed == 1
    assert len(repl.session.messages) == 2
    assert capsys.readouterr().out != first


def test_forks_go_their_own_ways(repl, said):
    session = repl.session
    ask(session, "Hello?")
    repl.handle("/fork start")
    one = ask(session, "First way?")
    repl.handle("/switch start")
    ask(session, "Another way, longer?")
    repl.handle("/switch start")
    assert ask(session, "First way?") == one
    repl.handle("/fork")
    assert said[-1].startswith("start: ")
    with pytest.raises(UsageError, match="no fork is called 'x'"):
        repl.handle("/switch x")


def test_a_saved_conversation_goes_on_elsewhere(repl, said, sparse_model, tokenizer, tmp_path):
    session, file = repl.session, tmp_path / "state"
    session.load("The code is 42. " * 5, "doc.txt")
    ask(session, "What is the code?")
    session.load("Another page. " * 3, "page.txt")
    repl.handle(f"/save-state {file}")
    expected = ask(session, "And now?")
    other = Session(Engine(session.engine.model), tokenizer, Sampling(max_new_tokens=4))
    Repl(other, say=said.append, show=partial(print, end=""), progress=no_progress).handle(
        f"/load-state {file}"
    )
    assert ask(other, "And now?") == expected
    assert other.messages == session.messages
    assert other.engine.heard.tolist() == session.engine.heard.tolist()
    stranger = sparse_model("llama", topk=12, window=8, sinks=2, seed=5)
    with pytest.raises(UsageError, match="another model"):
        Session(Engine(stranger), tokenizer).load_state(file)


FORGED = [
    ("system", 3), ("messages", "hi"), ("messages", [{"role": "user"}]), ("messages", [3]),
    ("messages", [{"role": "user", "content": 3}]), ("_before", None), ("_opened", 1),
    ("_documents", [["a"]]), ("_documents", [3]), ("_documents", {}), ("_full", [[]]),
    ("_fed_ids", ["a"]), ("_fed_ids", [-1]), ("__class__", "str"), ("engine", None),
    ("engine", {}), ("fed", "40"), ("fed", True), ("fed", 10**30), ("fed", 1), ("unfed", [1.5]),
    ("unfed", [10**6]), ("heard", [-1]), ("heard", [2**40]), ("heard", 3), ("cache", 3),
]  # fmt: skip


def test_a_forged_conversation_is_refused_and_nothing_is_lost(repl, tmp_path):
    """Keys and types that chat does not write: a traceback before, or taken over by half."""
    session, file, forged = repl.session, tmp_path / "state", tmp_path / "forged"
    ask(session, "What is the code?")
    repl.handle(f"/save-state {file}")
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    notes, tensors = json.loads(metadata["notes"]), load_file(file)
    before = session.moment()
    changed = [notes | {key: value} for key, value in FORGED if key not in notes["engine"]]
    changed += [
        notes | {"engine": notes["engine"] | {key: value}}
        for key, value in FORGED
        if key in ("fed", "unfed", "heard", "cache")
    ]
    changed += [{k: v for k, v in notes.items() if k != key} for key in notes]
    for made in [None, [], 3, {}, *changed]:
        save_file(tensors, forged, metadata | {"notes": json.dumps(made)})
        with pytest.raises(UsageError, match="damaged|no conversation") as refused:
            repl.handle(f"/load-state {forged}")
        assert refused.value.hint
    after = session.moment()
    assert after.standing == before.standing and after.engine.fed == before.engine.fed
    assert session.engine.heard.tolist() == notes["engine"]["heard"]
    repl.handle(f"/load-state {file}")


def test_texts_side_by_side_are_no_conversation(repl, tmp_path):
    model, file = repl.session.engine.model, tmp_path / "two"
    cache = SparseKCache(model.config)
    with torch.no_grad():
        model(torch.randint(4, 128, (2, 30)), past_key_values=cache)
    ask(repl.session, "What is the code?")
    repl.handle(f"/save-state {tmp_path / 'one'}")
    with safe_open(tmp_path / "one", "pt") as opened:
        notes = json.loads(opened.metadata()["notes"])
    notes["engine"]["fed"] = 30
    save_state(cache, file, model, notes=notes)
    with pytest.raises(UsageError, match="no conversation"):
        repl.handle(f"/load-state {file}")


def test_a_state_is_written_over_no_file_but_its_own(repl, tmp_path):
    ask(repl.session, "What is the code?")
    thesis, part, link = (tmp_path / name for name in ("thesis.odt", "state.part", "link"))
    for file in (thesis, part):
        file.write_text("mine")
    link.symlink_to(thesis)
    for file in (thesis, link):
        with pytest.raises(UsageError) as refused:
            repl.handle(f"/save-state {file}")
        assert refused.value.hint == "name a file that does not exist yet"
    state = tmp_path / "state"
    for _ in range(2):  # the second time it is its own
        repl.handle(f"/save-state {state}")
    state.rename(tmp_path / "kept")
    repl.handle(f"/load-state {tmp_path / 'kept'}")
    repl.handle(f"/save-state {tmp_path / 'kept'}")
    assert thesis.read_text() == part.read_text() == "mine" and link.is_symlink()
    names = sorted(file.name for file in tmp_path.iterdir())
    assert names == ["kept", "link", "state.part", "thesis.odt"]


def test_a_conversation_that_cannot_be_written_again_stays(repl, tmp_path, monkeypatch):
    ask(repl.session, "What is the code?")
    file = tmp_path / "talk.txt"
    repl.handle(f"/save {file}")
    before = file.read_text()

    def full(self, *args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pathlib.Path.write_text", full)
    with pytest.raises(SparsekError, match="No space left"):
        repl.handle(f"/save {file}")
    assert file.read_text() == before and [p.name for p in tmp_path.iterdir()] == ["talk.txt"]


def test_the_dense_answer_leaves_the_conversation_alone(repl, said, capsys):
    session = repl.session
    with pytest.raises(UsageError, match="nothing was answered"):
        repl.handle("/compare")
    session.load("The code is 42. " * 5)
    repl.handle("What is the code?")
    before = session.engine.tokens, session.engine.kv_bytes
    capsys.readouterr()
    repl.handle("/compare")
    dense = capsys.readouterr().out.rstrip("\n")
    assert (session.engine.tokens, session.engine.kv_bytes) == before
    assert said[-1].startswith("sparse:\n" + session.messages[-1]["content"])
    # The same question to the same weights under dense attention.
    from sparsek_cli.models import dense_attention

    with dense_attention(session.engine.model):
        alone = Engine(session.engine.model, dense=True)
        other = Session(alone, session.tokenizer, session.sampling)
        other.load("The code is 42. " * 5)
        assert ask(other, "What is the code?") == dense


def test_a_budget_starts_anew(repl, said):
    ask(repl.session, "Hello?")
    repl.handle("/budget")
    assert said[-1] == "2 sinks, 12 selected, a window of 8"
    repl.handle("/budget 30")
    assert said[-1] == "2 sinks, 20 selected, a window of 8; new conversation"
    assert repl.session.engine.tokens == 0
    ask(repl.session, "Hello?")
    for bad, message in (("/budget 3", "fewer than"), ("/budget x", "no whole number")):
        with pytest.raises(UsageError, match=message):
            repl.handle(bad)


def test_transcripts_are_lines_that_finetune_reads(repl, tmp_path):
    from sparsek_cli.data.text.documents import iterate_texts

    (tmp_path / "books").mkdir()
    (tmp_path / "books" / "b.md").write_text("Second.", encoding="utf-8")
    (tmp_path / "books" / "a.txt").write_text("First.", encoding="utf-8")
    (tmp_path / "books" / ".hidden.txt").write_text("Secret.", encoding="utf-8")
    (tmp_path / "books" / "c.png").write_bytes(b"\x89PNG")
    repl.handle(f"/load {tmp_path / 'books'}")
    repl.handle("What is there?")
    file = tmp_path / "talks.jsonl"
    repl.handle(f"/save {file}")
    repl.handle("And more?")
    repl.handle(f"/save {file}")
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    assert [len(row["messages"]) for row in rows] == [2, 4]
    texts = list(iterate_texts(file))
    assert "a.txt:\nFirst." in texts[0] and "Second." in texts[0] and "Secret" not in texts[0]
    assert texts[1].startswith(texts[0][:40]) and "And more?" in texts[1]
    # Replies end at four tokens, the last of which nobody has read yet.
    told = [row["messages"][-1]["content"] for row in rows]
    assert all(reply and text.endswith(reply) for text, reply in zip(texts, told, strict=True))


def test_a_folder_is_read_with_one_copy_of_the_cache(repl, said, tmp_path, monkeypatch):
    """And taken back as a whole where one of its files fails."""
    engine, session = repl.session.engine, repl.session
    ask(session, "Hello?")
    stood = session.moment()
    for name in "abc":
        (tmp_path / f"{name}.txt").write_text(f"The code of {name} is 42. " * 5, encoding="utf-8")
    copies, read = [], engine._read
    snapshot = engine.snapshot
    monkeypatch.setattr(engine, "snapshot", lambda: copies.append(0) or snapshot())

    def fail(piece):
        read(piece)
        if len(session.feed.documents) == 2:
            raise RuntimeError("out of memory")

    monkeypatch.setattr(engine, "_read", fail)
    with pytest.raises(RuntimeError):
        repl.handle(f"/load {tmp_path}")
    now = repl.session.moment()
    assert now.engine.heard.tolist() == stood.engine.heard.tolist()
    assert now.standing == stood.standing
    copies.clear()
    monkeypatch.setattr(engine, "_read", read)
    repl.handle(f"/load {tmp_path}")
    assert len(copies) == 1 and len(session.feed.documents) == 3


def test_a_dense_model_has_no_state_and_no_budget(dense_model, tokenizer):
    session = Session(Engine(dense_model("llama")), tokenizer, Sampling(max_new_tokens=2))
    repl = Repl(session, say=print, show=partial(print, end=""), progress=no_progress)
    repl.handle("Hello?")
    for line in ("/save-state x", "/load-state x", "/budget", "/budget 9", "/compare"):
        with pytest.raises(UsageError):
            repl.handle(line)
    session.undo()


def test_copies_share_what_was_heard_and_go_their_own_ways():
    heard = Heard(range(1000))
    first = heard.copy()
    heard.extend([1, 2])
    second = heard.copy()
    first.extend([7])
    heard.extend([3])
    assert heard.tolist() == [*range(1000), 1, 2, 3] and len(heard) == 1003
    assert first.tolist() == [*range(1000), 7] and second.tolist() == [*range(1000), 1, 2]
    assert first._pieces[0] is heard._pieces[0] is second._pieces[0]  # a million tokens once
