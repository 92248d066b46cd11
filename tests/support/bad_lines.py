"""Command lines that ask for what cannot be done, by kind of mistake.

Each is the words after `sparsek`; places of the world (see cli/test_hostile_input.py) are named in
braces, {good} being a dense model and {sparse} its conversion.
"""

from __future__ import annotations

import json

TURNS = {"messages": [{"role": "user", "content": "hi"}]}
TEXT = b'{"text": "a few words and a few more"}\n'
# Files of text that cannot be read.
DATA: dict[str, bytes] = {
    "latin.txt": b"caf\xe9",
    "utf16.jsonl": '{"text": "words"}\n'.encode("utf-16"),
    "utf16-later.jsonl": TEXT + '{"text": "words"}\n'.encode("utf-16-le"),
    "blank.txt": b" \n\t\n",
    "empty.jsonl": b"",
    "numbers.jsonl": b'{"text": 3}\n',
    "lists.jsonl": b"[1, 2]\n",
    "digits.jsonl": b'{"text": ' + b"9" * 5000 + b"}\n",
    "cut.jsonl": TEXT + b'{"text": "a\n',
    "deep.jsonl": b'{"text": ' + b"[" * 100_000,
    "columns.jsonl": b'{"prompt": "a", "\\u001b]0;title\\u0007": "b"}\n',
    "surrogate.jsonl": b'{"text": "half \\ud83d"}\n',
    "messages.jsonl": json.dumps(TURNS).encode() + b"\n",
    "shared.jsonl": b'{"conversations": [{"from": "human", "value": "hi"}]}\n',
    "nulls.jsonl": b'{"text": null}\n',
    "no.parquet": b"PAR1 and nothing",
    "no.jsonl.zst": b"\x28\xb5\x2f\xfd and nothing",
    "book.docx": b"PK",
}
RECIPES: dict[str, bytes] = {
    "cut.yaml": b"a: [1\n",
    "tab.yaml": b"a:\n\t- 1\n",
    "list.yaml": b"- 1\n",
    "word.yaml": b"hello\n",
    "twice.yaml": b"seed: 1\nseed: 2\n",
    "unknown.yaml": b"seeed: 1\n",
    "unknown-escape.yaml": b'"se\\x1bed": 1\n',
    "type.yaml": b"seed: fast\n",
    "utf16.yaml": "seed: 1\n".encode("utf-16"),
    "nul.yaml": b"seed: \x00\n",
    "object.yaml": b"seed: !!python/object/apply:os.system [echo]\n",
    "recursive.yaml": b"seed: &a [*a]\n",
    "bomb.yaml": b"".join(
        b"a%d: &a%d [%s]\n" % (i, i, b",".join([b"*a%d" % (i - 1)] * 9 if i else [b"1"] * 9))
        for i in range(9)
    ),
    "deep.yaml": b"seed: " + b"{a: " * 2000,
    "itself.yaml": b"extends: itself\n",
    "orphan.yaml": b"extends: nobody\n",
    "extends.yaml": b"extends: 3\n",
    "big.yaml": b"#" * (1 << 20) + b"\nseed: 1\n",
    "date.yaml": b"seed: 2020-13-45\n",
    "key.yaml": b"? [1, 2]\n: 3\n",
    "octal.yaml": b"seed: 010\n",
    "sixties.yaml": b"seed: 1:30\n",
    "seed-below.yaml": b"seed: -1\n",
    "seed-far.yaml": b"seed: 99999999999999999999\n",
}

CONVERT = ["convert", "{good}", "{out}", "--calibrate", "none"]
FINETUNE = ["finetune", "{sparse}", "{out}", "--data", "{text}", "sequence_length=32",
            "batch_size=1", "--steps", "1"]  # fmt: skip
EVALUATE = ["evaluate", "{sparse}", "-o", "{out}", "--tasks", "ppl", "--lengths", "32", "--limit",
            "1", "--text", "{text}", "--baselines", "dense"]  # fmt: skip
CHAT = ["chat", "{sparse}", "--prompt", "hi", "--max-new-tokens", "1"]
BENCH = ["bench", "generate", "{sparse}", "--lengths", "8", "--tokens", "1", "--repeats", "1"]

