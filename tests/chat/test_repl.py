"""Commands of the conversation at a terminal."""

import json
import os
import resource
import signal
from contextlib import contextmanager
from functools import partial
from types import SimpleNamespace

import pytest

from sparsek_cli import termination
from sparsek_cli.byte_units import size
from sparsek_cli.data.pieces import BLOCK
from sparsek_cli.dialogue.drawing.sampling import Sampling
from sparsek_cli.dialogue.drawing.settings import changed
from sparsek_cli.dialogue.figures import Stats, status_line
from sparsek_cli.dialogue.files import load_file, load_path, save_conversation
from sparsek_cli.dialogue.repl import Repl
from sparsek_cli.dialogue.session import Session
from sparsek_cli.errors import SparsekError, UsageError
from sparsek_cli.termination import Terminated, sigterm_interrupts


@contextmanager
def no_progress(description, total):
    yield SimpleNamespace(advance=lambda steps: None)


@pytest.fixture
def said() -> list[str]:
    return []


@pytest.fixture
def repl(engine, tokenizer, said) -> Repl:
    session = Session(engine(), tokenizer, Sampling(max_new_tokens=3))
    return Repl(session, say=said.append, show=partial(print, end=""), progress=no_progress)


def run(repl: Repl, *lines: str) -> None:
    rest = iter(lines)

    def read_line() -> str:
        try:
            return next(rest)
        except StopIteration:
            raise EOFError from None

    repl.run(read_line)


def test_sigterm_at_the_prompt_ends_it(repl):
    """Ctrl-C there does nothing; who sends SIGTERM would wait, and kill."""

    def read_line() -> str:
        with sigterm_interrupts():
            # Else it would kill the tests' own process.
            assert signal.getsignal(signal.SIGTERM) is termination._interrupt
            os.kill(os.getpid(), signal.SIGTERM)
        raise EOFError

    with pytest.raises(Terminated):
        repl.run(read_line)


def test_conversation_commands(repl, said, tmp_path, capsys):
    (tmp_path / "doc.txt").write_text("A fact stands here.", encoding="utf-8")
    saved = tmp_path / "talk.json"
    run(repl, "", f"/load {tmp_path / 'doc.txt'}", "What stands here?", f"/save {saved}", "/help")
    assert capsys.readouterr().out.endswith("\n")
    messages = json.loads(saved.read_text())["messages"]
    assert [m["role"] for m in messages] == ["user", "assistant"]
    assert messages[0]["content"].startswith("[doc.txt]")
    assert "/load PATH" in said[-1]
    run(repl, "/clear", "/exit", "never reached")
    assert repl.session.engine.fed == 0


def test_bad_commands_say_what_instead(repl, said):
    run(repl, "/laod x", "/load nowhere.txt", "/set temprature=1", "/set top_p=2", "/set seed=x",
        "/set seed", "/set =")  # fmt: skip
    text = "\n".join(said)
    assert "unknown command /laod\nhint: did you mean /load?" in text
    assert "no such file: 'nowhere.txt'" in text
    assert "did you mean temperature?" in text
    assert "top_p 2.0 is out of range" in text
    assert "seed=x is not a whole number" in text
    assert "/set seed needs a value\nhint: for instance /set seed=0" in text
    assert "/set has no key ''" in text


@pytest.mark.parametrize("number", ["²", "9" * 5000, "-1", "1e3", str(1 << 63)])
def test_numbers_that_are_none(repl, said, number):
    """int() refuses what str.isdigit() takes, and a seed must fit what torch counts in."""
    repl.session.engine.sparse = True
    repl.session.engine.model.config.sparsek = {"topk": 1, "window": 4, "sinks": 1}
    run(repl, f"/set seed={number}")
    assert "/set" in said[-1] or "out of range" in said[-1]
    run(repl, f"/budget {number}")
    assert said[-1].startswith("error: ") and "-v" not in said[-1]


