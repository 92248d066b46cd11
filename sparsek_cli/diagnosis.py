"""What `sparsek doctor` looks at: each check is one row, and no check can stop the others."""

import importlib
import importlib.metadata
import importlib.util
import platform
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from sparsek_cli import quantised
from sparsek_cli.errors import SparsekError

if TYPE_CHECKING:
    import torch

    from sparsek_cli.hub import Checkpoint

PACKAGES = (
    "torch",
    "triton",
    "transformers",
    "safetensors",
    "huggingface_hub",
    "datasets",
    "lm_eval",
    "accelerate",
    "peft",
)
# Optional where the platform has none; the PyTorch backend does without.
OPTIONAL = ("triton",)

# float32, differences come from another order of summation only.
TOLERANCE = 2e-3
# Packed weights compute in 16 bits, and some methods round activations, too.
PACKED_TOLERANCE = 5e-2


@dataclass(frozen=True)
class Check:
    """One row: `ok` is None for a plain fact."""

    name: str
    ok: bool | None
    detail: str
    hint: str = ""


def diagnose(
    checkpoint: "Checkpoint | None", device: "torch.device", dtype: "torch.dtype"
) -> Iterator[Check]:
    """All checks, cheap ones first."""
    yield from _guarded("versions", versions)
    yield from _guarded("shadowing", shadowing)
    yield from _guarded("devices", devices)
    yield from _guarded("backend", lambda: backend(device, dtype))
    yield from _guarded("server", lambda: server(checkpoint))
    yield from _guarded("operator", lambda: operator(device))
    yield from _guarded("attention", lambda: attention(device))
    if checkpoint is not None:
        yield from _guarded("model", lambda: model(checkpoint, device))


def _guarded(name: str, check: Callable[[], Iterator[Check]]) -> Iterator[Check]:
    try:
        yield from check()
    except SparsekError as error:
        yield Check(name, False, error.message, error.hint)
    except Exception as error:
        # A broken installation fails in ways nobody foresaw; that is what doctor is asked about.
        first = (str(error).splitlines() or [""])[0]
        hint = "reinstall sparsek and what it needs" if isinstance(error, ImportError) else _BUG
        yield Check(name, False, f"{type(error).__name__}: {first}", hint)


def versions() -> Iterator[Check]:
    """Python, sparsek and the libraries that matter, without importing them."""
    from sparsek_cli import __version__

    yield Check("sparsek", None, f"{__version__} in {Path(__file__).parent}")
    yield Check("python", None, f"{platform.python_version()} on {platform.platform()}")
    for package in PACKAGES:
        try:
            yield Check(package, None, importlib.metadata.version(package))
        except importlib.metadata.PackageNotFoundError:
            missing = package not in OPTIONAL
            yield Check(
                package,
                False if missing else None,
                "not installed",
                f"pip install {package}" if missing else "",
            )


def shadowing() -> Iterator[Check]:
    """Hugging Face's package `kernels` must not resolve into our source tree."""
    ours = Path(__file__).resolve().parents[1] / "kernels"
    spec = importlib.util.find_spec("kernels")
    if spec is None:
        yield Check("shadowing", True, "no package `kernels`: nothing to mix up")
    elif spec.origin is None:
        # A folder without __init__.py on the path; transformers knows that this is no package.
        yield Check("shadowing", True, "`kernels` is a plain folder on the path, not a package")
    else:
        inside = Path(spec.origin).resolve().is_relative_to(ours)
        yield Check(
            "shadowing",
            not inside,
            f"`kernels` is {spec.origin}",
            f"remove {ours / '__init__.py'}: that folder is a source root, not a package",
        )


def devices() -> Iterator[Check]:
    """What PyTorch can compute on."""
    import torch

    yield Check("cpu", None, f"{platform.machine()}, {torch.get_num_threads()} threads")
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        memory = properties.total_memory / 2**30
        yield Check(
            f"cuda:{index}",
            None,
            f"{properties.name}, {memory:.0f} GiB, sm_{properties.major}{properties.minor}",
        )
    if torch.backends.mps.is_available():
        yield Check("mps", None, "Apple GPU, not used: no float64")


def backend(device: "torch.device", dtype: "torch.dtype") -> Iterator[Check]:
    """Which kernels will run here, and why."""
    name, why = chosen_backend(device, dtype)
    yield Check("backend", None, f"{name} on {device}: {why}")


