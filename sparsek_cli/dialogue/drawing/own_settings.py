"""What a model's generation_config.json asks of the next token, heeded as `generate` heeds it.

Penalties, bans and cut-offs are transformers' own processors of logits. Temperature and top_p are
chat's own settings, and whether tokens are drawn is the temperature's: the file's do not count.
"""

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from sparsek_cli.dialogue.drawing.sampling import Sampling
from sparsek_cli.errors import UsageError, reason

if TYPE_CHECKING:
    import torch
    from transformers import GenerationConfig, LogitsProcessorList

_ALWAYS = (
    "repetition_penalty", "no_repeat_ngram_size", "encoder_repetition_penalty",
    "encoder_no_repeat_ngram_size", "bad_words_ids", "sequence_bias", "suppress_tokens",
    "begin_suppress_tokens", "min_length", "min_new_tokens", "forced_bos_token_id",
    "forced_eos_token_id", "exponential_decay_length_penalty", "remove_invalid_values",
    "renormalize_logits", "watermarking_config",
)  # fmt: skip
_WHERE_DRAWN = ("top_k", "min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff")
# More than one sequence, more than one forward pass for a token, or ends that are no tokens.
_NOT = ("num_beams", "guidance_scale", "stop_strings", "max_time", "penalty_alpha", "dola_layers")
_NOTHING = {"num_beams": 1, "guidance_scale": 1}


class Shaped:
    """Logits as a model's own settings shape them, for one reply.

    Args:
        processors: transformers'. said: ids of the conversation so far.
        sampling: how they are drawn afterwards.
    """

    def __init__(self, processors: "LogitsProcessorList", said: "torch.Tensor", sampling: Sampling):
        self._processors, self._said = processors, said
        self.sampling = sampling

    def __call__(self, logits: "torch.Tensor") -> "torch.Tensor":
        """Of logits [vocabulary], float32; those given stay as they are.

        Raises:
            UsageError: see `shaped`; ids beyond the vocabulary are found by its width alone.
        """
        with _one_that_can_be():
            return self._processors(self._said, logits[None].clone())[0]

    def follow(self, token: int) -> None:
        """A token was drawn."""
        import torch

        self._said = torch.cat([self._said, self._said.new_tensor([[token]])], dim=1)


def shaped(
    model: Any,
    sampling: Sampling,
    stop_tokens: frozenset[int],
    said: Callable[[], Sequence[int]],
) -> Shaped | None:
    """What shapes a reply; None where the model's own settings ask for nothing.

    Args:
        said: gives the ids of the conversation. Asked only where something is shaped: of a million
            tokens a list takes more memory than the cache.

    Raises:
        UsageError: generation_config.json asks for what cannot be.
    """
    import torch

    own = getattr(model, "generation_config", None)
    if own is None:
        return None
    config = copy.deepcopy(own)
    config.guidance_scale, config.num_beams = None, 1
    config.do_sample = sampling.temperature > 0
    config.temperature = config.top_p = None
    if not _processors_of(model, copy.deepcopy(config)):
        return None
    ids = torch.tensor([said()], device=model.device)
    config.max_length = ids.shape[1] + sampling.max_new_tokens
    config.temperature, config.top_p = sampling.temperature, sampling.top_p
    plain = replace(sampling, temperature=float(config.do_sample), top_p=1.0)
    return Shaped(_processors(model, config, stop_tokens, ids), ids, plain)


def in_words(model: Any) -> str:
    """What of the model's own settings counts in chat and what does not; "" where it has none."""
    from transformers import GenerationConfig

    own = getattr(model, "generation_config", None)
    if own is None:
        return ""

    def counting(keys: tuple[str, ...]) -> list[str]:
        found = {key: value for key in keys if (value := getattr(own, key, None)) is not None}
        return [
            f"{key} {value}" if isinstance(value, int | float) else key
            for key, value in found.items()
            if _processors_of(model, GenerationConfig(do_sample=True, **{key: value}))
        ]

    always, drawn = counting(_ALWAYS), counting(_WHERE_DRAWN)
    left = {key: getattr(own, key, None) for key in _NOT}
    idle = [key for key, value in left.items() if value not in (None, _NOTHING.get(key))]
    parts = [
        f"{', '.join(always)} counts" if always else "",
        f"{', '.join(drawn)} counts where a temperature draws" if drawn else "",
        f"{', '.join(idle)} is not heeded" if idle else "",
    ]
    return "; ".join(part for part in parts if part)


def _processors_of(model: Any, config: "GenerationConfig") -> "LogitsProcessorList":
    import torch

    config.max_length = 2
    return _processors(model, config, frozenset({0}), torch.zeros(1, 1, dtype=torch.long))


def _processors(
    model: Any, config: "GenerationConfig", stop_tokens: frozenset[int], ids: "torch.Tensor"
) -> "LogitsProcessorList":
    import torch

    ends = torch.tensor(sorted(stop_tokens), device=ids.device) if stop_tokens else None
    config._eos_token_tensor = ends
    with _one_that_can_be():
        return model._get_logits_processor(
            config, input_ids_seq_length=ids.shape[1], encoder_input_ids=ids, device=ids.device
        )


@contextmanager
def _one_that_can_be() -> Iterator[None]:
    try:
        yield
    except (ValueError, TypeError, AttributeError, LookupError) as error:
        raise UsageError(
            f"generation_config.json asks for what cannot be: {reason(error)}",
            hint="correct it, or remove it: it only says how to generate",
        ) from error