@pytest.mark.parametrize(
    "error", [RuntimeError("out of memory"), ValueError("no"), KeyboardInterrupt]
)
def test_a_line_that_fails_leaves_the_conversation_as_it_was(repl, said, tmp_path, error):
    """Hours of reading are in the cache: no error of a library, and no Ctrl-C, ends the program."""
    document = tmp_path / "doc.txt"
    document.write_text("A fact stands here. " * 20, encoding="utf-8")
    run(repl, f"/load {document}", "What stands here?")
    engine, stood = repl.session.engine, repl.session.moment()
    read = engine._read

    def fail(piece):
        read(piece[:1])
        raise error

    engine._read = fail
    run(repl, f"/load {document}", "And now?", "/retry")
    engine._read = read
    assert [text.split("\n")[0] for text in said if "temperature" not in text][1:] == (
        ["(stopped)"] * 3
        if error is KeyboardInterrupt
        else [f"error: {type(error).__name__}: {error}"] * 3
    )
    now = repl.session.moment()
    assert now.engine.fed == stood.engine.fed and now.standing == stood.standing
    assert now.engine.heard.tolist() == stood.engine.heard.tolist()
    run(repl, "And now?")
    assert repl.session.messages[-2]["content"] == "And now?"


def test_sigterm_ends_a_line(repl, monkeypatch):
    def ends(line):
        raise Terminated

    monkeypatch.setattr(repl, "handle", ends)
    with pytest.raises(Terminated):
        run(repl, "hello")


def test_a_line_that_does_not_fit_the_disk_is_not_begun(repl, tmp_path):
    """Else the next /save would be added to its half, and neither could be trained on."""
    file = tmp_path / "talk.jsonl"
    run(repl, "hello", f"/save {file}")
    whole = file.read_bytes()
    most = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(whole) + 40, most[1]))
        run(repl, f"/save {file}")
        with pytest.raises(SparsekError, match="cannot write"):
            repl.session.messages.append({"role": "user", "content": "long " * 100})
            save_conversation(repl.session, tmp_path / "new.jsonl")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, most)
        signal.signal(signal.SIGXFSZ, handler)
    assert file.read_bytes() == whole and not (tmp_path / "new.jsonl").exists()


def test_set_changes_one_setting(repl, said):
    run(repl, "/set temperature=0.7", "/set")
    assert repl.session.sampling.temperature == 0.7
    assert "temperature=0.7" in said[-1]
    assert changed(Sampling(), "max_new_tokens = 9").max_new_tokens == 9
    assert changed(Sampling(), "seed 9").seed == 9


def test_system_starts_anew(repl, said):
    run(repl, "Hello?", "/system Be brief.")
    assert repl.session.system == "Be brief." and repl.session.engine.fed == 0


def test_ctrl_c_at_the_prompt_goes_on(repl):
    answers = iter([KeyboardInterrupt, EOFError])

    def read_line() -> str:
        raise next(answers)

    repl.run(read_line)


@pytest.mark.parametrize("content", [b"\xff\xfe\x00bad", b"  \n"])
def test_unreadable_documents(repl, tmp_path, content):
    file = tmp_path / "bad.txt"
    file.write_bytes(content)
    with pytest.raises(UsageError, match="UTF-8|empty"):
        load_file(repl.session, str(file), progress=no_progress)
    with pytest.raises(UsageError, match="no plain file"):
        load_file(repl.session, str(tmp_path), progress=no_progress)
    (tmp_path / "only").mkdir()
    with pytest.raises(UsageError, match="no text files"):
        load_path(repl.session, str(tmp_path / "only"), progress=no_progress)


@pytest.mark.slow
def test_a_long_file_is_read_in_parts_like_its_text(engine, tokenizer, tmp_path):
    """Characters and line ends that fall between two blocks are whole; nothing holds all of it."""
    text = "\n\n" + "a naïve é\r\n" * 3000 + "the end\n\n"
    file = tmp_path / "long.txt"
    file.write_bytes(text.encode())
    seen, longest = [], []
    for load in (
        lambda session: session.load(text.replace("\r\n", "\n")),
        lambda session: load_file(session, str(file), progress=no_progress),
    ):
        session = Session(engine(chunk=512), tokenizer, Sampling(max_new_tokens=1))
        feed = session.feed.feed_text
        session.feed.feed_text = lambda text, *rest, feed=feed: (
            longest.append(len(text)) or feed(text, *rest)
        )
        assert load(session)
        "".join(session.ask("What?"))
        seen.append(session.engine.seen)
    assert seen[0] == seen[1] and max(longest) < 2 * BLOCK < len(text)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("plain words".encode("utf-16-le"), "a null byte at position 1"),  # valid UTF-8, too
        (b"words" * BLOCK + b"\0", f"a null byte at position {5 * BLOCK}"),
        ("plain words".encode("utf-16"), "begins as UTF-16 does"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "a pointer of Git LFS"),
    ],
)
def test_what_only_looks_like_text_is_not_read(repl, tmp_path, content, says):
    file = tmp_path / "bad.txt"
    file.write_bytes(content)
    with pytest.raises(UsageError, match=says):
        load_file(repl.session, str(file), progress=no_progress)


