"""Shared fixtures: tiny random dense models of every family and a tokenizer, all built offline.

Everything here is random and small (two layers, hidden size 32): enough to hold shapes, masks,
caches and file formats to account in milliseconds. `sparse_model` gives the same weights with
SparseK attention and random scorers.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

# Tests never reach the network; set before transformers reads them.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Tensors are tiny and workers share the cores: threads that wait for each other cost minutes.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# A shell starts what runs in its background with Ctrl-C ignored, and every child inherits that.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

FAMILY_NAMES = ("llama", "mistral", "qwen2", "qwen3", "gpt_neox", "gpt2")
VOCAB_SIZE = 128
SPECIAL_TOKENS = ("<pad>", "<s>", "</s>")  # ids 0, 1, 2


def tiny_dense_config(family: str, **overrides: Any):
    """The dense transformers config of a tiny model: 2 layers, 4 query heads, head size 8.

    Args:
        family: one of `FAMILY_NAMES`. llama, mistral, qwen2 and qwen3 have 2 KV heads (GQA),
            gpt_neox (partial rotary) and gpt2 have 4.
        overrides: config fields by the family's own names, e.g. `num_hidden_layers=3`.
    """
    from transformers import AutoConfig

    common = {
        "vocab_size": VOCAB_SIZE,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "initializer_range": 0.2,  # large enough for peaked attention, so that errors show
    }
    if family == "gpt2":
        fields = {
            "n_embd": 32,
            "n_layer": 2,
            "n_head": 4,
            "n_positions": 512,
            "resid_pdrop": 0.0,
            "embd_pdrop": 0.0,
        }
    else:
        fields = {
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "max_position_embeddings": 4096,
        }
        if family == "gpt_neox":
            fields["rotary_pct"] = 0.5
        else:
            fields["num_key_value_heads"] = 2
        if family == "mistral":
            fields["sliding_window"] = None
        if family == "qwen3":
            fields["head_dim"] = 8
    return AutoConfig.for_model(family, **{**common, **fields, **overrides})


def tiny_dense_model(family: str, *, seed: int = 0, dtype: str = "float32", **overrides: Any):
    """A random dense causal LM of `family` in eval mode; the same seed gives the same weights."""
    import torch
    from transformers import AutoModelForCausalLM

    config = tiny_dense_config(family, **overrides)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config)
    return model.to(getattr(torch, dtype)).eval()


def tiny_sparse_model(
    family: str,
    *,
    topk: Any = 3,
    window: int = 4,
    sinks: int = 1,
    gate: str = "straight_through",
    seed: int = 0,
    **options: Any,
):
    """`tiny_dense_model(family, seed=, **options)` with SparseK attention, in eval mode.

    Its scorers are random with slope 0, so that no order of keys is special.
    """
    import torch
    from transformers import AutoModelForCausalLM

    import sparsek_cli.models as models

    dense = tiny_dense_model(family, seed=seed, **options)
    settings = {"topk": topk, "window": window, "sinks": sinks, "gate": gate}
    config = models.sparsek_config_from(dense.config, settings)
    with torch.random.fork_rng():
        torch.manual_seed(seed + 1)
        model = AutoModelForCausalLM.from_config(config, dtype=dense.dtype)
    loaded = model.load_state_dict(dense.state_dict(), strict=False)
    assert not loaded.unexpected_keys
    assert all(".scorer." in name for name in loaded.missing_keys), loaded.missing_keys
    with torch.no_grad():
        for attention in models.sparsek_attentions(model):
            attention.scorer.slopes.zero_()
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
    folder: str | Path, family: str = "llama", *, max_shard_size: str | None = None, **options: Any
) -> Path:
    """Write a complete dense checkpoint (weights, config, tokenizer) and return its folder.

    Args:
        folder: where to write; created.
        family: one of `FAMILY_NAMES`.
        max_shard_size: e.g. "20KB", to get several shards and an index.
        options: passed to `tiny_dense_model` (seed, dtype, config overrides).
    """
    folder = Path(folder)
    model = tiny_dense_model(family, **options)
    extra = {} if max_shard_size is None else {"max_shard_size": max_shard_size}
    model.save_pretrained(folder, **extra)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(params=FAMILY_NAMES)
def family(request) -> str:
    """Runs the test once per family."""
    return request.param


@pytest.fixture
def dense_config() -> Callable[..., Any]:
    """`tiny_dense_config(family, **overrides)`."""
    return tiny_dense_config


@pytest.fixture
def dense_model() -> Callable[..., Any]:
    """`tiny_dense_model(family, seed=, dtype=, **overrides)`."""
    return tiny_dense_model


@pytest.fixture(scope="session")
def build_dense_model() -> Callable[..., Any]:
    """`dense_model` for fixtures of a whole session."""
    return tiny_dense_model


@pytest.fixture
def sparse_model() -> Callable[..., Any]:
    """`tiny_sparse_model(family, topk=, window=, sinks=, gate=, ...)`."""
    return tiny_sparse_model


@pytest.fixture
def tokenizer():
    """`tiny_tokenizer()`."""
    return tiny_tokenizer()


@pytest.fixture
def dense_checkpoint(tmp_path: Path) -> Callable[..., Path]:
    """`dense_checkpoint(family="llama", name="base", **options)` writes one, returns its folder."""

    def make(family: str = "llama", name: str = "base", **options: Any) -> Path:
        return save_tiny_checkpoint(tmp_path / name, family, **options)

    return make


@pytest.fixture(autouse=True)
def _seeded():
    """Every test starts from the same random state, whatever ran before it."""
    import sys

    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(0)
