"""Checks and times generation at the shape of a public 1B model, on random weights.

    python -m sparsek_cli.benchmarks.generate_shape            # a GPU; minutes
    python -m sparsek_cli.benchmarks.generate_shape --toy      # the same on a CPU; seconds

First correctness: a step of the kernels against PyTorch's on poisoned memory, and what graphs write
against what eager steps write. Then, for every batch and length, the time to the first token, peak
memory, tokens per second of `model.generate` and of its steps alone, beside dense and beside what
the bytes allow. Last, which kernels a step consists of. A part that fails is reported; the others
run on.
"""

from __future__ import annotations

import argparse
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from sparsek_kernels import SparseKState, sparsek_attention
from transformers import LlamaConfig

from sparsek_cli.benchmarks import generate
from sparsek_cli.benchmarks.timing import copy_bandwidth
from sparsek_cli.models import SparseKCache, dense_attention, family_of, sparsek_config_from
from sparsek_cli.models.generation import cuda_graphs as graphs
from sparsek_cli.models.generation import why_eager
from sparsek_cli.models.generation.likeliest import likeliest

SHAPES = {
    False: {
        "vocab_size": 128256, "hidden_size": 2048, "intermediate_size": 8192,
        "num_hidden_layers": 16, "num_attention_heads": 32, "num_key_value_heads": 8,
        "head_dim": 64, "tie_word_embeddings": True, "max_position_embeddings": 1 << 21,
    },
    True: {
        "vocab_size": 256, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
        "max_position_embeddings": 1 << 21,
    },
}  # fmt: skip
SLOTS = {False: (888, 128, 4), True: (20, 8, 4)}  # 1020: topk, window, sinks


def build(toy: bool, device: torch.device):
    topk, window, sinks = SLOTS[toy]
    block = {"topk": topk, "window": window, "sinks": sinks}
    config = sparsek_config_from(LlamaConfig(**SHAPES[toy], eos_token_id=None), block)
    torch.manual_seed(0)
    with device:
        model = family_of(config).sparsek_causal_lm._from_config(config, dtype=torch.bfloat16)
    return model.to(device).eval()


@contextmanager
def eager_steps() -> Iterator[None]:
    """No graphs within the block."""
    before = why_eager.has_graphs
    why_eager.has_graphs = lambda device: False
    try:
        yield
    finally:
        why_eager.has_graphs = before


@contextmanager
def poisoned() -> Iterator[None]:
    """What torch.empty gives holds NaN."""
    before = torch.empty

    def empty(*args, **kwargs):
        made = before(*args, **kwargs)
        return made.fill_(float("nan") if made.is_floating_point() else 77)

    torch.empty = empty
    try:
        yield
    finally:
        torch.empty = before


@torch.no_grad()
def check_kernels(device: torch.device) -> None:
    """Steps of the device's backend against PyTorch's: the same set, the same output."""
    new = torch.Generator(device).manual_seed(0)
    cases = [((700, 700), 300, 4), ((3, 900), 5, 1), ((0, 0), 16, 0), ((40, 0), 7, 9)]
    for dtype, tolerance in ((torch.float32, 2e-3), (torch.bfloat16, 2e-2)):
        for topk, window, sinks in cases:
            shape = {"topk": topk, "window": window, "sinks": sinks}
            n = sum((max(topk), window, sinks)) + 150
            q = torch.randn(2, 8, n, 64, generator=new, device=device).to(dtype)
            k = torch.randn(2, 2, n, 64, generator=new, device=device).to(dtype)
            scores = torch.randint(0, 9, (2, 2, n), generator=new, device=device).float()
            slopes = torch.tensor([0.0, 1e-3], device=device)
            states = [
                SparseKState.empty(2, 2, 64, dtype=dtype, device=device, **shape) for _ in range(2)
            ]
            cut = n - 100
            worst = 0.0
            for bounds in [(0, cut), *((t, t + 1) for t in range(cut, n))]:
                part = [x[:, :, slice(*bounds)] for x in (q, k, k, scores)]
                outs = []
                for i, backend in enumerate((None, "pytorch")):
                    with poisoned():
                        out, states[i] = sparsek_attention(
                            *part, slopes=slopes, state=states[i], backend=backend, **shape
                        )
                    outs.append(out.float())
                worst = max(worst, float((outs[0] - outs[1]).abs().max()))
            same = [sorted(state.positions.flatten().tolist()) for state in states]
            verdict = "ok" if worst < tolerance and same[0] == same[1] else "WRONG"
            print(f"kernels {dtype} topk {topk}: {verdict}, largest difference {worst:.1e}")


