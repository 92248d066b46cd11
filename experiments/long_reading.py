"""Reading a million tokens in constant memory, and a long conversation about a long document.

    python -m experiments.long_reading OUT --model tiny-sparsek [--lengths 50000 1000000] \\
        [--document 65536] [--documents 4] [--turns 20] [--yarn 8]

Reading: `sparsek chat MODEL --load FILE --prompt QUESTION` for documents of each length, a process
each; its peak memory, and its processor time per token beyond what a short document takes.
Conversation: a document with facts is read in the first turn. Every fact is asked for at once, each
on a fork of the cache that has just read it; then the same conversation goes on for `--turns`
turns, of which the last ask for the same facts. Nothing may be read twice, and a turn must cost
what the first one cost: tokens fed and bytes of slots are counted, processor time is reported.

Bars: at the longest length peak memory within 3 % and time per token within 10 % of the shortest.
`--smoke`: toy sizes. Time on one core: two minutes a million tokens of `tiny`.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from experiments.suite import load
from sparsek_cli import hub
from sparsek_cli.benchmarks.session import Session, arguments
from sparsek_cli.data.filler import Filler
from sparsek_cli.data.generated_text import generated_text
from sparsek_cli.data.needles import NeedleDocument, is_correct, make_document
from sparsek_cli.data.phrasings import phrasings
from sparsek_cli.devices import choose_device, choose_dtype
from sparsek_cli.dialogue.drawing.sampling import Sampling
from sparsek_cli.dialogue.engine import Engine
from sparsek_cli.dialogue.session import Session as Conversation
from sparsek_cli.errors import SparsekError
from sparsek_cli.loading import load_tokenizer

SHORT = 1000  # tokens: what a process takes beside reading
FACTS = 8
SEED = 11
SENTENCES = 20_000  # of filler, about 13 tokens each; longer documents repeat them
SMALL_TALK = ("Thank you.", "What is this text about?", "Go on.", "Say it in other words.")
COLUMNS = (
    "tokens", "peak_mib", "ms_per_token", "turns", "fed_again", "first_turn_s", "last_turn_s",
    "asked", "fresh", "after",
)  # fmt: skip


def main() -> None:
    given = _arguments()
    session = Session.of(given)
    tokenizer = load_tokenizer(hub.resolve(given.model))
    rng = np.random.default_rng(SEED)
    filler = Filler.from_documents([generated_text(rng, SENTENCES)], tokenizer)
    if given.lengths:
        session.run("reading", partial(read_all, session, given, filler))
    if given.document:
        session.run("conversation", partial(converse_all, session, given, filler, tokenizer))
    print(session.table(COLUMNS), flush=True)


def _arguments() -> argparse.Namespace:
    parser = arguments("experiments.long_reading", __doc__, seconds=1200)
    parser.add_argument("--model", required=True, help="a converted model")
    parser.add_argument("--lengths", nargs="*", type=int, default=[50_000, 1_000_000])
    parser.add_argument("--document", type=int, default=65_536, help="tokens; 0: no conversation")
    parser.add_argument("--documents", type=int, default=4)
    parser.add_argument("--turns", type=int, default=20)
    parser.add_argument("--yarn", type=float, help="stretch rotary positions in the conversation")
    given = parser.parse_args()
    if given.smoke:
        given.lengths, given.document, given.documents, given.turns = [1500, 3000], 2000, 1, 10
    return given


def read_all(session: Session, given: argparse.Namespace, filler: Filler) -> None:
    """A row per length; the bars of the longest against the shortest."""
    start = _read_once(session.folder, given.model, filler, SHORT)
    rows = []
    for length in sorted(given.lengths):
        done = _read_once(session.folder, given.model, filler, length)
        more = done["tokens"] - start["tokens"]
        done["ms_per_token"] = 1e3 * (done["cpu_s"] - start["cpu_s"]) / more
        session.row(**done)
        rows.append(done)
    memory = rows[-1]["peak_mib"] / rows[0]["peak_mib"] - 1
    speed = rows[-1]["ms_per_token"] / rows[0]["ms_per_token"] - 1
    session.record["reading"] = {"memory": memory, "ms_per_token": speed}
    session.say(f"memory {memory:+.1%} (bar 3 %), time per token {speed:+.1%} (bar 10 %)")


def _read_once(folder: Path, model: str, filler: Filler, length: int) -> dict[str, Any]:
    """`sparsek chat` over one document, as a process of its own."""
    made = _document(filler, length, 0)
    file = folder / "document.txt"
    file.write_text(made.text, encoding="utf-8")
    words = ["chat", model, "--load", str(file), "--prompt", made.facts[0].question, "--json",
             "--temperature", "0", "-q"]  # fmt: skip
    del made
    with (folder / "reply.json").open("wb") as out:
        child = subprocess.Popen([sys.executable, "-m", "sparsek_cli", *words], stdout=out)
        _, status, used = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode:
        raise SparsekError(f"sparsek {' '.join(words)} ended with {child.returncode}", hint="above")
    reply = json.loads((folder / "reply.json").read_text())
    return {
        "tokens": reply["context_tokens"],
        "peak_mib": used.ru_maxrss / 1024,
        "cpu_s": used.ru_utime + used.ru_stime,
        "kv_bytes": reply["kv_bytes"],
    }


def _document(filler: Filler, tokens: int, number: int) -> NeedleDocument:
    rng = np.random.default_rng([SEED, number])
    depths = (np.arange(FACTS) + rng.random(FACTS)) / FACTS
    return make_document(
        rng, filler, tokens=tokens, needles=FACTS, phrasings=phrasings("calibration"), depths=depths
    )


def converse_all(session: Session, given: argparse.Namespace, filler: Filler, tokenizer) -> None:
    """A row per document, and how often facts were found, at once and after all the turns."""
    model = _loaded(given)
    rows = [
        _converse(model, tokenizer, _document(filler, given.document, number), given.turns)
        for number in range(given.documents)
    ]
    for row in rows:
        session.row(**row)
    total = {name: sum(row[name] for row in rows) for name in ("asked", "fresh", "after")}
    session.record["conversation"] = total
    session.say(f"found of {total['asked']}: {total['fresh']} at once, {total['after']} after")


def _loaded(given: argparse.Namespace) -> Any:
    device = choose_device(given.device)
    dtype = choose_dtype("auto", device)
    if given.yarn is None:
        return load(Path(given.model), device, dtype)
    from sparsek_cli.evaluation.measured_model import load_measured
    from sparsek_cli.evaluation.settings import Loading

    how = Loading(given.device, "auto", given.yarn)
    return load_measured(hub.resolve(given.model), how, sparse=True)[0]


def _converse(model: Any, tokenizer: Any, made: NeedleDocument, turns: int) -> dict[str, Any]:
    talk = Conversation(Engine(model), tokenizer, Sampling(max_new_tokens=16))
    talk.load(made.text)
    talk.fork("read")
    fresh = []
    for fact in made.facts:
        talk.switch("read")
        fresh.append(is_correct("".join(talk.ask(fact.question)), fact.expected))
    talk.switch("read")
    before, seconds, fed = talk.engine.cache.nbytes, [], [talk.engine.tokens]
    after = []
    asked = [*([None] * (turns - FACTS)), *made.facts]
    for number, fact in enumerate(asked):
        words = SMALL_TALK[number % len(SMALL_TALK)] if fact is None else fact.question
        start = time.process_time()
        reply = "".join(talk.ask(words))
        seconds.append(time.process_time() - start)
        fed.append(talk.engine.tokens)
        if fact is not None:
            after.append(is_correct(reply, fact.expected))
    if talk.engine.cache.nbytes != before:
        raise SparsekError("the cache has grown", hint="please report this")
    return {
        "tokens": fed[0],
        "turns": len(asked),
        "fed_again": sum(b - a > fed[0] / 2 for a, b in zip(fed, fed[1:], strict=False)),
        "first_turn_s": statistics.median(seconds[:4]),
        "last_turn_s": statistics.median(seconds[-4:]),
        "asked": len(made.facts),
        "fresh": sum(fresh),
        "after": sum(after),
    }


if __name__ == "__main__":
    main()
