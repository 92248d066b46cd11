"""Draws random configs of all families, converts them in memory, and compares.

    python tools/random_configs.py --count 3000 --seed 0

Each config must do one of two things. It is converted, and then its logits are those of the dense
model where nothing is dropped, decoding in pieces is prefill, and left padding has no influence.
Or it is refused with a reason (`UsageError`, `SparsekError`), as are those that transformers itself
refuses. Anything else is a fault, and shown with what reproduces it.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).parents[1] / "tests" / "support")]

TOKENS = 24
# Differences of summation order, relative to the largest logit; recurrent forms differ more.
CLOSE, CLOSE_STATES = 2e-5, 3e-4
# Times the dense model's own distance of decoding from prefill, where states make one.
LIKE_DENSE = 3
# Fields that many families have, and what they may be.
CHOICES: dict[str, list[Any]] = {
    "attention_bias": [True, False],
    "attention_dropout": [0.0, 0.1],
    "attention_multiplier": [0.1, 0.5],
    "bias": [True, False],
    "hidden_act": ["silu", "gelu", "relu"],
    "hidden_dropout": [0.0, 0.1],
    "layer_norm_eps": [1e-5, 1e-3],
    "logit_scale": [0.1, 2.0],
    "multi_query": [True, False],
    "logits_scaling": [0.5, 4.0],
    "mlp_bias": [True, False],
    "num_key_value_heads": [1, 2, 4],
    "parallel_attn": [True, False],
    "partial_rotary_factor": [0.25, 0.5, 1.0],
    "qk_layernorm": [True, False],
    "residual_multiplier": [0.3, 1.0],
    "rms_norm_eps": [1e-6, 1e-3],
    "rotary_pct": [0.25, 0.5, 1.0],
    "scale_attn_by_inverse_layer_idx": [True, False],
    "scale_attn_weights": [True, False],
    "sliding_window": [None, 5, 4096],
    "tie_word_embeddings": [True, False],
    "use_bias": [True, False],
    "use_cache": [True, False],
    "use_parallel_residual": [True, False],
    "use_qk_norm": [True, False],
    "use_qkv_bias": [True, False],
    "attn_logit_softcapping": [None, 30.0],
    "final_logit_softcapping": [None, 30.0],
    "embedding_multiplier": [0.5, 1.0],
    "use_sliding_window": [True, False],
    "no_rope_layers": [[1, 0], [0, 1], [1, 1]],
    "query_pre_attn_scalar": [4, 16],
}
ROPES: list[dict[str, Any]] = [
    {"rope_type": "default", "rope_theta": 1e4},
    {"rope_type": "default", "rope_theta": 5e5},
    {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4},
    {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4},
    {"rope_type": "yarn", "factor": 2.0, "rope_theta": 1e4,
     "original_max_position_embeddings": 2048},
    {"rope_type": "llama3", "factor": 8.0, "rope_theta": 1e4, "low_freq_factor": 1.0,
     "high_freq_factor": 4.0, "original_max_position_embeddings": 2048},
]  # fmt: skip


def draw(rng: random.Random, family: str) -> dict[str, Any]:
    """Settings of one config: those of the tiny one, some of them otherwise."""
    from tiny_families import TINY, tiny_config

    plain = tiny_config(family).to_dict()
    own = TINY[family]
    settings: dict[str, Any] = {}
    for key, values in CHOICES.items():
        if key in plain and rng.random() < 0.4:
            settings[key] = rng.choice(values)
    if own.get("num_key_value_heads", 0) is None or "n_embd" in own:
        settings.pop("num_key_value_heads", None)
    if plain.get("rope_parameters") and "layer_types" not in own and rng.random() < 0.5:
        rope = dict(rng.choice(ROPES))
        kept = plain["rope_parameters"].get("partial_rotary_factor")
        settings["rope_parameters"] = rope | (
            {} if kept is None else {"partial_rotary_factor": kept}
        )
    if "layer_types" not in own and "layers_block_type" not in own and rng.random() < 0.3:
        settings["n_layer" if "n_layer" in own else "num_hidden_layers"] = rng.choice([1, 3])
        settings.pop("no_rope_layers", None)
    return settings


def sparsek_block(rng: random.Random, heads: int, layers: int, sparse: tuple[int, ...]) -> dict:
    """Slots that drop most of the text: one size, or one for each layer and head."""
    topk: Any = rng.randint(1, 6)
    if rng.random() < 0.3:
        rows = [[rng.randint(0, 6) for _ in range(heads)] for _ in range(layers)]
        topk = [row if i in sparse else None for i, row in enumerate(rows)]
    scorer = rng.choice([{"type": "linear"}, {"type": "mlp", "width": 4}])
    return {
        "topk": topk,
        "window": rng.randint(1, 6),
        "sinks": rng.randint(0, 2),
        "gate": rng.choice(["straight_through", "straight_through", "log", "kv"]),
        "scorer": scorer,
    }


def check(family: str, settings: dict[str, Any], rng: random.Random) -> str:
    """What became of one config: "converted", "refused: ..." or "fault: ..."."""
    import torch
    from tiny_families import tiny_config
    from transformers import AutoModelForCausalLM

    import sparsek_cli.models as models
    from sparsek_cli.errors import SparsekError

    try:
        torch.manual_seed(rng.randrange(2**31))
        dense = AutoModelForCausalLM.from_config(tiny_config(family, **settings)).eval()
        ids = torch.randint(4, 128, (2, TOKENS))
        with torch.no_grad():
            expected = dense(ids, use_cache=False).logits
        if not expected.isfinite().all():
            return "transformers: logits are not finite"
    except Exception as error:  # no such model, by transformers' own word
        return f"transformers: {type(error).__name__}"
    try:
        plain = models.sparsek_config_from(dense.config, {})
        sparse_layers = models.sparse_layers(plain)  # a window that never binds is off
        heads, layers = models.kv_heads(dense.config), dense.config.num_hidden_layers
        block = sparsek_block(rng, heads, layers, sparse_layers)
        config = models.sparsek_config_from(dense.config, block)
        model = AutoModelForCausalLM.from_config(config, dtype=dense.dtype).eval()
        found = model.load_state_dict(dense.state_dict(), strict=False)
        if found.unexpected_keys or any(".scorer." not in key for key in found.missing_keys):
            return f"fault: weights {found}"
        return compare(model, ids, expected, family, dense)
    except SparsekError as error:
        return f"refused: {error.message}"
    except Exception as error:
        return f"fault: {type(error).__name__}: {error}"


def compare(model: Any, ids: Any, expected: Any, family: str, dense: Any) -> str:
    """Dense where nothing is dropped, decoding as prefill, padding without influence.

    Some of transformers' states go on from token to token otherwise than they are read (the single
    step of Mamba 2 leaves out the limits of the time step, so that float64 changes nothing). There
    the dense model's own decoding says how far from prefill is far.
    """
    import torch
    from transformers import DynamicCache

    import sparsek_cli.models as models
    from sparsek_cli.families import TABLE
    from sparsek_cli.families.layers import has_states

    states = has_states(getattr(model.config, "layer_types", None))
    close = CLOSE_STATES if states else CLOSE

    def apart(ours: Any, theirs: Any) -> float:
        return float((ours - theirs).abs().max() / theirs.abs().max())

    def decoded(some: Any, cache: Any) -> Any:
        parts = [
            some(x, past_key_values=cache, use_cache=True).logits for x in ids.split(pieces, dim=1)
        ]
        return torch.cat(parts, 1)

    with torch.no_grad():
        with models.budget(model, topk=TOKENS):
            if not apart(model(ids, use_cache=False).logits, expected) <= close:
                return "fault: not dense where nothing is dropped"
        whole = model(ids, use_cache=False).logits
        pieces = [7, *[1] * 17] if TABLE[family].reads_once else [7, 1, 9, 1, 6]
        found = decoded(model, models.SparseKCache(model.config))
        if states and apart(found, whole) > close:
            own = decoded(dense, DynamicCache(config=dense.config))
            close_steps = max(close, LIKE_DENSE * apart(own, expected))
        else:
            close_steps = close
        if not apart(found, whole) <= close_steps:
            return "fault: decoding is not prefill"
        mask = torch.ones_like(ids)
        mask[0, :5] = 0
        padded = model(
            ids * mask, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0),
            use_cache=False,
        ).logits  # fmt: skip
        alone = model(ids[:1, 5:], use_cache=False).logits
        if not apart(padded[:1, 5:], alone) <= close:
            return "fault: padding has influence"
    return "converted"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="number of the first config")
    parser.add_argument("--family", help="this one only")
    options = parser.parse_args()
    import torch
    import transformers

    from sparsek_cli.families import TABLE

    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    families = [options.family] if options.family else list(TABLE)
    outcomes: Counter[str] = Counter()
    began = time.monotonic()
    try:
        for number in range(options.first, options.first + options.count):
            rng = random.Random(f"{options.seed}-{number}")
            family = families[number % len(families)]
            settings = draw(rng, family)
            outcome = check(family, settings, rng)
            outcomes[outcome.split(":")[0]] += 1
            if not outcome.startswith("converted"):
                print(f"{number} {family} {settings}: {outcome}", flush=True)
    except KeyboardInterrupt:
        print("stopped")
    done, seconds = sum(outcomes.values()), time.monotonic() - began
    print(f"seed {options.seed}, {done} configs, {seconds:.0f} s: {dict(outcomes)}")
    sys.exit(1 if outcomes["fault"] else 0)


if __name__ == "__main__":
    main()
