"""Tiny random models and a tokenizer, all built offline, and checkpoints of them.

Two layers, hidden size 32: enough to hold shapes, masks, caches and file formats to account in
milliseconds.
"""

from __future__ import annotations

import functools
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tiny_families import VOCAB_SIZE, tiny_config

SPECIAL_TOKENS = ("<pad>", "<s>", "</s>")  # ids 0, 1, 2


@functools.cache
def _seeding() -> Callable[[int], Any]:
    import torch

    return torch.manual_seed if torch.cuda.is_available() else torch.default_generator.manual_seed


def seed_torch(seed: int) -> None:
    """`torch.manual_seed`, which without CUDA writes down stack traces, a millisecond's worth."""
    _seeding()(seed)


def tiny_dense_model(family: str, *, seed: int = 0, dtype: str = "float32", **overrides: Any):
    """A random dense causal LM of `family` in eval mode; the same seed gives the same weights."""
    import torch
    from transformers import AutoModelForCausalLM

    config = tiny_config(family, **overrides)
    with torch.random.fork_rng():
        seed_torch(seed)
        model = AutoModelForCausalLM.from_config(config)
    return model.to(getattr(torch, dtype)).eval()


def tiny_sparse_model(
    family: str,
    *,
    topk: Any = 3,
    window: int = 4,
    sinks: int = 1,
    gate: str = "straight_through",
    stand_ins: int = 0,
    seed: int = 0,
    dense: Any = None,
    **options: Any,
):
    """`tiny_dense_model(family, seed=, **options)` with SparseK attention, in eval mode.

    Its scorers are random with slope 0, so that no order of keys is special; so are `stand_ins`
    pairs of each query head, if any. `dense`: that model, where it is there already.
    """
    import torch
    from transformers import AutoModelForCausalLM

    import sparsek_cli.models as models

    dense = dense or tiny_dense_model(family, seed=seed, **options)
    settings = {"topk": topk, "window": window, "sinks": sinks, "gate": gate}
    if stand_ins:
        settings["scorer"] = {"type": "linear", "stand_ins": stand_ins}
    config = models.sparsek_config_from(dense.config, settings)
    with torch.random.fork_rng():
        seed_torch(seed + 1)
        model = AutoModelForCausalLM.from_config(config, dtype=dense.dtype)
    loaded = model.load_state_dict(dense.state_dict(), strict=False)
    assert not loaded.unexpected_keys
    assert all(".scorer." in name for name in loaded.missing_keys), loaded.missing_keys
    generator = torch.Generator().manual_seed(seed + 2)
    with torch.no_grad():
        for attention in models.sparsek_attentions(model):
            attention.scorer.slopes.zero_()
            if stand_ins:
                pairs = torch.randn(attention.scorer.stand_ins.shape, generator=generator)
                attention.scorer.stand_ins.copy_(pairs)
    return model.eval()


def tiny_tokenizer(chat: bool = True):
    """A byte-level tokenizer of exactly `VOCAB_SIZE` ids, built in memory.

    Ids 0, 1, 2 are pad, bos, eos; the rest are printable ASCII and the byte-level forms of
    newline and tab. Every ASCII text round-trips.

    Args:
        chat: add a small chat template (`<s>role: text</s>` lines).
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    # Byte-level pre-tokenization writes space, newline and tab as these letters.
    letters = ["Ġ", "Ċ", "ĉ"] + [chr(code) for code in range(33, 127)]
    # Qwen2's own tokenizer class adds "<|endoftext|>" where it is missing, past the vocabulary.
    tokens = [*SPECIAL_TOKENS, "<|endoftext|>", *letters]
    vocab = {token: index for index, token in enumerate(tokens)}
    for index in range(len(vocab), VOCAB_SIZE):
        vocab[f"<unused{index}>"] = index
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token=None))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token=SPECIAL_TOKENS[0],
        bos_token=SPECIAL_TOKENS[1],
        eos_token=SPECIAL_TOKENS[2],
        padding_side="left",
        model_max_length=4096,
    )
    if chat:
        tokenizer.chat_template = (
            "{% for message in messages %}<s>{{ message['role'] }}: {{ message['content'] }}</s>\n"
            "{% endfor %}{% if add_generation_prompt %}<s>assistant: {% endif %}"
        )
    return tokenizer


def save_tiny_checkpoint(
    folder: str | Path,
    family: str = "llama",
    *,
    max_shard_size: str | None = None,
    model: Any = None,
    **options: Any,
) -> Path:
    """Write a complete dense checkpoint (weights, config, tokenizer) and return its folder.

    Args:
        folder: where to write; created.
        family: a key of `tiny_families.TINY`.
        max_shard_size: e.g. "20KB", to get several shards and an index.
        model: what `tiny_dense_model` gives, where it is there already.
        options: passed to `tiny_dense_model` (seed, dtype, config overrides).
    """
    if model is not None:
        return _write_checkpoint(Path(folder), model, max_shard_size)
    key = repr((family, max_shard_size, sorted(options.items())))
    if key not in _written:
        made = Path(_checkpoints().name) / str(len(_written))
        model = tiny_dense_model(family, **options)
        _written[key] = _write_checkpoint(made, model, max_shard_size)
    shutil.copytree(_written[key], folder, copy_function=shutil.copyfile, dirs_exist_ok=True)
    return Path(folder)


# By what they are of: a few are asked for hundreds of times, and copied in a tenth of the time.
_written: dict[str, Path] = {}


@functools.cache
def _checkpoints() -> tempfile.TemporaryDirectory:
    """Where they are; gone with the process."""
    return tempfile.TemporaryDirectory(prefix="tiny-checkpoints-")


def _write_checkpoint(folder: Path, model: Any, max_shard_size: str | None) -> Path:
    extra = {} if max_shard_size is None else {"max_shard_size": max_shard_size}
    model.save_pretrained(folder, **extra)
    tiny_tokenizer().save_pretrained(folder)
    return folder
