"""Draws random configs of all families, converts them in memory, and compares.

    python tools/random_configs.py --count 3000 --seed 0
    python tools/random_configs.py --family gpt_oss --count 50

Settings (`draw`), shapes (`shape`: sizes, heads per KV head, kinds of layers, experts) and keys of
other families (`stray`) are random. Each config must do one of two things. It is converted, and
then its logits, and those that losses are made of, are the dense model's where nothing is dropped,
decoding in pieces is prefill, left padding and packed documents have no influence, a saved model
loads as it was, and what config.json alone says of it (as `sparsek convert` reads it) is what the
classes say. Or it is refused with a reason (`UsageError`, `SparsekError`), as are those that
transformers itself refuses. Anything else is a fault, and shown with what reproduces it.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).parents[1] / "tests" / "support")]

from random_settings import draw, shape, sparsek_block, stray  # noqa: E402

TOKENS = 24
# Differences of summation order, relative to the largest logit; recurrent forms differ more. Sums
# are of up to 256 features: 3e-5 was seen of models that differ by nothing else.
CLOSE, CLOSE_STATES = 1e-4, 3e-4
# Times the dense model's own distance of decoding from prefill, where states make one.
LIKE_DENSE = 3
# A dense model further away than this does not go on from its state at all (`Row.reads_once`).
LOST = 1e-2


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
        outcome = compare(model, ids, expected, family, dense)
        if outcome == "converted":
            outcome = read_from_files(family, dense.config, model, ids) or outcome
        return outcome
    except SparsekError as error:
        return f"refused: {error.message}"
    except Exception as error:
        return f"fault: {type(error).__name__}: {error}"


def apart(ours: Any, theirs: Any) -> float:
    """The largest difference, relative to the largest value."""
    return float((ours - theirs).abs().max() / theirs.abs().max())


def compare(model: Any, ids: Any, expected: Any, family: str, dense: Any) -> str:
    """Dense where nothing is dropped, decoding as prefill, padding and packing without influence.

    Some of transformers' states go on from token to token otherwise than they are read (the single
    step of Mamba 2 leaves out the limits of the time step, so that float64 changes nothing). There
    the dense model's own decoding says how far from prefill is far.
    """
    import torch
    from transformers import DynamicCache

    import sparsek_cli.models as models
    from sparsek_cli.families import TABLE
    from sparsek_cli.families.layers import has_states
    from sparsek_cli.models.output import output_layer

    states = has_states(getattr(model.config, "layer_types", None))
    close = CLOSE_STATES if states else CLOSE

    def decoded(some: Any, cache: Any) -> Any:
        parts = [
            some(x, past_key_values=cache, use_cache=True).logits for x in ids.split(pieces, dim=1)
        ]
        return torch.cat(parts, 1)

    with torch.no_grad():
        with models.budget(model, topk=TOKENS):
            if not apart(model(ids, use_cache=False).logits, expected) <= close:
                return "fault: not dense where nothing is dropped"
            last = model.base_model(ids, use_cache=False).last_hidden_state
            if not apart(output_layer(model)(last), expected) <= close:
                return "fault: losses and divergences see other logits"
        whole = model(ids, use_cache=False).logits
        pieces = [7, *[1] * 17] if TABLE[family].reads_once else [7, 1, 9, 1, 6]
        found = decoded(model, models.SparseKCache(model.config))
        if states and apart(found, whole) > close:
            own = decoded(dense, DynamicCache(config=dense.config))
            close_steps = min(LOST, max(close, LIKE_DENSE * apart(own, expected)))
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
        if not states:
            places = torch.cat([torch.arange(5), torch.arange(TOKENS - 5)])[None]
            packed = model(ids[:1], position_ids=places, use_cache=False).logits
            if not apart(packed[:, 5:], alone) <= close:
                return "fault: packed documents see each other"
    return "converted"


def read_from_files(family: str, dense: Any, model: Any, ids: Any) -> str:
    """What is wrong with the saved model, or with what config.json says of its base; "": nothing.

    Args:
        dense: the base's config. model: the converted model. ids: int64 [2, TOKENS].
    """
    import torch
    from transformers import AutoModelForCausalLM

    import sparsek_cli.models as models
    from sparsek_cli.conversion.geometry import geometry
    from sparsek_cli.families import TABLE
    from sparsek_cli.families.layers import full_layers, idle_window_off, layer_types

    row, config = TABLE[family], json.loads(dense.to_json_string())
    sizes = geometry(config, row)
    if (sizes.kv_heads, sizes.head_dim) != (models.kv_heads(dense), models.head_dim(dense)):
        return f"fault: config.json says {sizes}"
    types = layer_types(row, {**config, **idle_window_off(row, config, sizes.context)})
    if full_layers(types, sizes.shared) != models.sparse_layers(model.config):
        return f"fault: config.json says layers {types}"
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        model.save_pretrained(folder)
        again = AutoModelForCausalLM.from_pretrained(folder)
        saved, loaded = model.state_dict(), again.state_dict()
        if saved.keys() != loaded.keys() or not all(
            torch.equal(saved[name], loaded[name]) for name in saved
        ):
            return "fault: weights do not load as they were saved"
        # Where they lie in memory changes sums of experts by a bit.
        if apart(again(ids, use_cache=False).logits, model(ids, use_cache=False).logits) > CLOSE:
            return "fault: it does not load as it was saved"
    return ""


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
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(1)
    families = [options.family] if options.family else list(TABLE)
    outcomes: Counter[str] = Counter()
    began = time.monotonic()
    try:
        for number in range(options.first, options.first + options.count):
            rng = random.Random(f"{options.seed}-{number}")
            family = families[number % len(families)]
            # Shapes have numbers of their own, so that settings and weights of a number stay.
            shapes = shape(random.Random(f"shape-{options.seed}-{number}"), family)
            others = stray(random.Random(f"stray-{options.seed}-{number}"), family)
            settings = others | draw(rng, family) | shapes
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
