"""The classes of a family: its own, and those derived from them.

A row of `sparsek_cli.families.TABLE` names the family's own classes. The `sparsek_<type>` config,
base model, causal LM and attention classes are derived from them, and tables.py enters them
wherever libraries look; there is no code per family.

Importing the modelling code of all families would take seconds, so a config class is derived when
this package is imported, and the others when the first config of the family is made or a class is
asked for by name.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from functools import cached_property
from typing import Any

from transformers import PreTrainedConfig

from sparsek_cli.errors import UsageError
from sparsek_cli.families import TABLE, Row, row_of
from sparsek_cli.families.by_layer import sizes_by_layer
from sparsek_cli.families.causal import check_alone, check_causal
from sparsek_cli.families.layers import idle_window_off
from sparsek_cli.families.positions import check_rotary, learned_positions
from sparsek_cli.models.attention.modules import add_scorers
from sparsek_cli.models.attention.sharing import ReadingAttentionMixin
from sparsek_cli.models.attention.sparsek import SparseKAttentionMixin, hand_on_bounds
from sparsek_cli.models.causal_lm import SparseKCausalLMMixin
from sparsek_cli.models.config import SparseKConfigMixin, head_dim
from sparsek_cli.models.modeling import SparseKModelMixin, forward_names
from sparsek_cli.models.positions import fix_positions

# Where models/__init__.py finds them by name: pickle and transformers look classes up there.
_MODULE = {"__module__": "sparsek_cli.models"}


class Family:
    """One row with its classes, made when they are first asked for.

    Attributes:
        row: what the table says.
        config, model, causal_lm, attention: the dense classes.
        sparsek_config, sparsek_model, sparsek_causal_lm, sparsek_attention: the derived ones.
    """

    def __init__(self, row: Row):
        self.row = row

    @property
    def model_type(self) -> str:
        """transformers' name of the dense family, e.g. "llama"."""
        return self.row.model_type

    @property
    def sparsek_type(self) -> str:
        """model_type of converted models, e.g. "sparsek_llama"."""
        return self.row.sparsek_type

    @property
    def lora_targets(self) -> tuple[str, ...]:
        """Modules that LoRA adapts unless told otherwise (PEFT's `target_modules`)."""
        return self.row.lora_targets

    @property
    def dropout(self) -> str | None:
        """The config field of attention dropout, set to 0 on conversion."""
        return self.row.dropout

    @cached_property
    def config(self) -> type[PreTrainedConfig]:
        return getattr(_module(self.row, "configuration"), self.row.config)

    @cached_property
    def model(self) -> type:
        return getattr(_module(self._runs, "modeling"), self._runs.model)

    @cached_property
    def causal_lm(self) -> type:
        return getattr(_module(self._runs, "modeling"), self._runs.causal_lm)

    @cached_property
    def attention(self) -> type:
        return getattr(_module(self._runs, "modeling"), self._runs.attention_class)

    @property
    def _runs(self) -> Row:
        """The row whose modelling classes these are."""
        return TABLE[self.row.run_by] if self.row.run_by else self.row

    @cached_property
    def sparsek_config(self) -> type[PreTrainedConfig]:
        row = self.row
        return type(
            f"SparseK{row.config}",
            (SparseKConfigMixin, self.config),
            {
                **_MODULE,
                "__doc__": f"{row.config} with a `sparsek` block (see config.py).",
                "__annotations__": {"sparsek": dict[str, Any] | None},
                "sparsek": None,
                "model_type": row.sparsek_type,
                "model_names": {
                    "AutoModel": f"SparseK{row.model}",
                    "AutoModelForCausalLM": f"SparseK{row.causal_lm}",
                },
            },
        )

    @cached_property
    def sparsek_attention(self) -> type:
        return type(
            f"SparseK{self.row.attention_class}",
            (SparseKAttentionMixin, self.attention),
            {**_MODULE, "__doc__": f"{self.row.attention_class} with a scorer."},
        )

    @cached_property
    def reading_attention(self) -> type | None:
        """For layers without keys of their own, in families that have such."""
        if not self.row.by_layer:
            return None
        return type(
            f"SparseK{self.row.reading_class}",
            (ReadingAttentionMixin, self.attention),
            {**_MODULE, "__doc__": f"{self.row.attention_class} that reads another layer's keys."},
        )

    @cached_property
    def sparsek_model(self) -> type:
        def build(model, config):
            self.model.__init__(model, config)
            self._convert(model)
            model.post_init()

        return self._with_cache(self.row.model, self.model, {"__init__": build})

    def _with_cache(self, name: str, dense: type, members: dict[str, Any]) -> type:
        """A base model's class, or its decoder's, that brings its own cache."""
        return type(
            f"SparseK{name}",
            (SparseKModelMixin, dense),
            {
                **_MODULE,
                "__doc__": f"{name} with SparseK attention.",
                "__annotations__": {"config": self.sparsek_config},
                "_forward_names": forward_names(dense),
                "reads_once": self.row.reads_once,
                **members,
            },
        )

    @cached_property
    def sparsek_decoder(self) -> type | None:
        """The derived class of `Row.decoder`, where there is one."""
        name = self.row.decoder
        if not name:
            return None
        return self._with_cache(name, getattr(_module(self._runs, "modeling"), name), {})

    def _convert(self, base: Any) -> None:
        """Give the attention modules of a base model their scorers, and fix its positions."""
        fix_positions(base)
        base.learned_rows = learned_positions(base)
        if self.row.decoder:
            inner = base.get_submodule(self.row.layers.rpartition(".")[0])
            inner.__class__ = self.sparsek_decoder
            inner.learned_rows = base.learned_rows
        add_scorers(base, self.attention, self.sparsek_attention, self.reading_attention)
        if self.row.drops_arguments:
            for layer in base.get_submodule(self.row.layers):
                layer.register_forward_pre_hook(hand_on_bounds, with_kwargs=True)

    @cached_property
    def sparsek_causal_lm(self) -> type:
        def build(model, config):
            self.causal_lm.__init__(model, config)
            # The family's causal LM names its base model class itself: change it after the fact.
            model.base_model.__class__ = self.sparsek_model
            self._convert(model.base_model)
            model.base_model.post_init()
            model.post_init()

        return type(
            f"SparseK{self.row.causal_lm}",
            (SparseKCausalLMMixin, self.causal_lm),
            {
                **_MODULE,
                "__doc__": f"{self.row.causal_lm} with SparseK attention.",
                "__annotations__": {"config": self.sparsek_config},
                "__init__": build,
                "reads_once": self.row.reads_once,
            },
        )

    @property
    def derived(self) -> tuple[type, ...]:
        """The derived classes, in the order of `Row.sparsek_names`."""
        return (
            self.sparsek_config,
            self.sparsek_model,
            self.sparsek_causal_lm,
            self.sparsek_attention,
            *((self.sparsek_decoder,) if self.sparsek_decoder else ()),
            *((self.reading_attention,) if self.reading_attention else ()),
        )


