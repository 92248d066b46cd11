"""How long a converted model writes when nobody stops it, beside its dense self.

    python -m experiments.free_generation OUT --model SPARSE \\
        --held-out books/validation.jsonl.zst [--length 2048] [--samples 8] [--most 512] \\
        [--policies sparsek window random]

Excerpts of unseen novels, each with a question, in the model's chat template; answers are greedy,
and free: they end where the model ends them, or at `--most` tokens. A model that has lost what it
was asked about, or where it had got to, writes on and on. Each row: tokens of an answer, how many
answers ended by themselves, and the share of an answer's runs of four tokens that had been in it
before. "like_dense" is how far into an answer its tokens are dense attention's.

OUT/results.json holds the rows and all answers; the same command goes on where an earlier one
stopped. `--smoke`: toy sizes. Time on a CPU core: half a minute an answer of 512 tokens by 135M.
"""

import argparse
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch

from experiments.suite import SEED, load
from sparsek_cli import hub
from sparsek_cli.benchmarks.session import Session, arguments
from sparsek_cli.data.chat_format import ChatFormat
from sparsek_cli.data.corpus import load_corpus
from sparsek_cli.data.filler import encode
from sparsek_cli.devices import choose_device, choose_dtype
from sparsek_cli.evaluation.policies.registry import DENSE, OWN, make_policy
from sparsek_cli.loading import load_tokenizer
from sparsek_cli.training.measure import windows

QUESTIONS = (
    "What is this text about? Answer in two sentences.",
    "Who appears in this text? Name them.",
    "Where does this take place?",
    "Sum up what happens here.",
)
RUN = 4  # tokens
# What may differ between a run and its continuation.
FREE = ("policies", "seconds", "out")
COLUMNS = ("policy", "samples", "tokens", "over_dense", "ended", "repeated", "like_dense")


def main() -> None:
    given = _arguments()
    session = Session.of(given, FREE)
    device = choose_device(given.device)
    tokenizer = load_tokenizer(hub.resolve(given.model))
    model = load(given.model, device, choose_dtype("auto", device))
    prompts = _prompts(tokenizer, given)

    def measure(policy: str) -> None:
        with make_policy(policy, seed=SEED).applied(model):
            answers = [write(model, policy, prompt, given.most) for prompt in prompts]
        dense = [row["ids"] for row in session.record["rows"] if row["policy"] == DENSE]
        session.row(
            policy=policy,
            **measured(answers, dense[0] if dense else answers, given.most),
            answers=[tokenizer.decode(answer, skip_special_tokens=True) for answer in answers],
            ids=answers,
        )

    for policy in dict.fromkeys([DENSE, *given.policies]):  # what others are compared with
        session.run(policy, partial(measure, policy))
    print(session.table(COLUMNS), flush=True)
    session.say(f"wrote {session.folder / 'results.json'}")


def _arguments() -> argparse.Namespace:
    parser = arguments("experiments.free_generation", __doc__, seconds=1700)
    parser.add_argument("--model", required=True, help="what `sparsek convert` made")
    parser.add_argument("--held-out", required=True, help="text that is asked about")
    parser.add_argument("--length", type=int, default=2048, help="tokens of an excerpt")
    parser.add_argument("--samples", type=int, default=8, help="excerpts, each with a question")
    parser.add_argument("--most", type=int, default=512, help="tokens of an answer")
    parser.add_argument("--policies", nargs="+", default=[OWN, "window", "random"])
    given = parser.parse_args()
    if given.smoke:
        given.length, given.samples, given.most = 300, 2, 8
    return given


def _prompts(tokenizer: Any, given: argparse.Namespace) -> list[list[int]]:
    form = ChatFormat.of(tokenizer)
    rows = windows(load_corpus(given.held_out, tokenizer), given.length, given.samples)
    asked = encode(tokenizer, [f"\n\n{question}" for question in QUESTIONS])
    return [
        [*form.start, *row.tolist(), *asked[n % len(asked)], *form.reply]
        for n, row in enumerate(rows)
    ]


@torch.inference_mode()
def write(model: Any, policy: str, prompt: Sequence[int], most: int) -> list[int]:
    """A greedy answer, with what ends it; inside of the policy's `applied`."""
    cache = make_policy(policy, seed=SEED).new_cache(model)
    ids = torch.tensor([prompt], device=model.device)
    written = model.generate(
        ids, past_key_values=cache, do_sample=False, max_new_tokens=most, repetition_penalty=1.0
    )
    return written[0, len(prompt) :].tolist()


def measured(answers: list[list[int]], dense: list[list[int]], most: int) -> dict[str, Any]:
    """A row: means over the answers, and shares in percent."""
    sizes = [len(answer) for answer in answers]
    return {
        "samples": len(answers),
        "tokens": sum(sizes) / len(sizes),
        "over_dense": sum(sizes) / sum(map(len, dense)),
        "ended": 100 * sum(size < most for size in sizes) / len(sizes),
        "repeated": 100 * sum(map(repeated, answers)) / len(answers),
        "like_dense": 100 * sum(map(_alike, answers, dense)) / len(dense),
    }


def repeated(answer: Sequence[int]) -> float:
    """The share of runs of `RUN` tokens that are in the answer before."""
    runs = [tuple(answer[n : n + RUN]) for n in range(len(answer) - RUN + 1)]
    return 1 - len(set(runs)) / len(runs) if runs else 0.0


def _alike(answer: Sequence[int], dense: Sequence[int]) -> float:
    same = [a == b for a, b in zip(answer, dense, strict=False)] + [False]
    return same.index(False) / max(len(answer), len(dense))


if __name__ == "__main__":
    main()
