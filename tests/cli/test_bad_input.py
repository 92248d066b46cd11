"""Bad input to the other verbs: one error, one hint, the right exit code, nothing left behind.

What `convert` refuses is in tests/conversion/test_refusals.py.
"""

import os
import socket

import pytest

from sparsek_cli.devices import meet_others
from sparsek_cli.errors import SparsekError

FILES = {
    "latin.txt": b"caf\xe9 ",
    "good.txt": b"a few words and a few more. " * 200,
    "blank.txt": b" \n\n",
    "empty.jsonl": b"",
    "ids.jsonl": b'{"id": 1}\n',
    "broken.jsonl": b'{"text": "a"}\nnot json\n',
    "key.yaml": b"seed: 1\nlearning_rat: 1\n",
    "type.yaml": b"seed: 1\n\nlearning_rate: fast\n",
    "evaluate-key.yaml": b"seed: 1\nlimt: 3\n",
    "evaluate-type.yaml": b"seed: 1\n\nlimit: few\n",
}
FINETUNE = ["finetune", "tiny", "out", "--data"]
PPL = ["evaluate", "tiny", "--tasks", "ppl", "--output", "out"]


@pytest.fixture
def refused(sparsek, tmp_path, monkeypatch):
    """Runs a line among bad files, expects a refusal that leaves all as it was: its stderr."""
    for name, content in FILES.items():
        (tmp_path / name).write_bytes(content)
    (tmp_path / "busy").mkdir()
    (tmp_path / "busy" / "notes.txt").write_text("mine")
    (tmp_path / "state").mkdir()
    monkeypatch.chdir(tmp_path)

    def check(code: int, *words: str) -> str:
        before = sorted(tmp_path.rglob("*"))
        shown = sparsek(*words)
        assert shown.failed(code), shown
        assert shown.out == "" and sorted(tmp_path.rglob("*")) == before
        return shown.err

    return check


@pytest.mark.parametrize(
    ("code", "words", "says"),
    [
        (2, [*FINETUNE, "latin.txt"], "latin.txt is not UTF-8 text"),
        # A shell's variable that is not set: all text of the current folder was read.
        (2, [*FINETUNE, ""], "the name of a file or folder is empty"),
        (2, [*FINETUNE, " "], "the name of a file or folder is empty"),
        (2, ["finetune", "tiny", "", "--data", "latin.txt"], "the name of a file or folder is"),
        (2, ["convert", "tiny", "", "--calibrate", "none"], "the name of a file or folder is"),
        (2, ["convert", "tiny", "out", "--calibrate", ""], "the name of a file or folder is"),
        (2, ["evaluate", "tiny", "--out", ""], "the name of a file or folder is empty"),
        (2, ["evaluate", "tiny", "--text", "", "--out", "out"], "the name of a file or folder"),
        (2, ["evaluate", "tiny", "--data", "", "--out", "out"], "the name of a file or folder"),
        (2, ["chat", "tiny", "--prompt", "hi", "--load", ""], "the name of a file or folder is"),
        (2, [*FINETUNE, "blank.txt"], "no text in blank.txt"),
        (2, [*FINETUNE, "empty.jsonl"], "no text in empty.jsonl"),
        (2, [*FINETUNE, "ids.jsonl"], "ids.jsonl:1: no column 'text'"),
        (2, [*FINETUNE, "broken.jsonl"], "broken.jsonl:2: not valid JSON"),
        (2, [*FINETUNE, "nowhere.txt"], "no such file or folder: 'nowhere.txt'"),
        (1, [*FINETUNE, "nobody/nothing"], "dataset 'nobody/nothing' is not in the cache"),
        (2, ["convert", "tiny", "out", "--calibrate", "nowhere/", "--dry-run"], "no such file or"),
        (2, ["finetune", "tiny", "busy", "--data", "README.md"], "busy"),
        (2, ["finetune", "tinny", "out"], "did you mean 'tiny'"),
        (1, ["finetune", "nobody/nothing", "out"], "not in the cache"),
        (
            2,
            ["finetune", "tiny", "out", "--recipe", "key.yaml"],
            "key.yaml:2: unknown key 'learning_rat'",
        ),
        (2, ["finetune", "tiny", "out", "--recipe", "type.yaml"], "type.yaml:3: 'learning_rate'"),
        (2, ["finetune", "tiny", "out", "--steps", "many"], "'--steps'"),
        (2, ["finetune", "tiny", "out", "--steps", "0"], "steps"),
        (2, [*PPL, "--text", "latin.txt"], "latin.txt is not UTF-8 text"),
        (2, [*PPL, "--text", "blank.txt"], "no text in blank.txt"),
        (2, [*PPL, "--text", "nowhere.txt"], "no such file or folder: 'nowhere.txt'"),
        (2, [*PPL, "--lengths", "many"], "'lengths' should be a valid integer"),
        (2, [*PPL, "--limit", "0"], "'limit' should be greater than or equal to 1"),
        (2, [*PPL, "--baselines", "windw"], "did you mean 'window'"),
        (2, ["evaluate", "tiny", "--tasks", "pppl"], "did you mean 'ppl'"),
        (2, ["evaluate", "tiny", "--recipe", "evaluate-key.yaml"], "did you mean 'limit'"),
        (2, ["evaluate", "tiny", "--recipe", "evaluate-type.yaml"], "yaml:3: 'limit' should"),
        (1, ["evaluate", "tiny", "--tasks", "scrolls"], "no data for scrolls_"),
        (1, ["evaluate", "nobody/nothing", "--tasks", "ppl"], "not in the cache"),
        (1, ["chat", "nobody/nothing", "--prompt", "x"], "not in the cache"),
        (2, ["chat", "tiny", "--prompt", "x", "--load", "latin.txt"], "not UTF-8"),
        (2, ["chat", "tiny", "--prompt", "x", "--load", "blank.txt"], "empty"),
        (1, ["doctor", "nobody/nothing"], "not in the cache"),
        (1, ["convert", "nobody/nothing"], "not in the cache"),
        (1, ["convert", "tiny", "--calibrate", "nobody/nothing"], "not in the cache"),
        # Calibration alone uses them: without one any word went through, and with one minutes did.
        (2, ["convert", "tiny", "out", "--calibrate", "none", "--dtype", "int8"], "unknown dtype"),
        (2, ["convert", "tiny", "out", "--calibrate", "none", "--device", "gpu"], "unknown device"),
        (2, ["convert", "tiny", "out", "--dry-run", "--device", "cuda:99"], "is not there"),
        # Nothing of what adapters read would be left.
        (2, [*FINETUNE, "good.txt", "train=lora", "lora.dropout=1"], "should be less than 1"),
    ],
)
def test_refused(refused, code, words, says):
    assert says in refused(code, *words)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