def chosen_backend(device: "torch.device", dtype: "torch.dtype") -> tuple[str, str]:
    """Name and reason of the backend that sparsek_kernels picks."""
    try:
        dispatch = importlib.import_module("sparsek_kernels.dispatch")
    except ModuleNotFoundError:
        return "pytorch", "the only backend of this installation"
    explain = getattr(dispatch, "explain", None)
    if explain is None:
        return "pytorch", "sparsek_kernels.dispatch gives no reason"
    return explain(device, dtype)


def server(checkpoint: "Checkpoint | None") -> Iterator[Check]:
    """What `sparsek serve` would start here, or what it lacks: no failure, it is optional."""
    from sparsek_cli.converted import is_converted
    from sparsek_cli.errors import UsageError
    from sparsek_cli.serving.engines import choose

    config = None if checkpoint is None else checkpoint.config()
    try:
        name, why = choose(config if config is not None and is_converted(config) else None)
        yield Check("server", None, f"{name}: {why}")
    except UsageError as error:
        yield Check("server", None, f"none: {error.message}")


def operator(device: "torch.device") -> Iterator[Check]:
    """The projection's defining properties on random scores: 0 <= p <= 1, sum p = min(k, n)."""
    import torch
    from sparsek_kernels import sparsek

    scores = 2 * torch.randn(4, 64, generator=torch.Generator().manual_seed(0)).to(device)
    worst = 0.0
    for k in (1, 7, 63, 64, 100):
        p = sparsek(scores, k)
        if p.min() < 0 or p.max() > 1 + 1e-5:
            yield Check("operator", False, f"k={k}: a value outside [0, 1] on {device}", _BUG)
            return
        worst = max(worst, float((p.sum(-1) - min(k, 64)).abs().max()))
    yield Check("operator", worst < 1e-3, f"sums right to {worst:.0e} on {device}", _BUG)


def attention(device: "torch.device") -> Iterator[Check]:
    """Attention against PyTorch's own where it must be dense, and chunks against the whole."""
    import torch
    from sparsek_kernels import SparseKState, sparsek_attention

    generator = torch.Generator().manual_seed(0)

    def random(heads: int, *shape: int) -> "torch.Tensor":
        return torch.randn(1, heads, *shape, generator=generator).to(device)

    tokens, size = 96, 32
    q, k, v = random(4, tokens, size), random(2, tokens, size), random(2, tokens, size)
    scores = random(2, tokens)
    dense = torch.nn.functional.scaled_dot_product_attention(
        q, k, v, is_causal=True, enable_gqa=True
    )
    wide = sparsek_attention(q, k, v, scores, topk=tokens, window=8, sinks=2)
    gap = float((wide - dense).abs().max())
    yield Check("attention", gap < TOLERANCE, f"k >= length equals dense to {gap:.0e}", _BUG)

    budget = {"topk": 12, "window": 8, "sinks": 2}
    whole = sparsek_attention(q, k, v, scores, **budget)
    state = SparseKState.empty(1, 2, size, **budget, dtype=q.dtype, device=device)
    pieces, sizes = [], [50, 45, 1]
    for start, length in zip([0, 50, 95], sizes, strict=True):
        part = slice(start, start + length)
        out, state = sparsek_attention(
            q[:, :, part], k[:, :, part], v[:, :, part], scores[:, :, part], **budget, state=state
        )
        pieces.append(out)
    gap = float((torch.cat(pieces, 2) - whole).abs().max())
    yield Check("decode", gap < TOLERANCE, f"chunks and decode equal prefill to {gap:.0e}", _BUG)


_BUG = "please report this with the output of `sparsek doctor --json`"


def model(checkpoint: "Checkpoint", device: "torch.device") -> Iterator[Check]:
    """A converted checkpoint: dense when k >= length, and a cache of the promised size."""
    import torch

    from sparsek_cli.loading import load_model
    from sparsek_cli.models import family_of

    lm = load_model(checkpoint, device=device, dtype=torch.float32)
    yield _tokenizer(checkpoint, lm)
    family_of(lm.config)
    if getattr(lm.config, "sparsek", None) is None:
        yield Check("model", None, f"{checkpoint.name} is dense: nothing of ours to check in it")
        return
    if how := quantised.described(checkpoint.config()):
        kept = "packed" if quantised.stays_packed(lm.config) else "unpacked"
        yield Check("weights", None, f"quantised ({how}), {kept} in memory, computed in {lm.dtype}")
    block = {key: lm.config.sparsek[key] for key in ("topk", "window", "sinks", "gate")}
    yield Check(
        "model", None, f"{checkpoint.name}: " + ", ".join(f"{k} {v}" for k, v in block.items())
    )
    yield from _sparse_path(lm)
    yield from _dense_equivalence(lm)
    yield from _cache_bytes(lm)