def _module(row: Row, kind: str) -> Any:
    return importlib.import_module(f"transformers.models.{row.module}.{kind}_{row.module}")


FAMILIES: dict[str, Family] = {name: Family(row) for name, row in TABLE.items()}
_BY_CLASS_NAME = {name: row for row in TABLE.values() for name in row.sparsek_names}


def family_of(config: Any) -> Family:
    """The family of a dense or converted config (or of a `model_type` string).

    Raises:
        UsageError: the family is not supported; names those that are.
    """
    return FAMILIES[row_of(config).model_type]


def derived_class(name: str) -> type | None:
    """The derived class of this name, e.g. "SparseKLlamaForCausalLM"; None: there is none."""
    row = _BY_CLASS_NAME.get(name)
    if row is None:
        return None
    return FAMILIES[row.model_type].derived[row.sparsek_names.index(name)]


def sparsek_config_from(base_config: Any, settings: Mapping[str, Any]) -> PreTrainedConfig:
    """The config of the converted model: everything of the base, and the `sparsek` block.

    Attention dropout becomes 0 (a converted model trains without it). A sliding window that never
    binds (not below max_position_embeddings) is dropped; see `families.layers`.

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
    fields = base_config.to_dict()
    check_alone(fields)
    check_causal(fields)
    if family.row.by_layer:
        sizes_by_layer(base_config)
    check_rotary(fields, head_dim(base_config))
    for name in ("model_type", "transformers_version", "auto_map", "architectures"):
        fields.pop(name, None)
    fields.update(idle_window_off(family.row, fields, base_config.max_position_embeddings))
    if family.dropout:
        fields[family.dropout] = 0.0
    return family.sparsek_config(
        **fields, sparsek=dict(settings), architectures=[f"SparseK{family.row.causal_lm}"]
    )
