"""What the table says of one family: names of classes, of modules and of config keys."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

SPLIT = ("q_proj", "k_proj", "v_proj", "o_proj")
_NOTHING: Mapping[str, str] = MappingProxyType({})


@dataclass(frozen=True)
class Row:
    """One family; what is left out is as in Llama.

    Attributes:
        model_type: transformers' name of the dense family, e.g. "llama".
        stem: what its class names begin with, e.g. "Llama".
        module: below transformers.models, where it is not named like the type.
        run_by: type of the family whose classes run the model, where a type has a config alone.
        text: what stands between stem and Config or Model in a family whose plain names are those
            of a larger model.
        head: what ends the name of the causal language model.
        base: the base model's attribute, absent from the keys of some old checkpoints.
        stored: what files call `base`, where transformers renames it on loading.
        layers: list of layers below `base`.
        attention: the attention module inside a layer.
        attends: what stands between stem and Attention in the name of its class.
        projections: linear maps inside an attention module; the last one is its output.
        decoder: class name of the module inside the base model that its causal language model
            calls, where that is not the base model itself.
        norm: the normalisation after the last layer, below `base`.
        lora_targets: modules that LoRA adapts unless told otherwise; `projections` if left out.
        dropout: the config key of attention dropout, set to 0 on conversion; None: there is none.
        keys: the family's own name of a config key that differs from Llama's.
        plain_sizes: sizes that a config.json leaves out follow from those it has: a KV head for
            each head, hidden_size / heads features in each.
        reads_once: its state-space layers continue a state by one token at a time only.
        joint_norm: norms or gates of an attention module have weights of several heads, each head
            its own or all of them one norm, so that heads cannot be put in another order.
        window: the sliding window that the config class assumes if config.json names none.
        logit_factors: config keys that multiply the logits; "logits_scaling" else divides them.
        drops_arguments: decoder layers hand attention only the arguments that they name, so that
            bounds of packed documents reach it another way.
        mixed: layers differ by design, as attention that slides and attention that does not: types
            of layers come from the family's own config, and never change.
        streams: the config key of which one attention reads, where layers pass on several states of
            each token side by side, [states, batch, tokens, hidden]; "": there is one.
        by_layer: heads are those of single layers, or other layers' (by_layer.py), which the
            family's own config knows.
        rope_by_type: rotary positions of each type of layer have a block of their own.
    """

    model_type: str
    stem: str
    module: str = ""
    run_by: str = ""
    text: str = ""
    head: str = "ForCausalLM"
    base: str = "model"
    stored: str = ""
    layers: str = "layers"
    attention: str = "self_attn"
    attends: str = ""
    projections: tuple[str, ...] = SPLIT
    decoder: str = ""
    norm: str = "norm"
    lora_targets: tuple[str, ...] = ()
    dropout: str | None = "attention_dropout"
    keys: Mapping[str, str] = field(default_factory=lambda: _NOTHING)
    plain_sizes: bool = False
    reads_once: bool = False
    joint_norm: bool = False
    window: int | None = None
    logit_factors: tuple[str, ...] = ("logit_scale", "lm_head_multiplier")
    drops_arguments: bool = False
    mixed: bool = False
    by_layer: bool = False
    streams: str = ""
    rope_by_type: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "module", self.module or self.model_type)
        object.__setattr__(self, "stored", self.stored or self.base)
        object.__setattr__(self, "lora_targets", self.lora_targets or self.projections)

    @property
    def sparsek_type(self) -> str:
        """model_type of converted models, e.g. "sparsek_llama"."""
        return f"sparsek_{self.model_type}"

    @property
    def config(self) -> str:
        """Class name of the dense config."""
        return f"{self.stem}{self.text}Config"

    @property
    def model(self) -> str:
        """Class name of the dense base model."""
        return f"{self.stem}{self.text}Model"

    @property
    def causal_lm(self) -> str:
        """Class name of the dense causal language model, which config.json names."""
        return f"{self.stem}{self.head}"

    @property
    def attention_class(self) -> str:
        """Class name of the dense attention module."""
        return f"{self.stem}{self.attends}Attention"

    @property
    def reading_class(self) -> str:
        """What names the attention of layers that read another one's keys, once converted."""
        return f"Reading{self.attention_class}"

    @property
    def sparsek_names(self) -> tuple[str, ...]:
        """Class names of the converted config, base model, causal LM, attention, and decoder.

        And of the attention of layers without keys of their own.
        """
        names = (self.config, self.model, self.causal_lm, self.attention_class)
        names += (self.decoder,) if self.decoder else ()
        names += (self.reading_class,) if self.by_layer else ()
        return tuple(f"SparseK{name}" for name in names)

    def key(self, name: str) -> str:
        """The family's name of one of Llama's config keys."""
        return self.keys.get(name, name)

    def attention_path(self, layer: int) -> str:
        """The attention module of one layer as files name it, e.g. `model.layers.3.self_attn`."""
        return f"{self.stored}.{self.layers}.{layer}.{self.attention}"
