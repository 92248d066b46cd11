"""Dense, window, random and SparseK from random weights: equal tokens, equal keys, one table.

    python -m experiments.scratch OUT \\
        --train books/train-00.jsonl.zst books/train-01.jsonl.zst \\
        --held-out books/validation.jsonl.zst [--shape llama] [--seconds 420] [--set WORD ...]

Trains the recipe scratch-<shape> in five variants at 8192 tokens, all for the same number of steps
(worked out from the speed of the dense model and the time given), and measures each at once on
windows of unseen novels: at the trained length (whole, and the last quarter), then at two and four
times that length. All but the dense one see 512 keys. `--set` gives dotted words to the two SparseK
rows, sparsek.gate=log for instance. GPT-2 has learned positions and is measured at the trained
length only.

OUT/results.json holds every row with the loss by position. `--smoke`: toy sizes on a CPU, a minute.
Time on one H100: what --seconds says.
"""

import argparse
import json
from functools import partial
from typing import Any

from experiments.steps import Steps
from experiments.suite import by_position as loss_by_position
from experiments.suite import load
from sparsek_cli.benchmarks.session import Session, arguments
from sparsek_cli.data.corpus import Corpus, load_corpus
from sparsek_cli.devices import choose_device, choose_dtype
from sparsek_cli.hub import bundled
from sparsek_cli.loading import load_tokenizer
from sparsek_cli.training.measure import token_losses, windows

# By name: words for the recipe.
VARIANTS: dict[str, tuple[str, ...]] = {
    "dense": ("sparsek=null",),
    "window": ("sparsek.topk=0", "sparsek.window=512"),
    "sparsek": (),
    "random": ("sparsek.scorer=random", "sparsek.topk=252", "sparsek.sinks=4"),
    "alone": ("sparsek.topk=511", "sparsek.window=1"),
}
STEP_TOKENS = 65_536
PROBE_STEPS = 40
# A sparse step may cost this much more than a dense one at the trained length.
SLOWER = 1.25
MEASURED_TOKENS = 524_288  # of each length
SETTINGS = ("warmup=40", "save_steps=0", "evaluation.held_out=0", "documents=joined",
            "data.books.dataset=null", "data_workers=4", "log_steps=50", "tokens=null")  # fmt: skip
SMOKE = ("sequence_length=256", "batch_size=2", "micro_batch_size=2", "data_workers=0", "warmup=1")
SMALL_SHAPES = {
    "gpt2": ("n_embd=64", "n_layer=2", "n_head=2"),
    "llama": ("hidden_size=64", "intermediate_size=96", "num_hidden_layers=2"),
}


def main() -> None:
    given = _arguments()
    session = Session.of(given)
    Experiment(session, given).run()


def _arguments() -> argparse.Namespace:
    parser = arguments("experiments.scratch", __doc__, seconds=420)
    parser.add_argument("--train", nargs="+", required=True, help="text to train on")
    parser.add_argument("--held-out", required=True, help="text that is only measured")
    parser.add_argument("--shape", choices=("llama", "gpt2"), default="llama")
    parser.add_argument("--length", type=int, default=8192, help="trained length in tokens")
    parser.add_argument("--steps", type=int, help="optimiser steps; default: by the time given")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--set", nargs="+", default=[], metavar="WORD", help="for SparseK rows")
    return parser.parse_args()


class Experiment:
    """One variant after the other, each measured as soon as it is trained."""

    def __init__(self, session: Session, given: argparse.Namespace):
        self.session, self.given = session, given
        self.device = choose_device(given.device)
        self.dtype = choose_dtype("auto", self.device)
        self.length = 256 if given.smoke else given.length
        self.lengths = [self.length]
        if given.shape == "llama":
            self.lengths += [2 * self.length, 4 * self.length]
        rows = max(1, STEP_TOKENS // self.length)
        words = [f"device={self.device.type}", *SETTINGS, f"sequence_length={self.length}",
                 f"batch_size={rows}", f"micro_batch_size={rows}",
                 f"data.books.files={json.dumps(list(given.train))}"]  # fmt: skip
        if given.smoke:
            words += [*SMOKE]
            words += [f"architecture.settings.{word}" for word in SMALL_SHAPES[given.shape]]
        self.steps = Steps(session, words)
        self.count = given.steps or (4 if given.smoke else None)
        self.losses: dict[str, float] = {}

    def run(self) -> None:
        """All variants, then the table."""
        text = self.session.run("unseen text", self.unseen)
        if text is None:
            return
        if self.count is None:
            self.count = self.session.run("speed of the dense model", self.choose_steps)
        for name in self.given.variants if self.count else ():
            needs = 0 if self.given.smoke else 20
            self.session.run(name, partial(self.variant, name, text), needs=needs)
        columns = ["model", "keys", "parameters", "tokens", "tokens_per_s", "peak_gib"]
        columns += [f"ppl_{length}" for length in self.lengths]
        print(self.session.table([*columns, "ppl_last", "over_dense"]), flush=True)
        self.session.say(f"wrote {self.session.folder / 'results.json'}")

    def unseen(self) -> Corpus:
        return load_corpus(self.given.held_out, load_tokenizer(bundled().path))

    def choose_steps(self) -> int:
        """As many as all variants can do in the time that is left, the sparse ones being slower."""
        result = self.train("dense", f"steps={PROBE_STEPS}", out="probe")
        each = (self.session.left - 20) / len(self.given.variants) - 8
        return max(60, int(each / SLOWER * result.tokens_per_second / STEP_TOKENS))

    def train(self, name: str, *words: str, out: str) -> Any:
        extra = self.given.set if name in ("sparsek", "alone") else ()
        recipe, place = f"scratch-{self.given.shape}", self.session.folder / out
        return self.steps.finetune(recipe, place, *VARIANTS[name], *words, *extra)

    def variant(self, name: str, text: Corpus) -> None:
        """Trains and measures one; `over_dense` is its excess perplexity in percent."""
        result = self.train(name, f"steps={self.count}", out=name)
        model = load(self.session.folder / name, self.device, self.dtype)
        block = getattr(model.config, "sparsek", None)
        measured: dict[str, Any] = {}
        by_position: dict[str, list[float]] = {}
        for length in self.lengths:
            most = 2 if self.given.smoke else MEASURED_TOKENS // length
            rows = windows(text, length, most)
            if not len(rows):
                self.session.say(f"no unseen document has {length} tokens")
                continue
            losses = token_losses(model, rows, batch_tokens=max(STEP_TOKENS, length))
            measured[f"ppl_{length}"] = float(losses.mean().exp())
            by_position[str(length)] = loss_by_position(losses)
            if length == self.length:
                last = losses[:, losses.shape[1] * 3 // 4 :]
                measured["ppl_last"] = float(last.mean().exp())
        self.losses[name] = measured[f"ppl_{self.length}"]
        dense = self.losses.get("dense")
        self.session.row(
            model=name,
            keys=block["topk"] + block["window"] + block["sinks"] if block else self.length,
            parameters=sum(p.numel() for p in model.parameters()),
            tokens=result.steps * (STEP_TOKENS if not self.given.smoke else 2 * self.length),
            tokens_per_s=round(result.tokens_per_second),
            peak_gib=result.peak_gib,
            **measured,
            over_dense=100 * (self.losses[name] / dense - 1) if dense else None,
            loss_by_position=by_position,
        )


if __name__ == "__main__":
    main()