@pytest.mark.parametrize(
    "words",
    [
        ["convert", "tiny", "locked/out", "--calibrate", "none"],
        ["finetune", "tiny", "locked/out", "--data", "good.txt", "train=all", "sequence_length=32"],
        ["evaluate", "tiny", "--tasks", "ppl", "--output", "locked/out"],
    ],
)
def test_a_folder_that_may_not_be_written(refused, tmp_path, words):
    (tmp_path / "locked").mkdir(mode=0o500)
    assert "locked" in refused(1, *words)


@pytest.mark.parametrize("verb", ["evaluate", "finetune"])
@pytest.mark.parametrize("size", ["2", "many"])
def test_a_process_that_nobody_launched_waits_for_no_other(sparsek, monkeypatch, verb, size):
    for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WORLD_SIZE", size)
    words = {
        "evaluate": ["tiny", "--tasks", "recall_1", "--limit", "1", "--lengths", "256"],
        "finetune": ["tiny", "out", "--data", __file__, "--steps", "1", "--dry-run"],
    }
    shown = sparsek(verb, *words[verb], "--device", "cpu")
    assert shown.failed(2), shown
    assert "WORLD_SIZE" in shown.err and "unset WORLD_SIZE" in shown.err
    # As hinted: another test of this folder runs the verbs without it.


LAUNCHED = {"RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}


@pytest.mark.parametrize("world", ["1", None])
@pytest.mark.parametrize("wrong", [{"LOCAL_RANK": "3"}, {"RANK": "x"}, {"LOCAL_RANK": "y"}])
def test_ranks_that_nobody_gave_are_forgotten(monkeypatch, world, wrong):
    """accelerate would wait for the others by them, or fail to read them."""
    from sparsek_cli.devices import forget_stray_ranks

    for name, value in {**LAUNCHED, **wrong}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    if world is not None:
        monkeypatch.setenv("WORLD_SIZE", world)
    forget_stray_ranks()
    assert not set(LAUNCHED) & set(os.environ)


def test_a_launch_of_one_process_stays(monkeypatch):
    from sparsek_cli.devices import forget_stray_ranks

    for name, value in {**LAUNCHED, "WORLD_SIZE": "1"}.items():
        monkeypatch.setenv(name, value)
    forget_stray_ranks()
    assert {name: os.environ[name] for name in LAUNCHED} == LAUNCHED


@pytest.mark.parametrize(
    "wrong", [{"RANK": "2"}, {"RANK": "x"}, {"LOCAL_RANK": "-1"}, {"MASTER_PORT": "0"},
              {"WORLD_SIZE": "0"}, {"WORLD_SIZE": "2.0"}, {"WORLD_SIZE": "9" * 5000}],
)  # fmt: skip
def test_launches_that_cannot_be(monkeypatch, wrong):
    from sparsek_cli.devices import world_size
    from sparsek_cli.errors import UsageError

    for name, value in {**LAUNCHED, "WORLD_SIZE": "2", **wrong}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UsageError, match=next(iter(wrong))) as caught:
        world_size()
    assert "torchrun" in caught.value.hint


@pytest.mark.parametrize("rank", ["5", "x"])
def test_a_rank_alone_means_nothing(sparsek, monkeypatch, tmp_path, rank):
    """One process speaks and writes, whatever a scheduler left in its environment."""
    from sparsek_cli.devices import is_first

    monkeypatch.setenv("RANK", rank)
    assert is_first()
    monkeypatch.chdir(tmp_path)
    shown = sparsek("finetune", "tiny", "out", "--recipe", "nobody")
    assert shown.failed(2), "it is heard"


@pytest.mark.parametrize("rank", ["0", "1"])
def test_processes_that_do_not_come_are_not_waited_for_long(monkeypatch, rank):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    for name, value in {**LAUNCHED, "MASTER_PORT": str(port), "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("RANK", rank)
    said = []
    with pytest.raises(SparsekError, match="the other processes did not come") as refusal:
        meet_others(said.append, patience=1)
    assert "2 processes at" in said[0] and "unset WORLD_SIZE" in refusal.value.hint
