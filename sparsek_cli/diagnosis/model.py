"""A converted checkpoint: dense where k >= length, and a cache of the promised size."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from sparsek_cli import quantised
from sparsek_cli.byte_units import size
from sparsek_cli.converted import is_converted
from sparsek_cli.diagnosis.check import PACKED_TOLERANCE, REPORT_IT, TOLERANCE, Check

if TYPE_CHECKING:
    import torch

    from sparsek_cli.hub import Checkpoint


def model(checkpoint: "Checkpoint", device: "torch.device") -> Iterator[Check]:
    """A converted checkpoint: dense when k >= length, and a cache of the promised size."""
    import torch

    from sparsek_cli.loading import load_model
    from sparsek_cli.models import family_of

    lm = load_model(checkpoint, device=device, dtype=torch.float32)
    yield _tokenizer(checkpoint, lm)
    yield _numbers(lm)
    family_of(lm.config)
    if not is_converted(lm.config):
        yield Check("model", None, f"{checkpoint.name} is dense: nothing of ours to check in it")
        return
    if how := quantised.described(checkpoint.config()):
        kept = "packed" if quantised.stays_packed(lm.config) else "unpacked"
        yield Check("weights", None, f"quantised ({how}), {kept} in memory, computed in {lm.dtype}")
    block = {key: lm.config.sparsek[key] for key in ("topk", "window", "sinks", "gate")}
    block["topk"] = topk_in_words(block["topk"])
    yield Check(
        "model", None, f"{checkpoint.name}: " + ", ".join(f"{k} {v}" for k, v in block.items())
    )
    yield _files(checkpoint)
    yield from _config(checkpoint)
    yield from _sparse_path(lm)
    yield from _dense_equivalence(lm)
    yield from _cache_bytes(lm)


def topk_in_words(topk: int | list) -> str:
    """`topk` of a config: of a hundred heads no hundred numbers."""
    if isinstance(topk, int):
        return str(topk)
    rows = [row if isinstance(row, list) else [row] for row in topk if row is not None]
    flat = [k for row in rows for k in row]
    return f"{min(flat)} to {max(flat)} by head ({sum(flat) / len(flat):.4g} on average)"


def _files(checkpoint: "Checkpoint") -> Check:
    """Files of weights are those that were written; loading looks at those of scorers alone."""
    from sparsek_cli.checkpoint_files.file_hashes import as_written
    from sparsek_cli.checkpoint_files.samples import sampled
    from sparsek_cli.checkpoint_files.shards import read_shards
    from sparsek_cli.output.contents import SCORERS

    names = [shard.path.name for shard in read_shards(checkpoint.path)]
    found = as_written(checkpoint.path, [name for name in names if name != SCORERS])
    damaged = [name for name, whole in found.items() if whole is False]
    if damaged:
        return Check(
            "files", False, f"{damaged[0]} is not what was written (sha256)",
            "fetch the model, or convert its base, again: its bits have changed since, or before "
            "in the hub's cache",
        )  # fmt: skip
    known = sum(whole is True for whole in found.values())
    shown = f"{known} of {len(found)} files of weights are what was written (sha256)"
    rest = {name for name, whole in found.items() if whole is None}
    looked = rest & sampled(checkpoint.path)  # compared when the model was loaded
    if looked:
        shown += f", {len(looked)} by some bytes of each tensor"
    if rest - looked:
        shown += "; of the others nothing says what they were"
    return Check("files", True if known or looked else None, shown)


def _config(checkpoint: "Checkpoint") -> Iterator[Check]:
    """config.json asks for the model that was written; older folders do not say what it was."""
    from sparsek_cli.output.written_config import changes, remedy

    found = changes(checkpoint.path)
    if found is None:
        return
    wrong = any(not change.chosen for change in found)
    shown = ", ".join(change.text() for change in found)
    yield Check(
        "config",
        False if wrong else None if found else True,
        f"config.json was changed since: {shown}" if found else "config.json is what was written",
        remedy(checkpoint.path),
    )


def _tokenizer(checkpoint: "Checkpoint", lm: "torch.nn.Module") -> Check:
    """Its ids are rows of the embedding."""
    from sparsek_cli.loading import check_tokenizer, embedding_rows, load_tokenizer
    from sparsek_cli.output.tokenizer_files import holds_tokenizer

    if not holds_tokenizer(checkpoint.path):
        return Check("tokenizer", None, "none beside the weights")
    tokenizer, rows = load_tokenizer(checkpoint), embedding_rows(lm)
    check_tokenizer(tokenizer, rows, checkpoint.name)
    return Check("tokenizer", True, f"{len(tokenizer):,} tokens, {rows:,} embeddings")


def _numbers(lm: "torch.nn.Module") -> Check:
    """Of a dense model, too: verbs whose loss is NaN send here."""
    import torch

    for name, weight in lm.named_parameters():
        if weight.is_floating_point() and weight.itemsize > 1 and weight.numel():
            ends = torch.stack(torch.aminmax(weight.detach()))
            if not ends.isfinite().all():
                return Check(
                    "numbers",
                    False,
                    f"{name} holds values that are not finite",
                    "fetch the model again, or save it again from where it was trained: what holds "
                    "NaN or infinity is damaged, or overflowed in float16",
                )
    return Check("numbers", True, "every weight is a finite number")


def _sparse_path(lm: "torch.nn.Module") -> Iterator[Check]:
    """What a plain forward pass calls, and the cache that it leaves."""
    import torch

    from sparsek_cli.families.by_layer import shared_layers
    from sparsek_cli.families.layers import storing_layers
    from sparsek_cli.models import SparseKCache, counted_calls, sparsek_attentions

    with torch.inference_mode(), counted_calls() as calls:
        cache = lm(_random_ids(lm, 8), use_cache=True).past_key_values
    types = getattr(lm.config, "layer_types", None) or ()
    readers = len(storing_layers(types, shared_layers(lm.config)))
    layers = len(sparsek_attentions(lm)) + readers
    of_them = f" ({readers} of them by the keys of another)" if readers else ""
    yield Check(
        "sparse path",
        calls.count == layers and type(cache) is SparseKCache,
        f"{calls.count} calls of SparseK attention in {layers} layers{of_them}, "
        f"{type(cache).__name__}",
        REPORT_IT,
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
        f"{shown} at 32, 159 and 160 tokens, the formula says {expected:,} "
        f"({size(expected)}, computed in {str(lm.dtype).removeprefix('torch.')})"
        + (f"; {others:,} in layers of other kinds" if others else ""),
        REPORT_IT,
    )


def _random_ids(lm: "torch.nn.Module", tokens: int) -> "torch.Tensor":
    import torch

    limit = getattr(lm.config, "max_position_embeddings", None) or tokens
    generator = torch.Generator().manual_seed(0)
    shape = (1, min(tokens, limit))
    return torch.randint(lm.config.vocab_size, shape, generator=generator).to(lm.device)
