"""Where a family keeps its layers, read from config.json alone.

Importing transformers' modelling code takes longer than a whole conversion, so planning and
writing know these few names themselves; a test holds them equal to the real model classes.
"""

from dataclasses import dataclass
from typing import Any

from sparsek_cli.errors import UsageError


@dataclass(frozen=True)
class Layout:
    """One family's names: state-dict paths and config keys.

    Attributes:
        causal_lm: the architecture that config.json names for a causal language model.
        prefix: the base model's attribute, absent from the keys of some old checkpoints.
        layers: list of layers below `prefix`.
        attention: the attention module inside a layer.
        projections: the tensors that an attention module must have, below `attention`.
        norm: the normalisation after the last layer, below `prefix`.
    """

    causal_lm: str
    prefix: str
    layers: str
    attention: str
    projections: tuple[str, ...]
    hidden_size: str = "hidden_size"
    num_layers: str = "num_hidden_layers"
    num_heads: str = "num_attention_heads"
    context: str = "max_position_embeddings"
    dropout: str = "attention_dropout"
    norm: str = "norm"

    def attention_path(self, layer: int) -> str:
        """The attention module of one layer, e.g. `model.layers.3.self_attn`."""
        return f"{self.prefix}.{self.layers}.{layer}.{self.attention}"


_SPLIT = ("q_proj.weight", "k_proj.weight", "v_proj.weight", "o_proj.weight")

LAYOUTS = {
    "llama": Layout("LlamaForCausalLM", "model", "layers", "self_attn", _SPLIT),
    "mistral": Layout("MistralForCausalLM", "model", "layers", "self_attn", _SPLIT),
    "qwen2": Layout("Qwen2ForCausalLM", "model", "layers", "self_attn", _SPLIT),
    "qwen3": Layout("Qwen3ForCausalLM", "model", "layers", "self_attn", _SPLIT),
    "gpt_neox": Layout(
        "GPTNeoXForCausalLM",
        "gpt_neox",
        "layers",
        "attention",
        ("query_key_value.weight", "dense.weight"),
        norm="final_layer_norm",
    ),
    "gpt2": Layout(
        "GPT2LMHeadModel",
        "transformer",
        "h",
        "attn",
        ("c_attn.weight", "c_proj.weight"),
        hidden_size="n_embd",
        num_layers="n_layer",
        num_heads="n_head",
        context="n_positions",
        dropout="attn_pdrop",
        norm="ln_f",
    ),
}

# What MistralConfig assumes of a config.json that does not say (first release: 4096).
_MISTRAL_WINDOW = 4096


@dataclass(frozen=True)
class Geometry:
    """The sizes that decide scorers and cache: all counts, head_dim in features."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    context: int
    dtype: str


def geometry(config: dict[str, Any], layout: Layout) -> Geometry:
    """Sizes from a config.json dictionary.

    Raises:
        UsageError: a size is missing or is not a positive whole number.
    """

    def size(key: str, default: int | None = None) -> int:
        value = config.get(key)
        if value is None:
            value = default
        if isinstance(value, bool) or not isinstance(value, int) or value <= 0:
            raise UsageError(
                f"config.json: {key} is {value!r}, expected a positive whole number",
                hint="the checkpoint's config.json is incomplete; download it again",
            )
        return value

    heads = size(layout.num_heads)
    hidden = size(layout.hidden_size)
    grouped = layout.projections is _SPLIT
    kv_heads = size("num_key_value_heads", heads) if grouped else heads
    head_dim = size("head_dim", hidden // heads) if grouped else hidden // heads
    return Geometry(
        layers=size(layout.num_layers),
        hidden=hidden,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        context=size(layout.context, 2048),
        dtype=config.get("dtype") or config.get("torch_dtype") or "float32",
    )


def is_converted(config: dict[str, Any]) -> bool:
    """Whether a config.json dictionary is that of a converted model."""
    return str(config.get("model_type", "")).startswith("sparsek_") or "sparsek" in config


def dense_config(config: dict[str, Any]) -> dict[str, Any]:
    """config.json as it was before conversion, but for a sliding window that never bound."""
    dense = {key: config[key] for key in config if key not in ("sparsek", "auto_map")}
    dense["model_type"] = dense["model_type"].removeprefix("sparsek_")
    names = dense.get("architectures") or []
    dense["architectures"] = [name.removeprefix("SparseK") for name in names]
    return dense


def layout_of(config: dict[str, Any]) -> tuple[str, Layout]:
    """Model type and layout of a config.json dictionary.

    Raises:
        UsageError: already converted, not a causal language model, or not a supported family.
    """
    model_type = str(config.get("model_type", ""))
    architectures = config.get("architectures") or []
    supported = ", ".join(sorted(LAYOUTS))
    if is_converted(config):
        raise UsageError(
            "this checkpoint is already converted",
            hint="use it: `sparsek chat`; --again calibrates scorers for the weights it has now",
        )
    layout = LAYOUTS.get(model_type)
    causal = [name for name in architectures if name.endswith(("ForCausalLM", "LMHeadModel"))]
    if architectures and not causal:
        raise UsageError(
            f"{architectures[0]} is not a causal language model",
            hint=f"give a text-generation checkpoint of one of: {supported}",
        )
    if layout is None:
        raise UsageError(
            f"model family '{model_type or 'unknown'}' is not supported",
            hint=f"supported families: {supported}",
        )
    if config.get("quantization_config"):
        raise UsageError(
            "quantised checkpoints cannot be converted",
            hint="convert the unquantised checkpoint, then quantise the result",
        )
    return model_type, layout


def without_sliding_window(config: dict[str, Any], context: int) -> dict[str, Any]:
    """Fields that switch a sliding window off where it never binds.

    Raises:
        UsageError: some layer slides within the context: the base never learned to look further.
    """
    default = _MISTRAL_WINDOW if config.get("model_type") == "mistral" else None
    window = config.get("sliding_window", default)
    types = config.get("layer_types")
    slides = "sliding_attention" in types if types else config.get("use_sliding_window", True)
    if window is not None and slides and window < context:
        raise UsageError(
            f"the model uses a sliding window of {window} tokens",
            hint="SparseK needs full attention in every layer; if the model is known to work "
            'without its window, set "sliding_window": null in its config.json',
        )
    off: dict[str, Any] = {}
    if window is not None:
        off["sliding_window"] = None
        if "use_sliding_window" in config:
            off["use_sliding_window"] = False
    if types and set(types) != {"full_attention"}:
        off["layer_types"] = ["full_attention"] * len(types)
    return off
