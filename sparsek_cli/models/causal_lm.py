"""What causal LMs of ours add to their family's: their cache, reading in chunks, generation."""

from __future__ import annotations

from typing import Any

import torch
from transformers.generation import GenerationMode

from sparsek_cli.errors import SparsekError
from sparsek_cli.models.attention.sparsek import check_cache
from sparsek_cli.models.cache.slots import SparseKCache
from sparsek_cli.models.config import ATTENTION
from sparsek_cli.models.generation.decoding import can_write, write
from sparsek_cli.models.generation.prefill import READ_CHUNK, keeps_cache, reads_in_chunks
from sparsek_cli.models.modeling import SparseKPreTrainedMixin

# Modes that only ever append tokens or reorder rows.
_GENERATION_MODES = (
    GenerationMode.GREEDY_SEARCH,
    GenerationMode.SAMPLE,
    GenerationMode.BEAM_SEARCH,
    GenerationMode.BEAM_SAMPLE,
)


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
        prepare = cls.prepare_inputs_for_generation
        if not getattr(prepare, "keeps_cache", False):
            cls.prepare_inputs_for_generation = keeps_cache(prepare)

    @property
    def learned_rows(self) -> int | None:
        """Tokens that a table of learned positions has places for; None: there is no table."""
        return self.base_model.learned_rows

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
        # PEFT's learned prompts put theirs there, and read more tokens than the text has.
        own = getattr(self.prepare_inputs_for_generation, "__self__", None) is self
        if own and can_write(generation_config, model_kwargs, synced_gpus=synced_gpus):
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

    def _check_generation(self, generation_config, generation_mode) -> None:
        assists = getattr(generation_config, "is_assistant", False)
        if generation_mode not in _GENERATION_MODES or assists:
            name = getattr(generation_mode, "value", generation_mode).replace("_", " ")
            name = "assisting another model" if assists else name
            raise SparsekError(
                f"{name} takes tokens back, and pairs a SparseK cache evicted cannot come back",
                hint="use greedy search, sampling or beams, without assistant_model and "
                "prompt_lookup_num_tokens",
            )
        kind = generation_config.cache_implementation
        # A base's own generation_config.json may ask for one, which was meant for its own cache.
        if kind not in (None, "dynamic", self.generation_config.cache_implementation):
            raise SparsekError(
                f"cache_implementation is {kind!r}",
                hint="a SparseK model brings its own constant-size cache: leave it out",
            )
        generation_config.cache_implementation = None
