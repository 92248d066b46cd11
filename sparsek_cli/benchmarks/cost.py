"""What a sparse layer's parts cost: scoring network, selection, attention, beside dense attention.

    python -m sparsek_cli.benchmarks.cost OUT [--lengths 8192 32768 131072] [--seconds 200]

One layer of random weights, 32 query and 8 KV heads of 128, batch 1, bf16 on a GPU. By length, with
k = window = 1024: milliseconds of the scoring network (scores from the hidden state), of selection
(which keys each query sees, without attention), of attention over keys already selected, and of
the three in one call; of dense attention, torch's flash and cuDNN kernels, the faster of the two;
the same with their gradients; and the memory that a call needs beyond its inputs. Then the same
for k from 128 to 4096 beside that window. Medians of CUDA events, all calls of a length in turn.

OUT/results.json holds every row. On a CPU the PyTorch backend is measured at a small shape. Time on
one H100: about 90 s, a third of it compiling.
"""

import argparse
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from sparsek_kernels import dispatch, effective_scores, sparsek_attention

from sparsek_cli.benchmarks.case import Data, Shape, draw
from sparsek_cli.benchmarks.rivals import RIVALS, Missing
from sparsek_cli.benchmarks.session import Session, arguments
from sparsek_cli.benchmarks.timing import interleaved_ms, peak_bytes
from sparsek_cli.devices import choose_device, choose_dtype
from sparsek_cli.models.scorer import SparseKScorer

LENGTHS = {"cuda": [8192, 32_768, 131_072], "cpu": [512, 1024, 2048]}
BUDGETS = {"cuda": [128, 256, 512, 1024, 2048, 4096], "cpu": [16, 32, 64, 128]}
HEADS = {"cuda": (32, 8, 128, 1024), "cpu": (4, 2, 32, 64)}  # query, KV, size, k = window
PARTS = ("length", "scorer", "selection", "attention", "sparse", "dense", "times", "peak_mib",
         "train", "dense_train", "times_train", "train_peak_mib")  # fmt: skip
BY_K = ("length", "k", "slots", "sparse", "dense", "times", "peak_mib", "train", "dense_train",
        "times_train", "train_peak_mib", "cache_mib", "dense_cache_mib")  # fmt: skip


def main() -> None:
    given = _arguments()
    session = Session.of(given)
    Experiment(session, given).run()


def _arguments() -> argparse.Namespace:
    parser = arguments("sparsek_cli.benchmarks.cost", __doc__, seconds=200, smoke=False)
    parser.add_argument("--lengths", nargs="+", type=int, help="default: 8192 to 131072")
    parser.add_argument("--budgets", nargs="+", type=int, help="k; default: 128 to 4096")
    parser.add_argument("--repeats", type=int, default=5, help="median of so many")
    return parser.parse_args()


