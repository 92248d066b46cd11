"""The checkpoint of a run as a model on its device, and lm-eval's view of it."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sparsek_cli.converted import is_converted
from sparsek_cli.errors import UsageError
from sparsek_cli.evaluation.policies.registry import DENSE, make_policy
from sparsek_cli.families.positions import context_length, learned_positions
from sparsek_cli.loading import (
    check_reads_on,
    check_tokenizer,
    embedding_rows,
    load_config,
    load_open_tokenizer,
    load_weights,
    readable_errors,
    stands_where_told,
)
from sparsek_cli.loading.positions import can_stretch, stretch
from sparsek_cli.silence import quiet_lm_eval

if TYPE_CHECKING:
    from sparsek_cli.evaluation.settings import Loading, Prompts
    from sparsek_cli.hub import Checkpoint


@dataclass(frozen=True)
class Measured:
    """What an evaluation measures.

    Attributes:
        lm: lm-eval's view of `model`.
        own: whether the model brings its own scores.
        max_length: most tokens of a prompt with its answer. beyond: see `ways_beyond`.
    """

    model: Any
    tokenizer: Any
    lm: Any
    own: bool
    max_length: int
    beyond: str


def measured_model(
    checkpoint: "Checkpoint",
    how: "Loading",
    prompts: "Prompts",
    *,
    sparse: bool,
    say: Callable[[str], None],
) -> Measured:
    """The checkpoint, loaded and ready to answer; arguments of `load_measured`, `harness_for`."""
    model, tokenizer, own = load_measured(checkpoint, how, sparse=sparse)
    max_length = most_tokens(model, tokenizer, prompts.max_length, say)
    lm = harness_for(model, tokenizer, prompts, max_length)
    return Measured(model, tokenizer, lm, own, max_length, ways_beyond(model))


def load_measured(
    checkpoint: "Checkpoint", how: "Loading", *, sparse: bool
) -> tuple[Any, Any, bool]:
    """Model in eval mode on its device, tokenizer, and whether the model brings its own scores.

    Args:
        how: device, dtype, and `yarn` for `stretch`.
        sparse: a dense model of a supported family becomes a sparse one in memory: windows and
            random pairs need no scores.

    Raises:
        UsageError: the tokenizer has no token to begin with, the model nothing to be cached, or
            it cannot be read in pieces.
    """
    from sparsek_cli.devices import choose_device, choose_dtype
    from sparsek_cli.models import FAMILIES, family_of, sparsek_config_from

    where = choose_device(how.device)
    dtype = choose_dtype(how.dtype, where)
    tokenizer = load_open_tokenizer(checkpoint)
    if tokenizer.bos_token_id is None and tokenizer.eos_token_id is None:
        raise UsageError(
            f"the tokenizer of '{checkpoint.name}' has neither a bos nor an eos token, one of "
            "which every text is measured after",
            hint='name one of its tokens in its tokenizer_config.json: "eos_token": "..."',
        )
    config = load_config(checkpoint.path, checkpoint.name)
    own = is_converted(config)
    kind = None
    if how.yarn is not None:
        stretch(config, how.yarn)
    if not own and config.model_type in FAMILIES and sparse:
        with readable_errors(checkpoint.name):
            kind = family_of(config).sparsek_causal_lm
            config = sparsek_config_from(config, {})
    model = load_weights(
        checkpoint.path, checkpoint.name, dtype=dtype, device=where, kind=kind,
        scorers_later=not own, config=config,
    )  # fmt: skip
    if "past_key_values" not in inspect.signature(model.forward).parameters:
        raise UsageError(
            f"'{checkpoint.name}' keeps no keys and values of what it reads ({config.model_type}), "
            "of which there is no policy, nor a cache to be measured",
            hint="name a model whose layers attend",
        )
    check_reads_on(model)
    check_tokenizer(tokenizer, embedding_rows(model), checkpoint.name)
    # Answers come in batches of many sizes: compiling for each takes longer than it saves.
    model.fused_steps = False
    return model.eval(), tokenizer, own


def harness_for(model: Any, tokenizer: Any, prompts: "Prompts", max_length: int) -> Any:
    """lm-eval's model class over `model`, set up as `prompts` says."""
    with quiet_lm_eval():
        from sparsek_cli.evaluation.lm.harness import SparsekLM

        lm = SparsekLM(
            model,
            tokenizer,
            policy=make_policy(DENSE),
            max_length=max_length,
            prompts=prompts,
        )
    if not stands_where_told(model):
        lm.answers_together = 1
    return lm


def most_tokens(model: Any, tokenizer: Any, wanted: int | None, say: Callable[[str], None]) -> int:
    """Most tokens of a prompt with its answer: `wanted`, else what config and tokenizer say.

    Raises:
        UsageError: `wanted` is beyond positions that were learned one by one.
    """
    from lm_eval.models.utils import resolve_max_length

    config = model.config
    own = resolve_max_length(config, tokenizer, default=2048)
    own = context_length(own, getattr(config, "rope_parameters", None))
    if wanted is None or wanted <= own:
        return wanted or own
    if learned_positions(model) is not None:
        raise UsageError(
            f"--max-length {wanted} is beyond the {own:,} positions of this {config.model_type}",
            hint=f"name at most {own}",
        )
    say(f"--max-length {wanted} is beyond the {own:,} tokens the model was made for")
    return wanted


def ways_beyond(model: Any) -> str:
    """The flags that let prompts be longer than `most_tokens` says; "" where nothing does."""
    if learned_positions(model) is not None:
        return ""
    return "--yarn FACTOR or --max-length N" if can_stretch(model.config) else "--max-length N"
