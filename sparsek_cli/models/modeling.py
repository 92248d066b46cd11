"""What `sparsek_<type>` models add to their family's classes: scorers, cache, packed documents.

No modelling code is copied: a family's model is built by its own class, and then its attention
modules (and, inside a causal LM, its base model) change class in place.
"""

from __future__ import annotations

import inspect
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import initialization as init

from sparsek_cli.errors import SparsekError
from sparsek_cli.families.layers import has_states
from sparsek_cli.models.attention.sharing import last_token, reads_slots
from sparsek_cli.models.attention.sparsek import check_cache
from sparsek_cli.models.cache.slots import SparseKCache
from sparsek_cli.models.config import ATTENTION, DENSE_ATTENTION
from sparsek_cli.models.learned_positions import check_positions
from sparsek_cli.models.scorer import (
    DEFAULT_SLOPE,
    FAINT,
    NO_LIMIT,
    RandomScorer,
    SparseKMlpScorer,
    SparseKScorer,
)
from sparsek_cli.output.parts import check_parts

# What is asked of all tokens, whatever logits are wanted.
_RECORDED = ("output_hidden_states", "output_attentions", "output_router_logits")


class SparseKPreTrainedMixin:
    """For base models and causal LMs alike: scorers are initialised, and stay float32."""

    _keep_in_fp32_modules_strict = {"scorer"}

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, SparseKScorer):
            # The input is normalised, so this gives scores a spread of about 1: far smaller and
            # nothing is selected clearly, far larger and no score gets a gradient.
            init.normal_(module.weight, std=module.weight.shape[1] ** -0.5)
            init.zeros_(module.bias)
            init.constant_(module.slopes, DEFAULT_SLOPE)
            if module.stand_ins is not None:
                # Whole: a view of what was loaded does not say so, and would be filled.
                pairs = torch.zeros_like(module.stand_ins)
                pairs[..., -2], pairs[..., -1] = FAINT, NO_LIMIT
                init.copy_(module.stand_ins, pairs)
            if isinstance(module, SparseKMlpScorer):
                init.normal_(module.hidden_weight, std=module.hidden_weight.shape[1] ** -0.5)
                init.zeros_(module.hidden_bias)
                init.zeros_(module.out_weight)
        elif isinstance(module, RandomScorer):
            init.zeros_(module.slopes)  # in no checkpoint, so nobody else fills it

    def _initialize_weights(self, module: nn.Module, *args: Any, **kwargs: Any) -> None:
        # transformers takes our classes for code that initialises what is loaded already, and
        # leaves out models whose parameters all are: Falcon-H1 fills buffers of its layers there.
        if isinstance(module, SparseKPreTrainedMixin):
            if not getattr(module, "_is_hf_initialized", False):
                self._init_weights(module)
                module._is_hf_initialized = True
            return
        super()._initialize_weights(module, *args, **kwargs)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """As transformers', of a folder whose parts belong together (see output/parts.py).

        Raises:
            SparsekError: they do not.
        """
        name = pretrained_model_name_or_path
        if isinstance(name, str | PathLike):
            check_parts(Path(name, kwargs.get("subfolder") or ""))
        return super().from_pretrained(name, *args, **kwargs)

    def set_attn_implementation(self, attn_implementation: Any, *args: Any, **kwargs: Any) -> None:
        """As transformers', for our own names.

        Raises:
            UsageError: one of transformers' names, which would switch SparseK off.
        """
        self.config._attn_implementation = attn_implementation

    @classmethod
    def register_for_auto_class(cls, auto_class: str = "AutoModel") -> None:
        """Nothing to do: the default would copy this package's sources into every save."""


