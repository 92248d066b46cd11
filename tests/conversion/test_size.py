"""Size costs nothing: 1.5 GB in four shards, converted in seconds and in little memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SHARDS, LAYERS, HIDDEN, INNER, VOCABULARY = 4, 14, 2048, 5632, 32000
KV = HIDDEN // 4


# Runs a command; CPU seconds and peak memory end up on stderr. From a small process, because what a
# process peaked at before it became the command counts as the command's.
MEASURED = """
import resource, subprocess, sys
code = subprocess.run(sys.argv[1:]).returncode
used = resource.getrusage(resource.RUSAGE_CHILDREN)
print(used.ru_utime + used.ru_stime, used.ru_maxrss, file=sys.stderr)
sys.exit(code)
"""


def shapes() -> dict[str, tuple[int, ...]]:
    attention = {"q": (HIDDEN, HIDDEN), "k": (KV, HIDDEN), "v": (KV, HIDDEN), "o": (HIDDEN, HIDDEN)}
    mlp = {"gate": (INNER, HIDDEN), "up": (INNER, HIDDEN), "down": (HIDDEN, INNER)}
    named = {"model.embed_tokens.weight": (VOCABULARY, HIDDEN), "model.norm.weight": (HIDDEN,)}
    named["lm_head.weight"] = (VOCABULARY, HIDDEN)
    for layer in range(LAYERS):
        at = f"model.layers.{layer}"
        named |= {f"{at}.self_attn.{x}_proj.weight": shape for x, shape in attention.items()}
        named |= {f"{at}.mlp.{x}_proj.weight": shape for x, shape in mlp.items()}
        named |= {f"{at}.{x}_layernorm.weight": (HIDDEN,) for x in ("input", "post_attention")}
    return named


def write_checkpoint(folder: Path) -> int:
    """A Llama of zeros in sparse files, which take no room; returns its bytes."""
    from transformers import LlamaConfig

    config = LlamaConfig(
        hidden_size=HIDDEN, intermediate_size=INNER, num_hidden_layers=LAYERS, dtype="bfloat16",
        num_attention_heads=16, num_key_value_heads=4, vocab_size=VOCABULARY,
        architectures=["LlamaForCausalLM"],
    )  # fmt: skip
    config.save_pretrained(folder)
    named, places, total = list(shapes().items()), {}, 0
    for number in range(SHARDS):
        name, header, end = f"model-{number + 1:05d}-of-{SHARDS:05d}.safetensors", {}, 0
        for tensor, shape in named[number::SHARDS]:
            size = 2 * shape[0] * (shape[1] if len(shape) > 1 else 1)
            header[tensor] = {"dtype": "BF16", "shape": shape, "data_offsets": [end, end + size]}
            places[tensor], end = name, end + size
        text = json.dumps(header).encode()
        with (folder / name).open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            file.truncate(8 + len(text) + end)
        total += end
    index = {"metadata": {"total_size": total}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return total


def measured(*words: str, **environment: str) -> tuple[str, float, float]:
    """stdout, CPU seconds and peak memory (KiB; bytes on macOS) of a Python process.

    CPU seconds, not wall clock: other tests run beside this one.
    """
    done = subprocess.run(
        [sys.executable, "-c", MEASURED, sys.executable, *words],
        capture_output=True, text=True, env={**os.environ, **environment},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    seconds, size = map(float, done.stderr.split()[-2:])
    return done.stdout, seconds, size


@pytest.mark.slow
def test_linked_read_lazily_and_within_seconds(tmp_path):
    assert write_checkpoint(tmp_path / "base") > 1.5e9
    words = ["convert", str(tmp_path / "base"), str(tmp_path / "out"), "--calibrate", "none"]
    state = {"SPARSEK_STATE_DIR": str(tmp_path / "state")}
    # Weights are matched with those of the model's class. Importing it is the most of all that is
    # done, and so the unit: processors differ, and one of them from minute to minute.
    imported = ("-c", "import torch; from transformers import LlamaForCausalLM")
    before = measured(*imported)[1]
    stdout, seconds, size = measured("-m", "sparsek_cli", *words, "--json", **state)
    report = json.loads(stdout)
    assert seconds < 2.5 * max(before, measured(*imported)[1])
    assert report["base_bytes_copied"] == 0
    assert size / (1024 if sys.platform == "darwin" else 1) < 700 * 1024
    for number, base in enumerate(sorted((tmp_path / "base").glob("model-*.safetensors")), 1):
        linked = tmp_path / "out" / f"base-{number:05d}.safetensors"
        assert linked.stat().st_size == base.stat().st_size
        assert linked.samefile(base) or report["linked_by"] == ["reflink"]