class Experiment:
    """Every length with all parts, then every length and k."""

    def __init__(self, session: Session, given: argparse.Namespace):
        self.session, self.repeats = session, given.repeats
        self.device = choose_device(given.device)
        self.dtype = choose_dtype("auto", self.device)
        kind = self.device.type
        self.lengths = given.lengths or LENGTHS[kind]
        self.budgets = given.budgets or BUDGETS[kind]
        self.sizes = HEADS[kind]
        self.dense: dict[int, dict[str, float]] = {}

    def run(self) -> None:
        for length in self.lengths:
            self.session.run(f"parts at {length}", partial(self.parts, length))
        for length in self.lengths:
            name = f"budgets at {length}"
            self.session.run(name, partial(self.by_budget, length), needs=10)
        for columns, kind in ((PARTS, "parts"), (BY_K, "k")):
            rows = [row for row in self.session.record["rows"] if row["table"] == kind]
            print(self.session.table(columns, rows), flush=True)
        self.session.say(f"milliseconds; wrote {self.session.folder / 'results.json'}")

    def shape(self, topk: int | None = None) -> Shape:
        heads, kv_heads, size, most = self.sizes
        return Shape(
            heads, kv_heads, size, most if topk is None else topk, most, 0, 1,
            "straight_through", self.dtype, self.device, 0,
        )  # fmt: skip

    def parts(self, length: int) -> None:
        shape = self.shape()
        layer = Layer(shape, length)
        rivals = dense_rivals(layer.data, shape)
        with torch.no_grad():
            alone = {"scorer": layer.score, **stages(layer)}
            ms = interleaved_ms({**alone, "sparse": layer, **rivals}, self.device, self.repeats)
            peak = {
                name: _mib(peak_bytes(call, self.device))
                for name, call in {"sparse": layer, **rivals}.items()
            }
        train = {"sparse": layer.step(layer, layer.leaves)} | {
            name: layer.step(call, layer.data.leaves()[:3]) for name, call in rivals.items()
        }
        train_ms = interleaved_ms(train, self.device, max(1, self.repeats // 2))
        dense = {
            "dense": min(ms[name] for name in rivals),
            "dense_train": min(train_ms[name] for name in rivals),
        }
        self.dense[length] = dense
        self.session.row(
            table="parts",
            length=length,
            k=shape.topk,
            window=shape.window,
            **{name: ms[name] for name in (*alone, "sparse")},
            **dense,
            times=dense["dense"] / ms["sparse"],
            peak_mib=peak["sparse"],
            train=train_ms["sparse"],
            times_train=dense["dense_train"] / train_ms["sparse"],
            train_peak_mib=_mib(peak_bytes(train["sparse"], self.device)),
            each={"forward": ms, "train": train_ms, "peak_mib": peak},
        )

    def by_budget(self, length: int) -> None:
        dense = self.dense.get(length, {})
        for topk in self.budgets:
            shape = self.shape(topk)
            slots = shape.topk + shape.window
            if slots >= length:
                continue
            layer = Layer(shape, length)
            with torch.no_grad():
                ms = interleaved_ms({"sparse": layer}, self.device, self.repeats)["sparse"]
                peak = peak_bytes(layer, self.device)
            step = layer.step(layer, layer.leaves)
            train = interleaved_ms({"train": step}, self.device, max(1, self.repeats // 2))["train"]
            pair = 2 * shape.kv_heads * shape.head_dim * self.dtype.itemsize
            self.session.row(
                table="k",
                length=length,
                k=topk,
                slots=slots,
                sparse=ms,
                times=dense["dense"] / ms if dense else None,
                peak_mib=_mib(peak),
                train=train,
                times_train=dense["dense_train"] / train if dense else None,
                train_peak_mib=_mib(peak_bytes(step, self.device)),
                cache_mib=slots * pair / 2**20,
                dense_cache_mib=length * pair / 2**20,
                **dense,
            )


class Layer:
    """A layer's attention from hidden state and projected q, k, v on; calling it runs all parts.

    Attributes:
        leaves: what a training step needs the gradients of.
    """

    def __init__(self, shape: Shape, length: int):
        self.shape, self.length = shape, length
        self.data: Data = draw(shape, length, grad=True)
        width = shape.heads * shape.head_dim
        generator = torch.Generator(shape.device).manual_seed(shape.seed + 1)
        self.hidden = torch.randn(
            1, length, width, generator=generator, device=shape.device, dtype=shape.dtype
        ).requires_grad_()
        self.scorer = SparseKScorer(width, shape.kv_heads).to(shape.device)
        with torch.no_grad():
            self.scorer.weight.normal_(0, 2 * width**-0.5, generator=generator)
            self.scorer.bias.zero_()
            self.scorer.slopes.fill_(1e-4)
        self.leaves = [*self.data.leaves()[:3], self.hidden, *self.scorer.parameters()]

    def score(self) -> torch.Tensor:
        return self.scorer(self.hidden)[0]

    def __call__(self) -> torch.Tensor:
        q, k, v = self.data.leaves()[:3]
        slopes = self.scorer.slopes
        return sparsek_attention(q, k, v, self.score(), slopes=slopes, **self.shape.budget)

    def step(self, call: Callable[[], torch.Tensor], leaves: list[torch.Tensor]) -> Callable:
        """The call with its gradients."""
        grad = torch.randn_like(self.data.q)

        def run() -> None:
            torch.autograd.grad(call(), leaves, grad)

        return run

    def effective(self) -> torch.Tensor:
        """float64 [1, G, N]: what keys are compared by."""
        positions = torch.arange(self.length, device=self.shape.device)
        return effective_scores(self.score(), self.scorer.slopes, positions)


def stages(layer: Layer) -> dict[str, Callable[[], Any]]:
    """Selection, and attention over what it found, of the backend that the layer's call takes."""
    name, _ = dispatch.explain(layer.shape.device, layer.shape.dtype)
    return (_triton_stages if name == "triton" else _pytorch_stages)(layer)


def _triton_stages(layer: Layer) -> dict[str, Callable[[], Any]]:
    """For the gate and without the sinks that layers here have."""
    from sparsek_kernels.triton import pipeline
    from sparsek_kernels.triton.geometry import geometry

    shape, (q, k, v) = layer.shape, layer.data.leaves()[:3]
    topk, scale = (shape.topk,) * shape.kv_heads, shape.head_dim**-0.5
    settings = pipeline.Settings(topk, shape.window, shape.sinks, shape.gate, scale)
    place = geometry(q.shape, k.shape, shape.device)
    select = partial(pipeline.select, q, k, layer.effective(), settings, place)
    attend = partial(pipeline.attend, q, k, v, select(), settings, place)
    return {"selection": select, "attention": lambda: attend()[0]}


def _pytorch_stages(layer: Layer) -> dict[str, Callable[[], Any]]:
    from sparsek_kernels import keys
    from sparsek_kernels.pytorch import selection
    from sparsek_kernels.pytorch.attention import attend
    from sparsek_kernels.state import SlotLayout

    shape, (q, k, v) = layer.shape, layer.data.leaves()[:3]
    layout = SlotLayout((shape.topk,) * shape.kv_heads, shape.window, shape.sinks)
    positions = torch.arange(layer.length, device=shape.device)[None]
    listed = keys.list_keys(k, v, layer.effective(), positions, layout, None)
    select = partial(selection.select, listed, layout)
    attention = partial(
        attend, q, listed.keys, listed.values, listed.effective, select(), base=listed.base,
        window=shape.window, gate=shape.gate, scale=shape.head_dim**-0.5, tau=None, counts=None,
    )  # fmt: skip
    return {"selection": select, "attention": attention}


def dense_rivals(data: Data, shape: Shape) -> dict[str, Callable[[], torch.Tensor]]:
    """Dense attention by every kernel there is here."""
    found = {}
    for name in ("sdpa-flash", "sdpa-cudnn"):
        try:
            found[name] = RIVALS[name](data, shape)
        except Missing:
            continue
    return found or {"sdpa": RIVALS["sdpa"](data, shape)}


def _mib(count: int | None) -> float | None:
    return None if count is None else count / 2**20


if __name__ == "__main__":
    main()
