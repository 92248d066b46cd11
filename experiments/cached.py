"""What a converted model is worth read through its cache: in 8 bits, and beyond its trained length.

    python -m experiments.cached OUT --model tiny-sparsek [--times 4 16] [--documents 2]

8 bits, at the trained length: slots of bfloat16, int8 at as many slots, int8 at as many bytes.
Positions, at multiples of it: rotary positions as they are, stretched by YaRN, and by slot order:
a kept key then stands as many places back as pairs kept after it, however long ago it was read.
Keys are turned to their new places before every block of 64 tokens, which then continue them; with
nothing evicted that is what the model does anyway.

Each row: loss of a document in nats (all of it, and its last quarter), and how many of its 8 facts
are answered word for word. `--smoke`: toy sizes. A million tokens of `tiny` take a core 20 minutes.
"""

import argparse
import copy
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from sparsek_cli import hub
from sparsek_cli.benchmarks.session import Session, arguments
from sparsek_cli.data.chat_format import ChatFormat
from sparsek_cli.data.filler import Filler, encode
from sparsek_cli.data.generated_text import generated_text
from sparsek_cli.data.needles import NeedleDocument, make_document
from sparsek_cli.data.phrasings import phrasings
from sparsek_cli.errors import SparsekError
from sparsek_cli.evaluation.measured_model import load_measured
from sparsek_cli.evaluation.settings import Loading
from sparsek_cli.models import SparseKCache, budget, sparsek_cache_bytes

FACTS, SEED, SENTENCES, ROOM = 8, 23, 20_000, 128
COLUMNS = ("tokens", "way", "cache_mib", "loss", "loss_last", "facts", "asked")


class Reader:
    """Reads ids through a cache of one row, block by block."""

    block = 1024

    def __init__(self, model: Any):
        self.model, self.cache, self.fed = model, SparseKCache(model.config), 0

    def positions(self, count: int) -> torch.Tensor:
        """Positions [count] of the tokens that come next."""
        return torch.arange(self.fed, self.fed + count)

    @torch.no_grad()
    def read(self, ids: Sequence[int]) -> Iterator[torch.Tensor]:
        """Logits [n, V] float32 of each block of ids."""
        for start in range(0, len(ids), self.block):
            part = torch.tensor([ids[start : start + self.block]], device=self.model.device)
            places = self.positions(part.shape[1])[None].to(part.device)
            given = {"position_ids": places, "past_key_values": self.cache, "use_cache": True}
            yield self.model(part, **given).logits[0].float()
            self.fed += part.shape[1]


class SlotOrder(Reader):
    """Positions by slot order: kept pairs stand right before the block, without gaps."""

    block = 64

    def __init__(self, model: Any):
        super().__init__(model)
        rotary = getattr(model.base_model, "rotary_emb", None)
        if getattr(rotary, "rope_type", None) != "default" or rotary.attention_scaling != 1:
            raise SparsekError("slot order needs plain rotary positions", hint="leave YaRN out")
        self.inv_freq = rotary.inv_freq
        self.start = 0  # tokens fed before the last block
        self.known: dict[tuple[int, int], tuple[torch.Tensor, torch.Tensor]] = {}

    def positions(self, count: int) -> torch.Tensor:
        if self.fed:
            for number, layer in enumerate(self.cache.layers):
                self._turn(number, layer.state)
        self.start = self.fed
        return torch.arange(count)

    def _turn(self, number: int, state: Any) -> None:
        """Turns a layer's keys to the places that they have before the next block."""
        first = 0
        for head, k in enumerate(state.layout.topk):
            slots = slice(first, first + state.layout.sinks + k + state.layout.window)
            first = slots.stop
            held = (state.positions[0, slots] >= 0).nonzero().flatten() + slots.start
            seen = state.positions[0, held].long()
            places = seen.argsort().argsort() - len(seen)
            now = seen - self.start  # of what the last block read
            old = seen < self.start
            if old.any():
                earlier, then = self.known[number, head]
                now[old] = then[torch.searchsorted(earlier, seen[old])]
            state.keys[0, held] = self._turned(state.keys[0, held], places - now)
            order = seen.argsort()
            self.known[number, head] = seen[order], places[order]

    def _turned(self, keys: torch.Tensor, by: torch.Tensor) -> torch.Tensor:
        angle = by[:, None].float() * self.inv_freq.float()
        low, high = keys.float().chunk(2, dim=-1)
        cos, sin = angle.cos(), angle.sin()
        return torch.cat((low * cos - high * sin, high * cos + low * sin), dim=-1).to(keys.dtype)