LINES: dict[str, list[list[str]]] = {
    "usage": [
        ["covert"], ["--nothing"], ["convert"], ["convert", "{good}", "{out}", "third"],
        ["convert", "{good}", "--topk"], ["finetune"], ["evaluate", "{good}", "second"],
        ["chat", "{good}", "second"], ["doctor", "{good}", "second"], ["bench", "dance"],
        ["bench", "generate"], ["bench", "attention", "--heads", "3/2"],
        ["bench", "attention", "--heads", "many"], ["bench", "attention", "--dim", "0"],
        ["bench", "attention", "--against", "nobody"], ["bench", "attention", "--gate", "soft"],
        ["bench", "attention", "--lengths", "0"], ["bench", "attention", "--lengths", "far"],
        ["bench", "attention", "--lengths", ","], ["bench", "attention", "--repeats", "0"],
        ["bench", "decode", "--batch", "0"], ["bench", "--plot", "plot.txt"],
        ["bench", "--plot", "nowhere/plot.png"], ["bench", "--plot", "{foreign}"],
        ["recipes", "dance"], ["recipes", "show"], ["recipes", "show", "nobody"],
        ["recipes", "show", "{foreign}"], ["recipes", "copy", "tiny.convert", "{text}"],
        ["recipes", "copy", "tiny.convert", "{text}", "--overwrite"],
        ["recipes", "copy", "tiny.convert", "nowhere/deep/r.yaml"], ["recipes", "show", "{fifo}"],
        ["export"], ["export", "{good}", "{out}"], ["merge"], ["merge", "{good}"],
        ["convert", "{sparse}", "{out}"],
        [*("{good}/out" if word == "{out}" else word for word in CONVERT)],
        ["export", "{sparse}", "{sparse}/out"], ["export", "{sparse}", "{sparse}/s", "--scorers"],
        ["export", "{sparse}", "{sparse}/s.safetensors", "--scorers"],
        ["finetune", "{sparse}", "{sparse}/out", *FINETUNE[3:]],
    ],
    "sharing": [
        ["serve", "{sparse}", "--engine", "nobody", "--dry-run"],
        ["serve", "{sparse}", "--port", "0"], ["serve", "{sparse}", "--dtype", "int8"],
        ["serve", "{sparse}", "second"],
        ["serve", "{sparse}", "--port", "many"], ["push"], ["push", "{sparse}"],
        ["push", "{sparse}", "no-owner"], ["push", "{sparse}", "a/b/c"], ["push", "{sparse}", ""],
        ["push", "{foreign}", "a/b"], ["push", "{good}", "a/b"], ["push", "{text}", "a/b"],
        ["push", "nowhere", "a/b"], ["push", "{sparse}", "a/b", "--evaluation", "{foreign}"],
        ["push", "{sparse}", "a/b", "--evaluation", "nowhere"],
        ["merge", "{good}", "{text}", "{out}"], ["merge", "{good}", "{foreign}", "{out}"],
        ["merge", "{good}", "nowhere", "{out}"], ["merge", "{good}", "{weights}", "{out}"],
        ["merge", "{sparse}", "{sparse}", "{out}"], ["merge", "{good}", "{fifo}", "{out}"],
        ["merge", "{good}", "nowhere/scorers.safetensors", "{out}"],
        [*FINETUNE, "data_workers=100000"], [*FINETUNE, "evaluation.held_out=1.01"],
        [*CONVERT, "--tokenizer", "fifo-tokenizer"], [*CONVERT, "--tokenizer", "{fifo}"],
        ["export", "{sparse}", "{out}", "--scorers", "--copy"], ["export", "{text}", "{out}"],
        ["export", "{sparse}", "{foreign}", "--scorers"], ["export", "{sparse}", "{sparse}"],
    ],
    "numbers": [
        [*CONVERT, "--topk", "-1"], [*CONVERT, "--topk", "many"], [*CONVERT, "--window", "0"],
        [*CONVERT, "--sinks", "-1"], [*CONVERT, "--budget", "0"], [*CONVERT, "--budget", "3"],
        [*CONVERT, "--topk", "9" * 18], [*CONVERT, "--budget", "9" * 18],
        [*CONVERT, "--sinks", "9" * 18], [*CONVERT[:3], "--calibrate-tokens", "9" * 18],
        [*CONVERT, "--budget", "64", "--topk", "8"], [*CONVERT, "--gate", "soft"],
        [*CONVERT, "topk=1e400"], [*CONVERT, "topk=" + "9" * 5000], [*CONVERT, "topk=.nan"],
        [*CONVERT[:3], "--calibrate-tokens", "-5"],
        [*CONVERT[:3], "--calibrate-length", "10000000"],
        [*CONVERT[:3], "--calibrate-tokens", "0"], [*CONVERT[:3], "recall=.inf"],
        [*CONVERT[:3], "recall=2"],
        [*FINETUNE, "--steps", "0"], [*FINETUNE, "--steps", "-3"], [*FINETUNE, "--steps", "1e99"],
        [*FINETUNE, "learning_rate=.inf"], [*FINETUNE, "learning_rate=.nan"],
        [*FINETUNE, "learning_rate=-1"], [*FINETUNE, "weight_decay=.inf"],
        [*FINETUNE, "sequence_length=0"], [*FINETUNE, "batch_size=0"],
        [*FINETUNE, "sequence_length=1000000000"], [*FINETUNE, "batch_size=1000000000"],
        [*FINETUNE, "micro_batch_size=1000000000"],
        ["bench", "decode", "--heads", "1000000000/1"], ["bench", "decode", "--heads", "9" * 5000],
        ["bench", "decode", "--lengths", "1000000000"],
        ["bench", "decode", "--lengths", "9" * 5000],
        [*FINETUNE, "batch_size=3", "micro_batch_size=2"], [*FINETUNE, "train=some"],
        [*FINETUNE, "train=lora", "lora.rank=0"], [*FINETUNE, "train=lora", "lora.targets=[none]"],
        [*FINETUNE, "evaluation.held_out=2"], [*FINETUNE, "objective.distill=.inf"],
        [*FINETUNE, "save_steps=-1"], [*FINETUNE, "--seed", "many"], [*FINETUNE, "dtype=int8"],
        [*FINETUNE, "report_to=[nobody]"], [*FINETUNE, "launch.strategy=fsdp"],
        [*FINETUNE, "data.text.weight=0"], [*FINETUNE, "data.text.loss=half"],
        [*FINETUNE, "--data", "columns.jsonl", "data.text.column=nothing"],
        [*FINETUNE, "budget_stages=[2, 0.5]"],
        [*EVALUATE, "--lengths", "0"], [*EVALUATE, "--lengths", "-5"],
        [*EVALUATE, "--lengths", "x"],
        [*EVALUATE, "--lengths", "99999999"], [*EVALUATE, "--limit", "0"],
        [*EVALUATE, "--batch-size", "1000000000"], [*EVALUATE, "--max-length", "1000000000"],
        [*EVALUATE, "--limit", "-1"], [*EVALUATE, "--tasks", "pppl"], [*EVALUATE, "--tasks", ","],
        [*EVALUATE, "--baselines", "windw"], [*EVALUATE, "--baselines", "kvpress:nobody"],
        [*EVALUATE, "--budgets", "0"], [*EVALUATE, "--max-length", "0"],
        [*EVALUATE, "--yarn", "0.5"],
        [*EVALUATE, "--yarn", "nan"], [*EVALUATE, "--truncate", "right"],
        [*EVALUATE, "--batch-size", "0"], [*EVALUATE, "--text", "nowhere.txt"],
        [*EVALUATE, "--data", "nowhere"], [*EVALUATE, "chat_template=maybe"],
        [*CHAT, "--temperature", "-1"], [*CHAT, "--temperature", "nan"], [*CHAT, "--top-p", "0"],
        [*CHAT, "--top-p", "nan"], [*CHAT, "--top-p", "2"], [*CHAT, "--max-new-tokens", "0"],
        [*CHAT, "--prompt", ""], [*CHAT, "--prompt", " \n"], [*CHAT, "--prompt", "caf\udce9"],
        [*CHAT, "--system", "caf\udce9"], [*CHAT, "--seed", "x"], [*CHAT, "--temperature", "inf"],
        [*CHAT, "--load", "{fifo}"], [*CHAT, "--load", "nowhere.txt"],
        [*CHAT, "--load", "{foreign}"],
        [*CHAT, "--state", "nowhere"], [*CHAT, "--state", "{text}"],
        [*CHAT, "--state", "{weights}"], [*CHAT, "--state", "{fifo}"],
        [*CHAT, "--device", "cuda:99"], [*CHAT, "--device", "tpu"], [*CHAT, "--device", "mps"],
        [*CHAT, "--dtype", "int8"], [*CHAT, "--revision", "main"],
        [*BENCH, "--lengths", "-1"], [*BENCH, "--tokens", "0"],
        ["doctor", "{sparse}", "--device", "x"],
    ],
    "words": [
        [*CONVERT, "nothing=1"], [*CONVERT, "topk.a.b=1"], [*CONVERT, "topk=[1"],
        [*CONVERT, "topk={a: &a [*a]}"], [*FINETUNE, "=1"], [*FINETUNE, "evaluation=3"],
        [*FINETUNE, "data.text=3"], [*EVALUATE, "limits=[1]"], [*EVALUATE, "limits={ppl: 0}"],
        [*CONVERT, "topk=!!python/name:os.system x"],
    ],
}  # fmt: skip
# Places that nothing may be written on: what --overwrite changes for none of them.
OUTS = ("{foreign}", "{text}", "{fifo}", "{socket}", "{link}", "{dangling}", "{good}", "{world}",
        "~", "/", ".", "{text}/below", "{long}", "a\0b", "{fifo}/below", "{sparse}/new",
        "{link}/deep/new", "/proc/nothing", "caf\udce9", "caf\udce9/out")  # fmt: skip
