"""What a hostile stranger asks for: `error:` and `hint:`, exit 1 or 2, and nothing is touched.

Every line is run in this process, in a folder of its own kind of world, which must be the same
afterwards: names, bytes' times, rights. The models meet one verb each here and all of them under
`-m slow`.
"""

from __future__ import annotations

import os
import re
import socket
import stat
from pathlib import Path
from types import SimpleNamespace

import pytest
from bad_lines import BENCH, CHAT, CONVERT, DATA, EVALUATE, FINETUNE, LINES, OUTS, RECIPES
from bad_models import MODELS, NAMES, TOKENIZERS, config

VERBS = {
    "convert": CONVERT,
    "finetune": FINETUNE,
    "evaluate": EVALUATE,
    "chat": CHAT,
    "doctor": ["doctor", "{good}"],
    "bench": BENCH,
    "export": ["export", "{good}", "{out}"],
    "serve": ["serve", "{good}", "--dry-run"],
    "push": ["push", "{good}", "someone/else", "--dry-run"],
}


@pytest.fixture(scope="module")
def world(tmp_path_factory, make_checkpoint) -> SimpleNamespace:
    """A folder of good and bad things: `.root` and the `.places` that lines may name."""
    from verbs import convert

    from sparsek_cli.recipes.schema_convert import ConvertRecipe

    root = tmp_path_factory.mktemp("world")
    good = make_checkpoint(root / "good")
    sparse = root / "sparse"
    recipe = ConvertRecipe(model=str(good), out=str(sparse), calibrate="none", topk=6, window=4)
    convert(recipe)
    for name, make in {**MODELS, **TOKENIZERS}.items():
        make(good, root / name)
    for name, content in {**DATA, **RECIPES}.items():
        (root / name).write_bytes(content)
    (root / "text.txt").write_text("a few words and a few more. " * 400)
    (root / "foreign").mkdir()
    (root / "foreign" / "thesis.odt").write_text("mine")
    for name in ("home", "state", "cache"):
        (root / name).mkdir()
    os.mkfifo(root / "pipe")
    with socket.socket(socket.AF_UNIX) as opened:
        here = Path.cwd()
        os.chdir(root)  # a socket's path must be short
        opened.bind("socket")
        os.chdir(here)
    (root / "link").symlink_to(sparse)
    (root / "dangling").symlink_to(root / "nowhere")
    places = {
        "good": good, "sparse": sparse, "out": root / "out", "text": root / "text.txt",
        "fifo": root / "pipe", "socket": root / "socket", "foreign": root / "foreign",
        "link": root / "link", "dangling": root / "dangling", "world": root, "long": "n" * 300,
        "weights": good / "model.safetensors",
    }  # fmt: skip
    return SimpleNamespace(root=root, places=places, stood=(0, {}))


def standing(root: Path) -> dict[str, tuple]:
    """Everything below, but for caches and notes: names, sizes, times of change, rights."""
    found, left = {}, [os.fspath(root)]
    while left:
        for entry in os.scandir(left.pop()):
            if entry.name in ("state", "cache"):
                continue
            at = entry.stat(follow_symlinks=False)
            found[entry.path] = (at.st_ino, at.st_size, at.st_mtime_ns, at.st_mode)
            if stat.S_ISDIR(at.st_mode):
                left.append(entry.path)
    return found


