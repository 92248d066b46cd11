"""Hints that are commands or settings are followed to the letter, and then it works.

Each case is a line that is refused, what its hint must say, and what whoever follows it types: a
line of its own, or words added to the first one; \\1 stands for what the hint itself names. What
needs a GPU, the network or another file is only held to name something real (test_hints.py).
"""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
from bad_lines import BENCH, CHAT, CONVERT, EVALUATE, FINETUNE

DRY = "--dry-run"
DENSE = ["finetune", "{good}", *FINETUNE[2:]]
# Line, words of the hint, what to type instead; a list that begins with "+" is added to the line.
CASES: dict[str, tuple[list[str], str, list[str]]] = {
    "budget": ([*CONVERT, "--budget", "3"], r"give at least (\d+)", ["+", "--budget", r"\1"]),
    "budget-window": (
        [*CONVERT, "--budget", "12", "--window", "11"], "or a smaller --window", ["+", "--window",
        "3"],
    ),
    "two-sizes": (
        [*CONVERT, "--budget", "64", "--topk", "8"], "give one of the two", [*CONVERT, "--topk",
        "8"],
    ),
    "two-sizes-null": (
        [*CONVERT, "--recipe", "{eight}", "--budget", "16"], "(topk=null) or", ["+",
        r"\1"],
    ),
    "two-sizes-null-budget": (
        ["convert", "{good}", "{out}", "--recipe", "tiny", "topk=8", "calibrate_length=null", DRY],
        "(budget=null) drops a recipe's", ["+", r"\1"],
    ),
    "exists": (
        ["convert", "{good}", "{there}", *CONVERT[3:]], "add --overwrite", ["+", "--overwrite"],
    ),
    "exists-other": (["convert", "{good}", "{there}", *CONVERT[3:]], "another folder", CONVERT),
    "converted": (
        ["convert", "{sparse}", "{out}", "--calibrate", "none"], "--again", ["+", "--again"],
    ),
    "converted-chat": (
        ["convert", "{sparse}", "{out}"], "`sparsek chat`", ["chat", "{sparse}", *CHAT[2:]],
    ),
    "copy-of-scorers": (
        [*CONVERT, "--scorers-only", "--copy"], "hold nothing of the base",
        [*CONVERT, "--scorers-only"],
    ),
    "calibrate-length": (
        [*CONVERT[:3], "--calibrate-length", "9999999", DRY], r"give at most (\d+)",
        ["+", "--calibrate-length", r"\1"],
    ),
    "nothing-to-choose": (
        [*CONVERT[:3], "--budget", "400", "--calibrate-length", "64", DRY],
        "--calibrate none and no calibrate_length", [*CONVERT, "--budget", "400", DRY],
    ),
    "calibrate-none": (
        [*CONVERT, "--calibrate-length", "64"], "leave one of the two out", CONVERT,
    ),
    "calibrate-none-null": (
        ["convert", "{good}", "{out}", "calibrate=none", "calibrate_tokens=512", DRY],
        "(calibrate_tokens=null)", ["+", r"\1"],
    ),
    "model": (
        ["convert", "tinny", "{out}", DRY], "did you mean '(.*?)'", ["convert", r"\1", "{out}",
        DRY],
    ),
    "names": (
        ["convert", "nothing-like-it", "{out}"], "`sparsek (convert --list-models)`", [r"\1"],
    ),
    "beside": (["doctor", "{world}/goood"], "did you mean '(.*?)'", ["doctor", r"\1"]),
    "inside": (["doctor", "{world}/above"], "did you mean '(.*?)'", ["doctor", r"\1"]),
    "weights": (
        ["doctor", "{good}/model.safetensors"], "name its folder, '(.*?)'", ["doctor", r"\1"],
    ),
    "revision": (["doctor", "{good}", "--revision", "x"], "drop it", ["doctor", "{good}"]),
    "verb": (["doctr", "{good}"], "did you mean '(.*?)'", [r"\1", "{good}"]),
    "option": ([*CHAT, "--sed", "1"], "did you mean '(.*?)'", [*CHAT, r"\1", "1"]),
    "key": ([*FINETUNE, DRY, "batch_sise=1"], "did you mean '(.*?)'", [*FINETUNE, DRY, r"\1=1"]),
    "device": ([*CHAT, "--device", "cuda:99"], "(--device cpu)", ["+", r"\1"]),
    "device-kind": ([*CHAT, "--device", "tpu"], "use auto, (cpu)", ["+", "--device", r"\1"]),
    "dtype": ([*CHAT, "--dtype", "int8"], "use one of .*(float32)", ["+", "--dtype", r"\1"]),
    "prompt": (["chat", "{sparse}", "--prompt", " "], "--prompt TEXT", [*CHAT, "--prompt", "TEXT"]),
    "top-p": ([*CHAT, "--top-p", "2"], "up to (1)", ["+", "--top-p", r"\1"]),
    "system": (
        ["chat", "{plain}", "--system", "be kind", *CHAT[2:]], "put the instruction into your text",
        ["chat", "{plain}", "--prompt", "be kind", *CHAT[4:]],
    ),
    "state": (
        [*CHAT, "--state", "{text}"], "name another file", CHAT,
    ),
    "export": (["export", "{good}", "{out}"], "`sparsek convert`", ["export", "{sparse}", "{out}"]),
    "export-model": (["export"], "`sparsek convert` wrote", ["export", "{sparse}", "{out}"]),
    "export-both": (
        ["export", "{sparse}", "{out}", "--scorers", "--copy"], "drop one of them",
        ["export", "{sparse}", "{out}", "--scorers"],
    ),
    "export-dense": (
        ["export", "{good}", "{out}", "--scorers"],
        "`sparsek (convert) MODEL OUT (--scorers-only)`",
        [r"\1", "{good}", "{out}", r"\2", "--calibrate", "none"],
    ),
    "merge": (
        ["merge", "{good}"], "`sparsek merge BASE SCORERS OUT`", ["merge", "{good}", "{scorers}",
        "{out}"],
    ),
    "merge-nothing": (
        ["merge", "{good}", "nowhere", "{out}"], "`sparsek export --scorers` wrote",
        ["merge", "{good}", "{scorers}", "{out}"],
    ),
    "merge-on-converted": (
        ["merge", "{sparse}", "{scorers}", "{out}"], "name its dense base",
        ["merge", "{good}", "{scorers}", "{out}"],
    ),
    "merge-dense-by-export": (
        ["merge", "{sparse}", "{scorers}", "{out}"], "`sparsek (export)` writes one",
        [r"\1", "{sparse}", "{out}"],
    ),
    "scorers-as-model": (
        ["chat", "{scorers}", *CHAT[2:]], "`sparsek (merge) .* (\\S+) OUT`", [r"\1", "{good}",
        r"\2", "{out}"],
    ),
    "push-name": (
        ["push", "{sparse}", "owner", DRY], "(owner/name)", ["push", "{sparse}", r"\1", DRY],
    ),
    "push-words": (
        ["push", "{sparse}"],
        "`sparsek push FOLDER (owner/name)`",
        ["push", "{sparse}", r"\1", DRY],
    ),
    "push-foreign": (
        ["push", "{good}", "a/b", DRY], "wrote|did not write", ["push", "{sparse}", "a/b", DRY],
    ),
    "bench": (["bench", "dance"], r"choose one of .*(generate)", [*BENCH]),
    "bench-model": (
        ["bench", "generate"], r"sparsek bench (generate) MODEL", ["bench", r"\1", *BENCH[2:]],
    ),
    "bench-heads": (
        ["bench", "generate", "{sparse}", "--lengths", "far"], "--lengths (4096),8192", BENCH,
    ),
    "recipe": (["recipes", "show", "nobody"], "`sparsek (recipes) (list)`", [r"\1", r"\2"]),
    "recipe-near": (
        ["recipes", "show", "tiny.finetun"], "did you mean '(.*?)'", ["recipes", "show", r"\1"],
    ),
    "recipe-word": (
        [*FINETUNE, DRY, "seed"], "takes MODEL and OUT, then key=value words",
        [*FINETUNE, DRY, "seed=1"],
    ),
    "scorers-of-dense": ([*DENSE, DRY], "train=all or (train=lora)", ["+", r"\1"]),
    "scorers-of-dense-all": ([*DENSE, DRY], "(train=all) or", ["+", r"\1"]),
    "scorers-of-dense-convert": ([*DENSE, DRY], "`sparsek convert`", CONVERT),
    "batch": (
        [*FINETUNE, DRY, "batch_size=3", "micro_batch_size=2"], r"set (batch_size=\d+)", ["+",
        r"\1"],
    ),
    "distill": (
        [*DENSE, "train=all", "objective.distill=1"],
        "set (objective.distill=0)", ["+", r"\1"],
    ),
    "lora-targets": (
        [*DENSE, DRY, "train=lora", "lora.targets=[none]"], "layers of this model: (.*)",
        ["+", r"lora.targets=[\1]"],
    ),
    "strategy": (
        [*FINETUNE, DRY, "launch.offload=true"], "set launch.strategy=fsdp or zero3",
        [*FINETUNE, DRY],
    ),
    "column": (
        [*FINETUNE[:4], "{columns}", *FINETUNE[5:], DRY], r"takes another \((.*?),",
        ["+", r"\1"],
    ),
    "kind": (
        [*FINETUNE, DRY, "data.more.kind=txt"], r"set (data.more.kind) to one of .*(needles)",
        [*FINETUNE, DRY, "data.more.kind=needles", "data.more.filler=text"],
    ),
    "key-of-a-source": (
        [*FINETUNE, DRY, "data.text.los=text"], "did you mean '(data.text.loss)'",
        [*FINETUNE, DRY, "data.text.loss=text"],
    ),
    "no-tokenizer": (
        ["finetune", "{out}", "--recipe", "{random}", "tokenizer=nowhere"], "with tokenizer.json",
        ["finetune", "{out}", "--recipe", "{random}", "tokenizer={good}"],
    ),
    "encoding": (
        [*FINETUNE[:4], "{latin}", *FINETUNE[5:], DRY], "(iconv -f latin1 -t utf-8) IN > OUT",
        [*FINETUNE, DRY],
    ),
    "task": ([*EVALUATE, "--tasks", "pppl"], "did you mean '?(.*?)'?\\?", ["+", "--tasks", r"\1"]),
    "task-list": ([*EVALUATE, "--tasks", "zzz"], "`sparsek (evaluate) (--list)`", [r"\1", r"\2"]),
    "baseline": (
        [*EVALUATE, "--baselines", "windw"], "did you mean '(.*?)'", ["+", "--baselines", r"\1"],
    ),
    "budgets": (
        [*EVALUATE, "--budgets", "2", "--baselines", "window"], r"name (--budgets) of (\d+)",
        ["+", r"\1", r"\2"],
    ),
    "lengths": (
        [*EVALUATE, "--lengths", "999999"], r"name lengths up to (\d+)", ["+", "--lengths", "32"],
    ),
    "max-length": (
        [*EVALUATE, "--lengths", "5000"], r"(--max-length) (?:N )?allows more", ["+", r"\1",
        "5000"],
    ),
    "short-text": (
        [word if word != "{text}" else "{short}" for word in EVALUATE], "longer text with (--text)",
        ["+", r"\1", "{text}"],
    ),
    "recall-length": (
        [*EVALUATE, "--tasks", "recall_1", "--lengths", "8"], "name larger (--lengths)", ["+",
        r"\1", "3000"],
    ),
    "template": (
        ["evaluate", "{plain}", *EVALUATE[2:], "chat_template=on"], "leave chat_template out",
        ["evaluate", "{plain}", *EVALUATE[2:]],
    ),
    "measured": (
        ["evaluate", "{sparse}", "-o", "{measured}", *EVALUATE[4:]], "(--resume) keeps", ["+",
        r"\1"],
    ),
    "measured-again": (
        ["evaluate", "{sparse}", "-o", "{measured}", *EVALUATE[4:]], "(--overwrite) measures",
        ["+", r"\1"],
    ),
    "compare": (
        ["evaluate", "--compare", "{good}", "{good}"], "written by `sparsek evaluate`",
        ["evaluate", "--compare", "{measured}", "{measured}"],
    ),
    "ends": (
        ["evaluate", "{endless}", *EVALUATE[2:]], '"(eos_token)"', ["evaluate", "{ended}",
        *EVALUATE[2:]],
    ),
    "cache-dtype": (
        ["chat", "{good}", *CHAT[2:], "--cache-dtype", "int8"], r"convert it first|leave the cache",
        ["chat", "{good}", *CHAT[2:]],
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def world(tmp_path_factory, make_checkpoint) -> SimpleNamespace:
    """Good things of each kind, made once; lines write to `out` and nowhere else."""
    from bad_models import config, file, tokenizer_config
    from verbs import convert, evaluate

    from sparsek_cli.recipes.schema_convert import ConvertRecipe
    from sparsek_cli.recipes.schema_evaluate import EvaluateRecipe

    root = tmp_path_factory.mktemp("hints")
    good = make_checkpoint(root / "good")

    def converted(model: Path, name: str, **options) -> Path:
        recipe = ConvertRecipe(
            model=str(model), out=str(root / name), calibrate="none", topk=6, window=4, **options
        )
        return Path(convert(recipe).out)

    sparse = converted(good, "sparse")
    converted(good, "scorers", scorers_only=True)
    file("chat_template.jinja", None)(sparse, root / "plain")
    file("tokenizer_config.json", "{}")(sparse, root / "endless")
    tokenizer_config(eos_token="</s>")(root / "endless", root / "ended")
    (root / "above").mkdir()
    config()(good, root / "above" / "model")
    words = "a few words and a few more. "
    (root / "text.txt").write_text(words * 400)
    (root / "eight.yaml").write_text("topk: 8\n")
    (root / "long.txt").write_text(words * 4000)
    (root / "short.txt").write_text("words")
    (root / "latin.txt").write_bytes(b"caf\xe9 " * 400)
    (root / "columns.jsonl").write_text('{"words": "a few words and a few more"}\n' * 40)
    (root / "random.yaml").write_text(
        "init: random\narchitecture: {type: llama, settings: {hidden_size: 32, "
        "intermediate_size: 48, num_hidden_layers: 2, num_attention_heads: 4}}\n"
        f"train: all\nsparsek: null\nsteps: 1\nsequence_length: 32\nbatch_size: 1\n"
        f"data: {{text: {{kind: text, files: {root / 'text.txt'}}}}}\n"
    )
    measured = root / "measured"
    evaluate(
        EvaluateRecipe(
            model=str(sparse), out=str(measured), tasks=["ppl"], lengths=[32], limit=1,
            text=[str(root / "text.txt")], baselines=["dense"],
        )
    )  # fmt: skip
    places = {path.name.split(".")[0]: path for path in root.iterdir()}
    places |= {"world": root, "out": root / "out", "there": root / "there"}
    return SimpleNamespace(root=root, places=places)


# Slow: all of lm-eval's tasks are listed.
@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=pytest.mark.slow) if n == "task-list" else n for n in CASES],
)
def test_it_works(name, world, sparsek, monkeypatch):
    line, says, typed = CASES[name]
    monkeypatch.chdir(world.root)
    monkeypatch.setenv("SPARSEK_CACHE_DIR", str(world.root / "cache"))
    for place in ("out", "there"):
        shutil.rmtree(world.places[place], ignore_errors=True)
    shutil.copytree(world.places["sparse"], world.places["there"])

    def run(words: list[str]):
        return sparsek(*(re.sub(r"\{(\w+)\}", lambda m: str(world.places[m[1]]), w) for w in words))

    refused = run(line)
    assert refused.failed(2) or refused.failed(1), refused
    hint = refused.err.strip().splitlines()[-1]
    found = re.search(says, hint)
    assert found, hint
    # A whole word of the hint may be several of the line: `convert --list-models`.
    followed = [
        w
        for word in typed
        if word != "+"
        for w in (found.expand(word).split() if word[0] == "\\" else [found.expand(word)])
    ]
    done = run([*line, *followed] if typed[0] == "+" else followed)
    assert done.code == 0, done