@torch.no_grad()
def check_graphs(model) -> None:
    """Greedy and sampled text, padded and ended rows, with and without graphs."""
    device, vocabulary = model.device, model.config.vocab_size
    new = torch.Generator().manual_seed(1)
    ids = torch.randint(vocabulary, (4, 300), generator=new).to(device)
    mask = torch.ones_like(ids)
    mask[0, :200] = 0
    mask[2, :7] = 0
    ends = list(range(0, vocabulary, 40))
    for name, options in {
        "greedy": {},
        "ended": {"eos_token_id": ends, "pad_token_id": 1},
        "sampled": {"do_sample": True, "top_p": 0.9, "temperature": 0.8},
        "scores kept": {"return_dict_in_generate": True, "output_scores": True},
    }.items():
        texts = []
        for context in (eager_steps, torch.no_grad, torch.no_grad):
            torch.manual_seed(0)
            with context():
                made = model.generate(
                    ids, attention_mask=mask, max_new_tokens=40,
                    **{"do_sample": False, "eos_token_id": None, **options},
                )  # fmt: skip
            texts.append(made if torch.is_tensor(made) else made.sequences)
        # The captured graph, and the one that an earlier call left.
        same = [torch.equal(text, texts[0]) for text in texts[1:]]
        print(f"graphs {name}: {'ok' if all(same) else 'DIFFERENT'} {same}")


def seconds(device: torch.device, call: Callable[[], object]) -> float:
    _wait(device)
    start = time.perf_counter()
    call()
    _wait(device)
    return time.perf_counter() - start


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def steps_per_s(model, cache, batch: int, place: int, count: int, *, compiled: bool = False):
    """(steps per second by the decoder alone, seconds until it could replay)."""
    decoder = graphs.Decoder(model, batch, pick=likeliest, compiled=() if compiled else None)
    device = model.device
    places = torch.full((batch,), place, device=device)
    with torch.no_grad(), decoder.over(cache, places):
        ready = seconds(device, lambda: [decoder.step() for _ in range(2)])
        took = seconds(device, lambda: [decoder.step() for _ in range(count)])
    if decoder.eager and device.type == "cuda":
        print(f"  steps ran eagerly: {decoder.eager}")
    return count / took, ready