class SparseKModelMixin(SparseKPreTrainedMixin):
    """For base models: brings its own cache, and finds packed documents once for all layers.

    Attributes:
        reads_once: see `families.Row`.
        learned_rows: tokens that its table of learned positions has places for; None: no table.
    """

    reads_once = False
    learned_rows: int | None = None

    def forward(self, *args: Any, **kwargs: Any):
        """As the family's base model.

        Beyond it, `cu_seq_lens_q` (int32 [documents + 1], over all tokens of the batch) or
        `position_ids` that start again mark packed documents, which never see each other.
        """
        names = self._forward_names
        kwargs.update(zip(names, args, strict=False))
        if kwargs.get("output_attentions"):
            raise SparsekError(
                "SparseK attention has no attention weights to return",
                hint="leave output_attentions out, or ask the base model for them",
            )
        implementation = self.config._attn_implementation
        given = kwargs.get("past_key_values")
        check_cache(given, implementation)
        if given is None:
            if implementation in (ATTENTION, DENSE_ATTENTION):
                self._prepare_packing(kwargs)
            if kwargs.get("use_cache") is None:
                packed = kwargs.get("cu_seq_lens_q") is not None
                kwargs["use_cache"] = self.config.use_cache and not (self.training or packed)
            recomputing = self.training and getattr(self, "gradient_checkpointing", False)
            if implementation == ATTENTION and kwargs["use_cache"] and not recomputing:
                kwargs["past_key_values"] = SparseKCache(self.config)
        check_positions(self, kwargs)
        if self.reads_once and given is not None:
            self._check_piece(given, kwargs)
        caching = given is not None or kwargs["use_cache"]
        if kwargs.get("cu_seq_lens_q") is not None and caching:
            raise SparsekError("packed documents cannot share a cache", hint="pass use_cache=False")
        if kwargs.get("cu_seq_lens_q") is not None and has_states(
            getattr(self.config, "layer_types", None)
        ):
            raise SparsekError(
                "a packed batch would carry one document's states into the next: some layers of "
                f"{self.config.model_type.removeprefix('sparsek_')} keep a state",
                hint="give each document a row of its own, with an attention mask",
            )
        return super().forward(**kwargs)

    def _check_piece(self, cache: Any, kwargs: dict[str, Any]) -> None:
        tokens = kwargs.get("input_ids")
        tokens = kwargs.get("inputs_embeds") if tokens is None else tokens
        if tokens is not None and tokens.shape[1] > 1 and cache.get_seq_length():
            raise SparsekError(
                f"the state-space layers of {self.config.model_type.removeprefix('sparsek_')} "
                "continue a text by one token at a time",
                hint="pass logits_to_keep=1 to the causal language model, which then does so",
            )

    def _maybe_slice_kv_shared_inputs(self, *inputs: Any, past_key_values: Any = None, **kwargs):
        """Gemma 4 leaves out tokens whose logits nobody wants where only keys of others are read.

        Here all but the last one, whose keys are those that the cache then holds, or none.

        Args:
            inputs: states of all tokens and what goes with them, and `logits_to_keep`.
        """
        *whole, kept = inputs
        tokens, recorded = whole[0].shape[1], any(kwargs.get(name) for name in _RECORDED)
        if type(kept) is not int or kept != 1 or tokens == 1 or recorded:
            return tuple(whole)
        return last_token(whole) if reads_slots(self.config, past_key_values, whole) else whole

    @staticmethod
    def _prepare_packing(kwargs: dict[str, Any]) -> None:
        """Fill in whichever of `cu_seq_lens_q` and `position_ids` a packed batch left out."""
        bounds, positions = kwargs.get("cu_seq_lens_q"), kwargs.get("position_ids")
        tokens = kwargs.get("input_ids")
        tokens = kwargs.get("inputs_embeds") if tokens is None else tokens
        if tokens is None:
            return  # the family's own forward says what is missing
        batch, length = tokens.shape[:2]
        if bounds is not None:
            if int(bounds[-1]) != batch * length:
                raise SparsekError(
                    f"cu_seq_lens_q ends at {int(bounds[-1])}, the batch has {batch * length} "
                    "tokens",
                    hint="its last entry is the number of tokens in all rows together",
                )
            if positions is None:
                flat = torch.arange(batch * length, device=tokens.device)
                bounds = bounds.to(flat.device, torch.long)
                document = torch.searchsorted(bounds, flat, right=True) - 1
                kwargs["position_ids"] = (flat - bounds[document]).view(batch, length)
        elif positions is not None and kwargs.get("attention_mask") is None:
            positions = positions.expand(batch, length)
            restarts = positions[:, 1:] != positions[:, :-1] + 1
            if bool(restarts.any()):
                starts = nn.functional.pad(restarts, (1, 0), value=True).flatten()
                bounds = starts.nonzero().flatten().to(torch.int32)
                kwargs["cu_seq_lens_q"] = nn.functional.pad(bounds, (0, 1), value=batch * length)


def forward_names(model_class: type) -> tuple[str, ...]:
    """Names of the positional arguments of a model class's forward, without self."""
    return tuple(inspect.signature(model_class.forward).parameters)[1:]
