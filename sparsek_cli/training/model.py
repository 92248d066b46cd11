"""The model to train: loaded from a checkpoint, or built from a recipe with random weights."""

from typing import TYPE_CHECKING, Any

import torch

from sparsek_cli import quantised
from sparsek_cli.converted import is_converted
from sparsek_cli.data.pieces import ids_of
from sparsek_cli.errors import UsageError
from sparsek_cli.loading import load_config, load_weights, readable_errors
from sparsek_cli.training.parameters import is_scorer

if TYPE_CHECKING:
    from sparsek_cli.hub import Checkpoint
    from sparsek_cli.recipes.schema_finetune import Architecture
    from sparsek_cli.training.settings import Start

# Projections that write into the residual stream; GPT-2's own initialisation scales its already.
_WRITERS = ("o_proj.weight", "down_proj.weight", "attention.dense.weight", "dense_4h_to_h.weight")


def random_config(
    shape: "Architecture", sparsek: dict[str, Any] | None, length: int, tokenizer: Any
) -> Any:
    """The config of a model from scratch; sizes that `shape` leaves open come from the tokenizer.

    Args:
        sparsek: attention settings; None: a dense model.
        length: tokens per sequence, the model's positions where `shape` names none.

    Raises:
        UsageError: unknown family, an unknown or impossible setting, or too small a vocabulary.
    """
    from transformers import AutoConfig

    from sparsek_cli.models import sparsek_config_from

    settings = {
        "vocab_size": ids_of(tokenizer),
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        ("n_positions" if shape.type == "gpt2" else "max_position_embeddings"): length,
        **shape.settings,
    }
    try:
        config = AutoConfig.for_model(shape.type)
        unknown = [key for key in shape.settings if not hasattr(config, key)]
        if unknown:
            raise UsageError(
                f"architecture.settings: a {shape.type} config has no '{unknown[0]}'",
                hint="use the field names of the family's own transformers config",
            )
        config = AutoConfig.for_model(shape.type, **settings)
    except (ValueError, TypeError) as error:
        raise UsageError(
            f"architecture: {str(error).splitlines()[0]}",
            hint="types: llama, mistral, qwen2, qwen3, gpt_neox, gpt2",
        ) from error
    if config.vocab_size < ids_of(tokenizer):
        raise UsageError(
            f"architecture.settings.vocab_size is {config.vocab_size}, the tokenizer has "
            f"{ids_of(tokenizer)} ids",
            hint="leave vocab_size out, or round it up",
        )
    return config if sparsek is None else sparsek_config_from(config, sparsek)


def model_without_weights(start: "Start", tokenizer: Any, source: "Checkpoint | None") -> Any:
    """The model that a run starts from, on the meta device: shapes and names only."""
    from transformers import AutoModelForCausalLM

    import sparsek_cli.models  # noqa: F401  (registers our families)

    if start.architecture is not None:
        config = random_config(start.architecture, start.attention, start.length, tokenizer)
    else:
        config = load_config(source.path, source.name)
    name = "architecture" if source is None else source.name
    with torch.device("meta"), readable_errors(name):
        return AutoModelForCausalLM.from_config(config)


def build_random(config: Any, *, seed: int) -> Any:
    """A float32 model with random weights, the same for the same seed.

    Projections into the residual stream are divided by sqrt(2 x layers).
    """
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    factor = (2 * config.num_hidden_layers) ** -0.5
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(_WRITERS):
                parameter.mul_(factor)
    return model


def load_pretrained(
    source: "Checkpoint", sparsek: dict[str, Any], dtype: torch.dtype, device: torch.device
) -> Any:
    """The checkpoint's model.

    Args:
        sparsek: attention settings that replace its own.
        dtype: of the weights in memory; what learns becomes float32 later.
        device: where packed weights go, see quantised.py; others wait for the trainer.

    Raises:
        UsageError: attention settings are given for a dense model, or do not fit.
        SparsekError: see loading.load_weights.
    """
    config = load_config(source.path, source.name)
    where = device if quantised.stays_packed(config) else "cpu"
    model = load_weights(source.path, source.name, dtype=dtype, device=where, config=config)
    if sparsek and not is_converted(model.config):
        raise UsageError(
            "the recipe sets 'sparsek', but the model is dense",
            hint="convert it first: `sparsek convert MODEL`, then fine-tune the result",
        )
    if sparsek:
        from sparsek_cli.models import set_budget

        set_budget(model, **sparsek)
    return model


def cast_for_saving(
    model: Any, dtype: torch.dtype, state: dict[str, torch.Tensor] | None
) -> dict[str, torch.Tensor] | None:
    """Weights become `dtype`, scorers float32: in the model, or in its gathered `state`."""
    model.config.dtype = dtype
    if state is not None:
        return {
            name: tensor.float() if is_scorer(name) else tensor.to(dtype)
            for name, tensor in state.items()
        }
    for name, parameter in model.named_parameters():
        if not is_scorer(name) and parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)
    return None