def _tokenizer(checkpoint: "Checkpoint", lm: "torch.nn.Module") -> Check:
    """Its ids are rows of the embedding."""
    from sparsek_cli.conversion.tokenizer import files_in
    from sparsek_cli.loading import check_tokenizer, embedding_rows, load_tokenizer

    if not files_in(checkpoint.path):
        return Check("tokenizer", None, "none beside the weights")
    tokenizer, rows = load_tokenizer(checkpoint), embedding_rows(lm)
    check_tokenizer(tokenizer, rows, checkpoint.name)
    return Check("tokenizer", True, f"{len(tokenizer):,} tokens, {rows:,} embeddings")


def _sparse_path(lm: "torch.nn.Module") -> Iterator[Check]:
    """What a plain forward pass calls, and the cache that it leaves."""
    import torch

    from sparsek_cli.models import SparseKCache, counted_calls, sparsek_attentions

    with torch.inference_mode(), counted_calls() as calls:
        cache = lm(_random_ids(lm, 8), use_cache=True).past_key_values
    layers = len(sparsek_attentions(lm))
    yield Check(
        "sparse path",
        calls.count == layers and type(cache) is SparseKCache,
        f"{calls.count} calls of SparseK attention in {layers} layers, {type(cache).__name__}",
        _BUG,
    )


def _dense_equivalence(lm: "torch.nn.Module") -> Iterator[Check]:
    import torch

    from sparsek_cli.models import budget, dense_attention

    ids = _random_ids(lm, 64)
    # The gates `log` and `kv` multiply by 1 where k >= length, so one gate speaks for all.
    with torch.inference_mode(), budget(lm, topk=64):
        sparse = lm(ids, use_cache=False).logits
        with dense_attention(lm):
            dense = lm(ids, use_cache=False).logits
    scale, packed = float(dense.abs().max()), quantised.stays_packed(lm.config)
    gap = float((sparse - dense).abs().max()) / scale
    yield Check(
        "dense equivalence",
        gap < (PACKED_TOLERANCE if packed else TOLERANCE),  # also false for NaN
        f"k >= length: logits equal the dense model's to {gap:.0e} of the largest",
        "its weights or the kernels are damaged: convert it again, then report this",
    )


def _cache_bytes(lm: "torch.nn.Module") -> Iterator[Check]:
    import torch

    from sparsek_cli.models import SparseKCache, sparsek_cache_bytes
    from sparsek_cli.models.cache.bytes import sliding_bytes

    ids = _random_ids(lm, 160)
    cache = SparseKCache(lm.config)
    held = []
    with torch.inference_mode():
        for part in (ids[:, :32], ids[:, 32:159], ids[:, 159:]):
            lm(part, past_key_values=cache, use_cache=True, logits_to_keep=1)
            held.append(cache.slot_bytes)
    expected = sparsek_cache_bytes(lm.config, lm.dtype) - sliding_bytes(lm.config, None, lm.dtype)
    others = cache.nbytes - held[-1]
    shown = f"{held[-1]:,}" if len(set(held)) == 1 else " then ".join(f"{h:,}" for h in held)
    # The gates `log` and `kv` also keep the scores (no keys) of the soft support while they last.
    exact = lm.config.sparsek["gate"] == "straight_through"
    yield Check(
        "cache bytes",
        set(held) == {expected} if exact else None,
        f"{shown} at 32, 159 and 160 tokens, the formula says {expected:,}"
        + (f"; {others:,} in layers of other kinds" if others else ""),
        _BUG,
    )


def _random_ids(lm: "torch.nn.Module", tokens: int) -> "torch.Tensor":
    import torch

    limit = getattr(lm.config, "max_position_embeddings", None) or tokens
    generator = torch.Generator().manual_seed(0)
    shape = (1, min(tokens, limit))
    return torch.randint(lm.config.vocab_size, shape, generator=generator).to(lm.device)
