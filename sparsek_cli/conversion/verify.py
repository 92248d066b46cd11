"""Checks of a written checkpoint before it takes its name.

Always: every file and tensor is where the index says, the base's bytes are the base's, the cache
has the size of the formula, and attention with topk >= length equals dense attention in this
model's geometry. Then the logits: of the whole model where it is small, of its first two layers
where calibration has imported transformers anyway. A large uncalibrated model is left at the
first four: its base files are the same bytes, and importing transformers alone takes longer than
the rest of the conversion. So is one that keeps parts of all its layers in one tensor: it cannot be
loaded in part.
"""

import filecmp
import math
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparsek_cli import quantised
from sparsek_cli.checkpoint_files.shards import read_shards, same_tensors
from sparsek_cli.conversion.planned import Plan
from sparsek_cli.conversion.write import Scorer, Written
from sparsek_cli.converted import is_converted
from sparsek_cli.errors import SparsekError
from sparsek_cli.families.own_config import own_config, own_value
from sparsek_cli.loading import load_weights
from sparsek_cli.output.contents import SCORERS
from sparsek_cli.silence import quiet_transformers

if TYPE_CHECKING:
    import torch

# Largest base, in bytes, whose logits are compared whole.
SMALL_MODEL = 256 * 2**20
_LAYERS_OF_LARGE = 2
# float32 on CPU; differences come from another order of summation only.
_TOLERANCE = 1e-3
# Packed weights compute in 16 bits, and some round activations, too: so far do two ways of dense
# attention differ in the same model.
_TOLERANCE_PACKED = 5e-2
_BUG = "please report this with the model's name; nothing was written"


@dataclass(frozen=True)
class Verified:
    """What was checked.

    Attributes:
        tensors: tensors found.
        logits: "all layers", "first 2 layers" or "not compared".
        logit_difference: largest absolute difference to the dense model, relative to the largest
            logit; None when not compared.
        kv_bytes: bytes of keys and values of one sequence.
    """

    tensors: int
    logits: str
    logit_difference: float | None
    kv_bytes: int

    def text(self) -> str:
        if self.logit_difference is None:
            return (
                f"{self.tensors} tensors found, base bytes identical; logits not compared "
                "(`sparsek doctor OUT` does)"
            )
        return (
            f"{self.tensors} tensors found, base bytes identical; logits equal the dense model's "
            f"({self.logits}, largest relative difference {self.logit_difference:.1e})"
        )


def check_base(plan: Plan) -> None:
    """The base's tensors are those that its model class has, none of them read.

    Raises:
        SparsekError: weights are missing, left over or of another shape.
    """
    import torch

    load_weights(plan.base.path, plan.base.name, dtype=torch.float32, device="meta")


def verify(plan: Plan, scorers: list[Scorer], folder: Path, written: Written) -> Verified:
    """Runs every check on the staged `folder`.

    Raises:
        SparsekError: something is not as it must be.
    """
    tensors = _check_tensors(plan, scorers, folder)
    _check_base_bytes(plan, folder, written)
    _check_operator(plan)
    kv_bytes = _check_cache_bytes(plan, scorers)
    if plan.base_bytes <= SMALL_MODEL:
        layers, label = plan.geometry.layers, "all layers"
    elif plan.calibrate_tokens and not _weights_of_all_layers(plan):
        layers = min(plan.sparse_layers[0] + _LAYERS_OF_LARGE, plan.geometry.layers)
        label = f"first {layers} layers"
    else:
        return Verified(tensors, "not compared", None, kv_bytes)
    difference = _logit_difference(plan, scorers, folder, layers)
    packed = quantised.stays_packed(plan.config)
    if not difference <= (_TOLERANCE_PACKED if packed else _TOLERANCE):
        raise SparsekError(
            f"verification failed: logits differ from the dense model's by {difference:.1e}",
            hint=_BUG,
        )
    return Verified(tensors, label, difference, kv_bytes)


def _check_tensors(plan: Plan, scorers: list[Scorer], folder: Path) -> int:
    held = {name: entry for shard in read_shards(folder) for name, entry in shard.tensors.items()}
    for shard in plan.shards:
        for name, entry in shard.tensors.items():
            if name not in held or held[name].shape != entry.shape:
                raise SparsekError(f"verification failed: {name} is not in OUT", hint=_BUG)
    for layer, scorer in zip(plan.sparse_layers, scorers, strict=True):
        for part, array in scorer.tensors().items():
            name = f"{plan.scorer_path(layer)}.{part}"
            if name not in held or held[name].shape != array.shape:
                raise SparsekError(f"verification failed: {name} is not in {SCORERS}", hint=_BUG)
    return len(held)


def _check_base_bytes(plan: Plan, folder: Path, written: Written) -> None:
    for number, (shard, means) in enumerate(zip(plan.shards, written.means, strict=True), start=1):
        path = folder / f"base-{number:05}.safetensors"
        if shard.part:
            same = same_tensors(shard, path)
        elif means in ("hard link", "symbolic link"):
            same = path.samefile(shard.path)
        elif means == "reflink":
            same = path.stat().st_size == shard.bytes
        else:
            same = filecmp.cmp(path, shard.path.resolve(), shallow=False)
        if not same:
            raise SparsekError(
                f"verification failed: {path.name} differs from {shard.path}",
                hint="the base changed meanwhile, or the disk is failing; run it again",
            )