def measure(reader: Reader, document: NeedleDocument) -> dict[str, Any]:
    """Loss of the document and how many of its facts are answered."""
    tokenizer = document.filler.tokenizer
    chat = ChatFormat.of(tokenizer)
    ids = [*chat.start, *document.ids.tolist()]
    losses, done = [], 0
    for logits in reader.read(ids):
        targets = torch.tensor(ids[done + 1 : done + 1 + len(logits)], device=logits.device)
        losses.append(F.cross_entropy(logits[: len(targets)], targets, reduction="none").cpu())
        done += len(logits)
    loss = torch.cat(losses)
    return {
        "tokens": len(ids),
        "cache_mib": reader.cache.nbytes / 2**20,
        "loss": float(loss.mean()),
        "loss_last": float(loss[len(loss) * 3 // 4 :].mean()),
        "facts": sum(_answers(copy.copy(reader), document, n, chat) for n in range(FACTS)),
        "asked": FACTS,
    }


def _answers(reader: Reader, document: NeedleDocument, number: int, chat: ChatFormat) -> bool:
    """Whether each token of the answer is the likeliest, on a copy of what was read."""
    fact = document.facts[number]
    reader.cache = copy.deepcopy(reader.cache)
    if isinstance(reader, SlotOrder):
        reader.known = dict(reader.known)
    question, answer = encode(document.filler.tokenizer, ["\n\n" + fact.question, fact.answer])
    before = [*question, *chat.reply]
    wanted = [*answer, *chat.stop[:1]]
    said = torch.cat(list(reader.read([*before, *wanted]))).argmax(-1).tolist()
    return said[len(before) - 1 : -1] == wanted


def as_many_bytes(config: Any) -> Any:
    """Budgets of an int8 cache as large as the config's own in bfloat16."""
    own = config.sparsek["topk"]
    whole = sparsek_cache_bytes(config, torch.bfloat16)
    changed = copy.deepcopy(config)
    best = own
    for percent in range(100, 200):
        best_next = _scaled(own, percent)
        changed.sparsek = {**config.sparsek, "topk": best_next, "cache_dtype": "int8"}
        if sparsek_cache_bytes(changed, torch.bfloat16) > whole:
            break
        best = best_next
    return best


def _scaled(topk: Any, percent: int) -> Any:
    if isinstance(topk, int):
        return topk * percent // 100
    return [_scaled(part, percent) for part in topk]


def main() -> None:
    given = _arguments()
    session = Session.of(given)
    model, tokenizer = _model(given, None)
    length = model.config.max_position_embeddings
    rng = np.random.default_rng(SEED)
    filler = Filler.from_documents([generated_text(rng, given.sentences)], tokenizer)
    if given.eight_bits:
        session.run("8 bits", partial(_eight_bits, session, given, model, filler, length))
    for times in given.times:
        work = partial(_positions, session, given, model, filler, length, times)
        session.run(f"positions, {times} times {length}", work)
    print(session.table(COLUMNS), flush=True)


def _arguments() -> argparse.Namespace:
    parser = arguments("experiments.cached", __doc__, seconds=3600)
    parser.add_argument("--model", required=True, help="a converted model")
    parser.add_argument("--times", nargs="*", type=int, default=[4, 16])
    parser.add_argument("--documents", type=int, default=2)
    parser.add_argument("--eight-bits", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--sentences", type=int, default=SENTENCES, help="of filler")
    given = parser.parse_args()
    if given.smoke:
        given.times, given.documents, given.sentences = [2], 1, 50
    return given


def _model(given: argparse.Namespace, yarn: float | None) -> tuple[Any, Any]:
    how = Loading(given.device, "float32" if given.device == "cpu" else "auto", yarn)
    model, tokenizer, _ = load_measured(hub.resolve(given.model), how, sparse=True)
    return model, tokenizer


def _eight_bits(session: Session, given: argparse.Namespace, model: Any, filler, length) -> None:
    many = as_many_bytes(model.config)
    ways: dict[str, AbstractContextManager] = {
        "model's dtype": nullcontext(),
        "int8, as many slots": budget(model, cache_dtype="int8"),
        "int8, bytes of bfloat16": budget(model, topk=many, cache_dtype="int8"),
    }
    for way, context in ways.items():
        with context:
            _row(session, given, way, filler, length, lambda: Reader(model))


def _positions(session, given, model, filler, length: int, times: int) -> None:
    stretched = _model(given, float(times))[0]
    ways = {
        "as they are": lambda: Reader(model),
        "YaRN": lambda: Reader(stretched),
        "slot order": lambda: SlotOrder(model),
    }
    for way, make in ways.items():
        _row(session, given, way, filler, times * length, make)


def _row(session: Session, given: argparse.Namespace, way: str, filler, tokens: int, make) -> None:
    rows = []
    for number in range(given.documents):
        rng = np.random.default_rng([SEED, number])
        depths = (np.arange(FACTS) + rng.random(FACTS)) / FACTS
        document = make_document(
            rng, filler, tokens=tokens - ROOM, needles=FACTS, phrasings=phrasings("calibration"),
            depths=depths,
        )  # fmt: skip
        rows.append(measure(make(), document))
    mean = {key: float(np.mean([row[key] for row in rows])) for key in ("loss", "loss_last")}
    total = {key: sum(row[key] for row in rows) for key in ("facts", "asked")}
    session.row(**rows[0] | mean | total | {"way": way})


if __name__ == "__main__":
    main()