@pytest.fixture
def refused(world, sparsek, monkeypatch):
    """`refused(words)`: runs the line in the world and looks at what it left."""
    monkeypatch.chdir(world.root)
    for name in ("RANK", "WORLD_SIZE", "SPARSEK_STATE_DIR", "SPARSEK_CACHE_DIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(world.root / "home"))
    monkeypatch.setenv("SPARSEK_STATE_DIR", str(world.root / "state"))
    monkeypatch.setenv("SPARSEK_CACHE_DIR", str(world.root / "cache"))
    monkeypatch.setattr("sys.stdin", open(os.devnull))  # noqa: SIM115

    def check(words: list[str]) -> str:
        line = [re.sub(r"\{(\w+)\}", lambda m: str(world.places[m[1]]), w) for w in words]
        # As the line before left it; what a test adds to the world is at its top.
        changed, before = world.stood
        if changed != world.root.stat().st_mtime_ns:
            before = standing(world.root)
        shown = sparsek(*line)
        lines = shown.err.strip().splitlines()
        kinds = [text.split(":")[0] for text in lines[-2:]]
        assert kinds == ["error", "hint"] and shown.code in (1, 2), shown
        assert sum(text.startswith("error: ") for text in lines) == 1, shown
        assert "Traceback" not in shown.err
        controls = set(re.findall(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", shown.err + shown.out))
        assert not controls, shown
        # What a library says of itself is no message of ours.
        assert not re.search(r"error: [A-Z]\w*(Error|Exception|Warning)\b", shown.err), shown
        after = standing(world.root)
        world.stood = world.root.stat().st_mtime_ns, after
        assert after == before, {*after.items()} ^ {*before.items()}
        return shown.err

    return check


def on(model: str, verb: str) -> list[str]:
    """The verb's line about another model."""
    return [model if word in ("{good}", "{sparse}") else word for word in VERBS[verb]]


READERS = ("finetune", "evaluate", "chat")


def odd_file(path: Path) -> bool:
    """What has a file's name and is none, links followed."""
    return bool(path.suffix) and not path.is_file()


ODD = ("fifo", "socket", "device", "folder", "gone")


@pytest.mark.parametrize("name", [n for n in MODELS if n.startswith(tuple(f"{k}-" for k in ODD))])
def test_an_odd_file_is_named(refused, world, name):
    """And its kind; it counted as absent, so that something else was blamed, or nothing was."""
    said = refused(on(name, "convert"))
    odd = next(p for p in world.root.joinpath(name).rglob("*") if odd_file(p))
    assert f"'{odd}' is a " in said


def converted(world: SimpleNamespace, name: str) -> str:
    """A converted model with a bad tokenizer: nothing else is wrong with it."""
    folder = world.root / f"sparse-{name}"
    if not folder.exists():
        TOKENIZERS[name](world.places["sparse"], folder)
    return folder.name


EACH = [(name, list(VERBS)[number % len(VERBS)]) for number, name in enumerate(MODELS)]
ALL = [(name, verb) for name in MODELS for verb in VERBS]


@pytest.mark.parametrize(("name", "verb"), EACH)
def test_models(refused, name, verb):
    refused(on(name, verb))


@pytest.mark.slow
@pytest.mark.parametrize(("name", "verb"), [pair for pair in ALL if pair not in EACH])
def test_models_under_every_verb(refused, name, verb):
    refused(on(name, verb))


@pytest.mark.parametrize(
    ("name", "verb"), [(n, READERS[i % len(READERS)]) for i, n in enumerate(TOKENIZERS)]
)
def test_tokenizers(refused, world, name, verb):
    said = refused(on(converted(world, name), verb))
    assert "tokenizer" in said or "template" in said, said


# What some do without a tokenizer, convert where nothing is calibrated; what some do not compare.
WITHOUT = {
    "tokenizer-gone": ("convert", "doctor", "export", "push"),
    "tokenizer-beyond": ("export", "push"),
}


@pytest.mark.parametrize("verb", ["convert", "doctor", "export", "push", "serve"])
def test_tokenizers_of_verbs_that_read_no_text(refused, world, verb):
    for name in TOKENIZERS:
        if verb in WITHOUT.get(name, ()):
            continue
        said = refused(on(name if verb == "convert" else converted(world, name), verb))
        assert "tokenizer" in said or "template" in said, said


@pytest.mark.parametrize(
    "words", [VERBS[verb] for verb in ("export", "push", "serve")] + [["export", "--scorers"]]
)
@pytest.mark.parametrize("changes", [{"num_attention_heads": 5}, {"eos_token_id": "</s>"}])
def test_a_converted_config_is_blamed_and_not_its_tokenizer(refused, world, words, changes):
    name = f"sparse-{next(iter(changes))}"
    if not (world.root / name).exists():
        config(**changes)(world.places["sparse"], world.root / name)
    words = [*words, "{good}", "{out}"] if "--scorers" in words else words
    said = refused([name if word == "{good}" else word for word in words])
    assert "tokenizer" not in said and re.search("num_attention_heads|attention heads|eos", said)


@pytest.mark.parametrize("verb", VERBS)
def test_names(refused, verb):
    for name in NAMES:
        refused(on(name, verb))


@pytest.mark.parametrize("file", DATA)
def test_data(refused, file):
    refused([word if word != "{text}" else file for word in FINETUNE])
    if not file.endswith(("parquet", "zst", "docx")):
        return
    refused([word if word != "{text}" else file for word in EVALUATE])


@pytest.mark.parametrize("file", DATA)
def test_data_elsewhere(refused, file):
    if file not in ("columns.jsonl", "messages.jsonl", "shared.jsonl"):
        refused(["convert", "{good}", "{out}", "--calibrate", file, "--budget", "12"])
    if file.endswith(".txt"):
        refused([*CHAT, "--load", file])


@pytest.mark.parametrize("file", RECIPES)
@pytest.mark.parametrize("verb", ["convert", "finetune", "evaluate"])
def test_recipes(refused, file, verb):
    refused([*VERBS[verb], "--recipe", file])


@pytest.mark.parametrize("kind", LINES)
def test_lines(refused, kind):
    wrong = []
    for words in LINES[kind]:
        try:
            refused(words)
        except AssertionError as error:
            wrong.append(f"{words}: {error}")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("more", [[], ["--overwrite"]])
@pytest.mark.parametrize("verb", ["convert", "finetune", "evaluate", "export"])
def test_outs(refused, verb, more):
    words = VERBS[verb] if verb != "export" else ["export", "{sparse}", "{out}"]
    for out in OUTS:
        refused([*(word if word != "{out}" else out for word in words), *more])


@pytest.mark.parametrize(
    "out", ["hf://someone/model", "https://huggingface.co/a/b", "s3://a/b", "file:///a"]
)
@pytest.mark.parametrize("verb", ["convert", "finetune", "evaluate", "export"])
def test_outs_elsewhere(refused, verb, out):
    """They became folders here, hf: first, for whoever believed that a model had been sent."""
    export = ["export", "{sparse}", out]
    said = refused(
        export if verb == "export" else [w if w != "{out}" else out for w in VERBS[verb]]
    )
    assert "is an address" in said and ("push" in said) is out.startswith(("hf", "http"))


@pytest.mark.parametrize("place", ["SPARSEK_CACHE_DIR", "SPARSEK_STATE_DIR", "HOME"])
def test_settings_that_lead_nowhere(refused, monkeypatch, world, place):
    monkeypatch.setenv(place, str(world.root / "text.txt"))
    if place == "SPARSEK_CACHE_DIR":
        refused(FINETUNE)
    else:
        refused(["chat", "--prompt", "", "--max-new-tokens", "1"])


def test_they_are_many():
    """The bar is 160; every line above is one."""
    single = sum(map(len, LINES.values())) + len(NAMES) * len(VERBS) + len(OUTS) * 8
    files = len(DATA) * 2 + len(RECIPES) * 3 + len(TOKENIZERS) * 5
    assert len(EACH) + single + files > 400
