"""What `sparsek_<type>` models add to their family's classes: scorers, cache, packing, generation.

No modelling code is copied: a family's model is built by its own class, and then its attention
modules (and, inside a causal LM, its base model) change class in place.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import nn
from transformers import initialization as init
from transformers.generation import GenerationMode

from sparsek_cli.errors import SparsekError, UsageError
from sparsek_cli.families.by_layer import shared_layers
from sparsek_cli.families.layers import has_states, storing_layers
from sparsek_cli.models.attention.sharing import last_token, reads_slots
from sparsek_cli.models.attention.sparsek import SparseKAttentionMixin, check_cache
from sparsek_cli.models.cache.slots import SparseKCache
from sparsek_cli.models.config import ATTENTION, DENSE_ATTENTION, sparse_layers
from sparsek_cli.models.generation.decoding import can_write, write
from sparsek_cli.models.generation.prefill import READ_CHUNK, reads_in_chunks
from sparsek_cli.models.heads import check_heads
from sparsek_cli.models.scorer import (
    DEFAULT_SLOPE,
    RandomScorer,
    SparseKMlpScorer,
    SparseKScorer,
    new_scorer,
)

# What is asked of all tokens, whatever logits are wanted.
_RECORDED = ("output_hidden_states", "output_attentions", "output_router_logits")
# Modes that only ever append tokens or reorder rows.
_GENERATION_MODES = (
    GenerationMode.GREEDY_SEARCH,
    GenerationMode.SAMPLE,
    GenerationMode.BEAM_SEARCH,
    GenerationMode.BEAM_SAMPLE,
)


def add_scorers(base: nn.Module, dense: type, sparse: type, reading: type | None) -> None:
    """Turn `dense` attention modules below `base` into `sparse` ones with a scorer.

    Those without keys of their own become `reading` ones. Layers that slide stay as they are.

    Raises:
        UsageError: no layer attends to everything, or keys are other than the config says.
    """
    layers = sparse_layers(base.config)
    if not layers:
        raise UsageError(
            "no layer of the model attends to everything: there is nothing to convert",
            hint="its cache is bounded already",
        )
    types = getattr(base.config, "layer_types", None) or ()
    readers = storing_layers(types, shared_layers(base.config))
    for module in base.modules():
        if type(module) is dense and module.layer_idx in layers:
            check_heads(module, base.config)
            module.__class__ = sparse
            module.scorer = new_scorer(base.config, module.layer_idx)
            module.is_read = module.layer_idx in readers.values()
        elif type(module) is dense and module.layer_idx in readers:
            module.__class__ = reading


def sparsek_attentions(model: nn.Module) -> list[nn.Module]:
    """The SparseK attention modules of a model (wrapped or not), in order of their layer."""
    found = [module for module in model.modules() if isinstance(module, SparseKAttentionMixin)]
    if not found:
        raise SparsekError(
            f"{type(model).__name__} has no SparseK attention", hint="convert the model first"
        )
    return sorted(found, key=lambda module: module.layer_idx)


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
    """

    reads_once = False

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


class SparseKCausalLMMixin(SparseKPreTrainedMixin):
    """For causal LMs: `generate` uses a `SparseKCache` and says no to what cannot work.

    Attributes:
        read_chunk: how many tokens, of all rows together, are read at once (see
            generation/prefill.py); None for all.
        fused_steps: whether decoding steps that are CUDA graphs take our own kernels for linear
            maps and norms (see generation/fused).
    """

    read_chunk: int | None = READ_CHUNK
    fused_steps: bool = True
    reads_once = False

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if not getattr(cls.forward, "reads_in_chunks", False):
            cls.forward = reads_in_chunks(cls.forward)

    def _prepare_cache_for_generation(
        self, generation_config, model_kwargs, generation_mode, *args: Any, **kwargs: Any
    ):
        implementation = self.config._attn_implementation
        if implementation == ATTENTION:
            self._check_generation(generation_config, generation_mode)
            if model_kwargs.get("past_key_values") is None and generation_config.use_cache:
                cache = model_kwargs["past_key_values"] = SparseKCache(self.config)
                cache.given = False  # nobody has it but this call
        check_cache(model_kwargs.get("past_key_values"), implementation)
        return super()._prepare_cache_for_generation(
            generation_config, model_kwargs, generation_mode, *args, **kwargs
        )

    def _sample(
        self,
        input_ids: torch.Tensor,
        logits_processor: Any,
        stopping_criteria: Any,
        generation_config: Any,
        synced_gpus: bool = False,
        streamer: Any = None,
        tokenizer: Any = None,
        **model_kwargs: Any,
    ):
        """Greedy search and sampling, by our own loop where it does what transformers' would.

        The tokenizer, which transformers hands on to the model, was for the stop strings.
        """
        rest = (input_ids, logits_processor, stopping_criteria, generation_config)
        if can_write(generation_config, model_kwargs, synced_gpus=synced_gpus):
            return write(self, *rest, streamer, model_kwargs)
        return super()._sample(*rest, synced_gpus=synced_gpus, streamer=streamer, **model_kwargs)

    def init_continuous_batching(self, *args: Any, **kwargs: Any):
        """Refused: it keeps keys and values in pages of a cache that grows.

        Raises:
            SparsekError: always.
        """
        raise SparsekError(
            "continuous batching needs a paged cache, and SparseK keeps a state of constant size",
            hint="call generate with a padded batch; serve without --continuous-batching",
        )

    @staticmethod
    def _check_generation(generation_config, generation_mode) -> None:
        if generation_mode not in _GENERATION_MODES or getattr(
            generation_config, "is_assistant", False
        ):
            name = getattr(generation_mode, "value", generation_mode).replace("_", " ")
            raise SparsekError(
                f"{name} takes tokens back, and pairs a SparseK cache evicted cannot come back",
                hint="use greedy search, sampling or beams, without assistant_model and "
                "prompt_lookup_num_tokens",
            )
        kind = generation_config.cache_implementation
        if kind not in (None, "dynamic"):
            raise SparsekError(
                f"cache_implementation is {kind!r}",
                hint="a SparseK model brings its own constant-size cache: leave it out",
            )
        generation_config.cache_implementation = None


def forward_names(model_class: type) -> tuple[str, ...]:
    """Names of the positional arguments of a model class's forward, without self."""
    return tuple(inspect.signature(model_class.forward).parameters)[1:]
