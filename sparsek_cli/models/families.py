"""The supported model families, one row each, and everything that follows from a row.

A row names the family's own classes. The `sparsek_<type>` config, base model, causal LM and
attention classes are derived from it, and registration.py enters them wherever libraries look;
there is no code per family.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from transformers import (
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
)
from transformers.models.gpt2 import modeling_gpt2
from transformers.models.gpt_neox import modeling_gpt_neox
from transformers.models.llama import modeling_llama
from transformers.models.mistral import modeling_mistral
from transformers.models.qwen2 import modeling_qwen2
from transformers.models.qwen3 import modeling_qwen3

from sparsek_cli.errors import UsageError
from sparsek_cli.models.attention import SparseKAttentionMixin
from sparsek_cli.models.config import SparseKConfigMixin
from sparsek_cli.models.modeling import (
    SparseKCausalLMMixin,
    SparseKModelMixin,
    add_scorers,
    forward_names,
)

_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")


@dataclass(frozen=True)
class Family:
    """One row: the family's dense classes, and the classes derived from them.

    Attributes:
        model_type: transformers' name of the dense family, e.g. "llama".
        config, model, causal_lm, attention: its dense classes.
        lora_targets: modules that LoRA adapts unless told otherwise (PEFT's `target_modules`).
        dropout: the config field of attention dropout, set to 0 on conversion.
        sparsek_config, sparsek_model, sparsek_causal_lm, sparsek_attention: derived classes.
    """

    model_type: str
    config: type[PreTrainedConfig]
    model: type
    causal_lm: type
    attention: type
    lora_targets: tuple[str, ...] = _PROJECTIONS
    dropout: str = "attention_dropout"
    sparsek_config: type = field(init=False)
    sparsek_model: type = field(init=False)
    sparsek_causal_lm: type = field(init=False)
    sparsek_attention: type = field(init=False)

    def __post_init__(self) -> None:
        for name, cls in _derive(self).items():
            object.__setattr__(self, name, cls)

    @property
    def derived(self) -> tuple[type, ...]:
        """The derived classes."""
        return (
            self.sparsek_config,
            self.sparsek_model,
            self.sparsek_causal_lm,
            self.sparsek_attention,
        )

    @property
    def sparsek_type(self) -> str:
        """model_type of converted models, e.g. "sparsek_llama"."""
        return f"sparsek_{self.model_type}"


def _derive(family: Family) -> dict[str, type]:
    """The four derived classes of a row."""
    # Where __init__.py binds them by name: pickle and transformers look classes up there.
    module = {"__module__": __package__}
    config = type(
        f"SparseK{family.config.__name__}",
        (SparseKConfigMixin, family.config),
        {
            **module,
            "__doc__": f"{family.config.__name__} with a `sparsek` block (see config.py).",
            "__annotations__": {"sparsek": dict[str, Any] | None},
            "sparsek": None,
            "model_type": f"sparsek_{family.model_type}",
            "model_names": {
                "AutoModel": f"SparseK{family.model.__name__}",
                "AutoModelForCausalLM": f"SparseK{family.causal_lm.__name__}",
            },
        },
    )
    attention = type(
        f"SparseK{family.attention.__name__}",
        (SparseKAttentionMixin, family.attention),
        {**module, "__doc__": f"{family.attention.__name__} with a scorer."},
    )

    def build_model(self, config):
        family.model.__init__(self, config)
        add_scorers(self, family.attention, attention)
        self.post_init()

    model = type(
        f"SparseK{family.model.__name__}",
        (SparseKModelMixin, family.model),
        {
            **module,
            "__doc__": f"{family.model.__name__} with SparseK attention.",
            "__annotations__": {"config": config},
            "__init__": build_model,
            "_forward_names": forward_names(family.model),
        },
    )

    def build_causal_lm(self, config):
        family.causal_lm.__init__(self, config)
        # The family's causal LM names its base model class itself: change it after the fact.
        self.base_model.__class__ = model
        add_scorers(self.base_model, family.attention, attention)
        self.base_model.post_init()
        self.post_init()

    causal_lm = type(
        f"SparseK{family.causal_lm.__name__}",
        (SparseKCausalLMMixin, family.causal_lm),
        {
            **module,
            "__doc__": f"{family.causal_lm.__name__} with SparseK attention.",
            "__annotations__": {"config": config},
            "__init__": build_causal_lm,
        },
    )
    return {
        "sparsek_config": config,
        "sparsek_attention": attention,
        "sparsek_model": model,
        "sparsek_causal_lm": causal_lm,
    }


FAMILIES: dict[str, Family] = {
    row.model_type: row
    for row in (
        Family(
            "llama",
            LlamaConfig,
            modeling_llama.LlamaModel,
            modeling_llama.LlamaForCausalLM,
            modeling_llama.LlamaAttention,
        ),
        Family(
            "mistral",
            MistralConfig,
            modeling_mistral.MistralModel,
            modeling_mistral.MistralForCausalLM,
            modeling_mistral.MistralAttention,
        ),
        Family(
            "qwen2",
            Qwen2Config,
            modeling_qwen2.Qwen2Model,
            modeling_qwen2.Qwen2ForCausalLM,
            modeling_qwen2.Qwen2Attention,
        ),
        Family(
            "qwen3",
            Qwen3Config,
            modeling_qwen3.Qwen3Model,
            modeling_qwen3.Qwen3ForCausalLM,
            modeling_qwen3.Qwen3Attention,
        ),
        Family(
            "gpt_neox",
            GPTNeoXConfig,
            modeling_gpt_neox.GPTNeoXModel,
            modeling_gpt_neox.GPTNeoXForCausalLM,
            modeling_gpt_neox.GPTNeoXAttention,
            lora_targets=("query_key_value", "attention.dense"),
        ),
        Family(
            "gpt2",
            GPT2Config,
            modeling_gpt2.GPT2Model,
            modeling_gpt2.GPT2LMHeadModel,
            modeling_gpt2.GPT2Attention,
            lora_targets=("attn.c_attn", "attn.c_proj"),
            dropout="attn_pdrop",
        ),
    )
}


def family_of(config: Any) -> Family:
    """The row of a dense or converted config (or of a `model_type` string).

    Raises:
        UsageError: the family is not supported; names those that are.
    """
    model_type = config if isinstance(config, str) else getattr(config, "model_type", None)
    family = FAMILIES.get(str(model_type).removeprefix("sparsek_"))
    if family is None:
        raise UsageError(
            f"models of type {model_type!r} are not supported",
            hint=f"supported families: {', '.join(FAMILIES)}",
        )
    return family


def sparsek_config_from(base_config: Any, settings: Mapping[str, Any]) -> PreTrainedConfig:
    """The config of the converted model: everything of the base, and the `sparsek` block.

    Attention dropout becomes 0 (a converted model trains without it). A sliding window that never
    binds (not below max_position_embeddings) is dropped; one that does is refused, because the
    base never learned to look past it and full attention would be another model.

    Args:
        base_config: config of a dense model of a supported family.
        settings: the `sparsek` block; missing keys take their defaults.

    Raises:
        UsageError: unsupported family or architecture, or settings out of range.
    """
    family = family_of(base_config)
    if base_config.model_type == family.sparsek_type:
        raise UsageError(
            "the model is converted already", hint="change its budget, or convert its base again"
        )
    if getattr(base_config, "add_cross_attention", False):
        raise UsageError(
            "the model has cross-attention", hint="only decoder-only models can be converted"
        )
    fields = base_config.to_dict()
    for name in ("model_type", "transformers_version", "auto_map", "architectures"):
        fields.pop(name, None)
    fields.update(_without_sliding_window(base_config))
    fields[family.dropout] = 0.0
    return family.sparsek_config(
        **fields, sparsek=dict(settings), architectures=[family.sparsek_causal_lm.__name__]
    )


def _without_sliding_window(config: Any) -> dict[str, Any]:
    """Fields that turn a sliding window off, where it has no effect anyway."""
    window = getattr(config, "sliding_window", None)
    layer_types = getattr(config, "layer_types", None)
    if window is None and set(layer_types or ()) <= {"full_attention"}:
        return {}
    # Whichever layers slide, a window no text ever fills changes nothing.
    if window is None or window < config.max_position_embeddings:
        raise UsageError(
            f"the model uses a sliding window of {window} tokens",
            hint="SparseK needs full attention in every layer; if the model is known to work "
            'without its window, set "sliding_window": null in its config.json',
        )
    off: dict[str, Any] = {"sliding_window": None}
    if hasattr(config, "use_sliding_window"):
        off["use_sliding_window"] = False
    if layer_types is not None:
        off["layer_types"] = ["full_attention"] * config.num_hidden_layers
    return off