@torch.no_grad()
def time_one(model, batch: int, length: int, tokens: int, compiled: bool, bandwidth: float) -> None:
    device = model.device
    new = torch.Generator().manual_seed(length)
    prompt = torch.randint(model.config.vocab_size, (batch, length), generator=new).to(device)
    base = model.read_chunk
    for chunk in (base, base // 2, None) if length * batch > base else (base,):
        model.read_chunk = chunk
        before = generate._reset_peak(prompt)
        for _ in range(2 if length <= 16384 else 1):
            took = seconds(device, lambda: model(prompt, use_cache=True, logits_to_keep=1))
        peak = torch.cuda.max_memory_allocated() - before if prompt.is_cuda else 0
        print(f"  read, chunk {chunk}: {took:.3f} s, peak {peak / 2**20:.0f} MiB", flush=True)
    model.read_chunk = base
    cache = SparseKCache(model.config)
    word = model(prompt, past_key_values=cache, logits_to_keep=1).logits[:, -1:].argmax(-1)
    allowed = batch * bandwidth / (generate.weight_bytes(model) + cache.nbytes)
    rates = []
    for count in (tokens, tokens, 4 * tokens):
        seen = torch.ones(batch, cache.get_seq_length() + 1, dtype=torch.long, device=device)
        options = {"attention_mask": seen, "past_key_values": cache, "eos_token_id": None}
        start = generate._now(word)
        model.generate(word, do_sample=False, max_new_tokens=count, **options)
        took = generate._now(word) - start
        rates.append(f"{batch * count / took:.0f} ({count})")
    print(f"  generate tokens/s: {', '.join(rates)}; bytes allow {allowed:.0f}", flush=True)
    place = cache.get_seq_length()
    rate, ready = steps_per_s(model, cache, batch, place, 2 * tokens)
    print(f"  steps alone: {batch * rate:.0f} tokens/s, ready after {ready:.2f} s", flush=True)
    if compiled:
        rate, ready = steps_per_s(model, cache, batch, place, 2 * tokens, compiled=True)
        print(f"  compiled: {batch * rate:.0f} tokens/s, ready after {ready:.2f} s", flush=True)


@torch.no_grad()
def time_dense(model, batch: int, length: int, tokens: int, bandwidth: float) -> None:
    prompt = torch.randint(model.config.vocab_size, (batch, length), device=model.device)
    with dense_attention(model):
        for _ in range(2 if length <= 16384 else 1):
            run = generate._run(model, prompt, tokens, generate._dense_rate)
    read = generate.weight_bytes(model) + run["cache_bytes"]
    split = run["split_tokens_per_s"]
    split = split if isinstance(split, str) else f"{split:.0f}"
    print(
        f"  dense: {run['tokens_per_s']:.0f} tokens/s, with split keys {split}, "
        f"bytes allow {batch * bandwidth / read:.0f}, "
        f"first token {run['first_s']:.3f} s, peak {run['peak_bytes'] / 2**20:.0f} MiB",
        flush=True,
    )


@torch.no_grad()
def profile(model, compiled: bool) -> None:
    """The kernels of one step of one row, by their time."""
    cache = SparseKCache(model.config)
    prompt = torch.randint(model.config.vocab_size, (1, 2000), device=model.device)
    model(prompt, past_key_values=cache, logits_to_keep=1)
    decoder = graphs.Decoder(model, 1, pick=likeliest, compiled=() if compiled else None)
    with decoder.over(cache, torch.full((1,), 2000, device=model.device)):
        for _ in range(3):
            decoder.step()
        _wait(model.device)
        with torch.profiler.profile() as seen:
            for _ in range(10):
                decoder.step()
            _wait(model.device)
    rows = [row for row in seen.key_averages() if row.self_device_time_total > 0]
    rows.sort(key=lambda row: -row.self_device_time_total)
    total = sum(row.self_device_time_total for row in rows) / 10
    launches = sum(row.count for row in rows) / 10
    print(f"a step{' compiled' if compiled else ''}: {launches:.0f} kernels, {total:.0f} us")
    for row in rows[:24]:
        print(f"  {row.self_device_time_total / 10:8.1f} us {row.count / 10:6.1f} x {row.key[:90]}")


def part(call: Callable[..., None], *args, **kwargs) -> None:
    try:
        call(*args, **kwargs)
    except Exception:
        print(f"FAILED: {call.__name__}{args[1:]}")
        print("".join(traceback.format_exc().splitlines(keepends=True)[-14:]), flush=True)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--toy", action="store_true")
    parser.add_argument("--batches", default="1,4")
    parser.add_argument("--lengths")
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument(
        "--limit", type=float, default=330.0, help="seconds after which none starts"
    )
    args = parser.parse_args()
    start = time.perf_counter()
    device = torch.device("cuda" if torch.cuda.is_available() and not args.toy else "cpu")
    name = torch.cuda.get_device_name() if device.type == "cuda" else "cpu"
    print(f"{name}, torch {torch.__version__}")
    bandwidth = copy_bandwidth(device, 1 << 31 if device.type == "cuda" else 1 << 24)
    print(f"copies move {bandwidth / 1e9:.0f} GB/s")
    part(check_kernels, device)
    model = build(args.toy, device)
    part(check_graphs, model)
    lengths = args.lengths or ("64,200" if args.toy else "8192,32768,131072")
    compiled = device.type == "cuda"
    if compiled:
        part(profile, model, False)
    for length in map(int, lengths.split(",")):
        for batch in map(int, args.batches.split(",")):
            if time.perf_counter() - start > args.limit:
                print("out of time")
                return
            print(f"{batch} x {length} tokens, at {time.perf_counter() - start:.0f} s:")
            part(time_one, model, batch, length, args.tokens, compiled, bandwidth)
            part(time_dense, model, batch, length, args.tokens, bandwidth)
    if compiled:
        part(profile, model, True)


if __name__ == "__main__":
    main()