def test_a_byte_order_mark_is_no_part_of_a_document(engine, tokenizer, tmp_path):
    seen, file = [], tmp_path / "a.txt"
    for mark in (b"", b"\xef\xbb\xbf"):
        file.write_bytes(mark + b"The end.")
        session = Session(engine(), tokenizer, Sampling(max_new_tokens=1))
        load_file(session, str(file), progress=no_progress)
        "".join(session.ask("What?"))
        seen.append(session.engine.seen)
    assert seen[0] == seen[1]


def test_where_a_file_stops_being_text_is_named(repl, tmp_path):
    file = tmp_path / "bad.txt"
    for before in (b"a" * (BLOCK - 1), b"a" * 7, b"a" * 3 * BLOCK):
        file.write_bytes(before + "é".encode()[:1] + b"b")
        with pytest.raises(UsageError, match=rf"UTF-8 text \(byte {len(before)}\)"):
            load_file(repl.session, str(file), progress=no_progress)
        file.write_bytes(before + "é".encode()[:1])
        with pytest.raises(UsageError, match=rf"UTF-8 text \(byte {len(before)}\)"):
            load_file(repl.session, str(file), progress=no_progress)


def test_files_are_written_where_they_may_be_and_the_hint_says_where(
    repl, said, tmp_path, make_checkpoint
):
    """In a model's folder they kept `push` and --overwrite from it; "a file that does not exist
    yet" was the hint for a folder that does not, either."""
    model = make_checkpoint(tmp_path / "model")
    (model / "sparsek.yaml").write_text("topk: 3")
    run(repl, "hello", f"/save {model}/talk.json", f"/save {tmp_path}/no/talk.json")
    first, second = (text for text in said if text.startswith("error"))
    assert "lies inside" in first and not (model / "talk.json").exists()
    assert "make the folder first" in second and "exist yet" not in second
    beside = first.split("beside it: ")[1].strip()
    (tmp_path / "no").mkdir()
    run(repl, f"/save {beside}", f"/save {tmp_path}/no/talk.json")
    assert sum(text.startswith("error") for text in said) == 2
    assert (tmp_path / "talk.json").exists() and (tmp_path / "no" / "talk.json").exists()


def test_save_to_nowhere(repl, tmp_path):
    with pytest.raises(SparsekError, match="cannot write"):
        save_conversation(repl.session, tmp_path / "no" / "such" / "file.txt")


def test_figures():
    assert size(0) == "0 B" and size(1536) == "1.50 KiB" and size(16 << 20) == "16.0 MiB"
    stats = Stats(8192, 1 << 20, 16 << 20, 31.4, 10)
    line = status_line(stats, sparse=True, limit=4096)
    assert line == (
        "8,192 tokens (made for 4,096)  |  KV 1.00 MiB  |  dense 16.0 MiB (16.0x)  |  31.4 tokens/s"
    )
    early = Stats(100, 1 << 20, 1 << 16, 31.4, 10)
    assert "dense 64.0 KiB  |" in status_line(early, sparse=True)
    assert "grows" in status_line(stats, sparse=False)


def test_bytes_of_another_encoding_are_refused(engine, tokenizer):
    session, latin = Session(engine(), tokenizer), b"caf\xe9".decode("utf-8", "surrogateescape")
    for attempt in (lambda: list(session.ask(latin)), lambda: session.set_system(latin)):
        with pytest.raises(UsageError, match=r"is not valid UTF-8 \(character 3\)") as refusal:
            attempt()
        assert "iconv" in refusal.value.hint
    assert not session.messages
    list(session.ask("café".encode("latin1").decode("latin1")))