def _check_operator(plan: Plan) -> None:
    import torch
    from sparsek_kernels import sparsek_attention

    size = plan.geometry
    tokens = min(32, plan.topk)
    generator = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(1, heads, tokens, size.head_dim, generator=generator)
        for heads in (size.heads, size.kv_heads, size.kv_heads)
    )
    scores = torch.randn(1, size.kv_heads, tokens, generator=generator)
    out = sparsek_attention(q, k, v, scores, topk=plan.topk, window=plan.window)
    dense = torch.nn.functional.scaled_dot_product_attention(
        q, k, v, is_causal=True, enable_gqa=True
    )
    if not torch.allclose(out, dense, atol=1e-4):
        raise SparsekError(
            "verification failed: attention with topk >= length differs from dense attention",
            hint="run `sparsek doctor`; nothing was written",
        )


def _check_cache_bytes(plan: Plan, scorers: list[Scorer]) -> int:
    import torch
    from sparsek_kernels import SparseKState

    size = plan.geometry
    half = size.dtype not in ("float32", "float")
    stored = torch.bfloat16 if half else torch.float32
    if plan.cache_dtype == "int8":
        stored = torch.int8
    held = plan.sliding_bytes(None)
    for scorer in scorers:
        state = SparseKState.empty(
            1,
            size.kv_heads,
            size.head_dim,
            topk=scorer.topk,
            window=plan.window,
            sinks=plan.sinks,
            dtype=stored,
            device="cpu",
        )
        held += state.pair_nbytes
    # The formula knows one size for all heads; sizes that differ may leave a few slots over.
    limit = plan.cache_bytes(0, dense=False)
    uniform = all(set(scorer.topk) == {plan.topk} for scorer in scorers)
    if held > limit or (uniform and held != limit):
        raise SparsekError(
            f"verification failed: the cache holds {held:,} bytes, the formula says {limit:,}",
            hint=_BUG,
        )
    return held


def _logit_difference(plan: Plan, scorers: list[Scorer], folder: Path, layers: int) -> float:
    """Largest logit difference to the base over the largest logit, on the CPU.

    In float32, or in what packed weights compute in.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from sparsek_cli.models import DENSE_ATTENTION, proven
    from sparsek_cli.models.positions import fix_positions

    def load(path: Path, **extra: Any) -> Any:
        config = AutoConfig.from_pretrained(path)
        if layers < plan.geometry.layers:
            _shorten(config, layers)
        model, info = quantised.load(AutoModelForCausalLM, path, config, torch.float32, **extra)
        if info["missing_keys"] or info["mismatched_keys"]:
            names = sorted([*info["missing_keys"], *map(str, info["mismatched_keys"])])
            raise SparsekError(f"verification failed: {names[0]} was not loaded", hint=_BUG)
        fix_positions(model)  # the base's as in what was made of it
        return model.eval()

    least = min(size for scorer in scorers for size in scorer.topk)
    tokens = min(48, plan.sinks + least + plan.window, plan.geometry.context)
    vocabulary = plan.config.get("vocab_size", 256)
    ids = torch.randint(vocabulary, (1, tokens), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode(), quiet_transformers():
        # The family's own code; a base that is converted attends densely only by that name.
        name = DENSE_ATTENTION if is_converted(plan.base.config()) else "eager"
        dense = load(plan.base.path, attn_implementation=name)(ids, use_cache=False).logits
        sparse = load(folder)
        with proven(sparse, "verification"):
            converted = sparse(ids, use_cache=False).logits
    if not dense.isfinite().all():
        raise SparsekError(
            f"the logits of {plan.base.name} itself are not finite",
            hint="its weights or numbers in its config.json (rope_parameters, rms_norm_eps) are "
            "damaged: fetch the model again",
        )
    return relative_difference(dense, converted)


def relative_difference(dense: "torch.Tensor", converted: "torch.Tensor") -> float:
    """Largest difference over the largest of `dense`, of one shape; no number where one is NaN."""
    apart, scale = float((dense - converted).abs().max()), float(dense.abs().max())
    if scale:
        return apart / scale
    return math.inf if apart else 0.0  # all zero: no scale to measure a difference by


def _weights_of_all_layers(plan: Plan) -> bool:
    """Whether tensors hold parts of all layers, as Gemma 3n's and 4's embeddings for each layer."""
    if not plan.row.by_layer:
        return False
    own = own_config(plan.row, plan.config)
    return bool(own_value(own, "hidden_size_per_layer_input"))


def _shorten(config: Any, layers: int) -> None:
    """Leaves a config's first layers; types of the others would make it contradict itself."""
    config.num_hidden_layers = layers
    if getattr(config, "sparsek", None) and isinstance(config.sparsek["topk"], list):
        config.sparsek["topk"] = config.sparsek["topk"][:layers]
    # Where it is a property, it follows from the number of layers.
    if getattr(config, "layer_types", None):
        with suppress(AttributeError):
            config.layer_types = config.layer_types[:layers]
