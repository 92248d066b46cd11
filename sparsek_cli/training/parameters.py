"""Which parameters learn: scorers, LoRA adapters, or everything; and at which rate."""

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from sparsek_cli.converted import is_converted
from sparsek_cli.errors import UsageError

if TYPE_CHECKING:
    from sparsek_cli.recipes.schema_finetune import Lora


def is_scorer(name: str) -> bool:
    """Whether a parameter name belongs to a scoring network (its slopes included)."""
    return ".scorer." in name


def choose_parameters(
    model: Any,
    train: str,
    lora: "Lora | None" = None,
    *,
    shape_base: bool = False,
    scorers: str = "gates",
) -> Any | None:
    """Sets requires_grad everywhere; what learns becomes float32.

    Args:
        train: "scorers", "lora" or "all".
        lora: adapter settings, needed for "lora".
        shape_base: whether the gradient of scores goes on into the layers below.
        scorers: how they learn, the recipe's `scorer_training`.

    Returns:
        PEFT's LoraModel for `train: lora` (it has put adapters into `model`), else None.

    Raises:
        UsageError: scorers are to be trained and the model has none, or nothing in them learns.
    """
    tuner = None
    if train == "scorers" and not is_converted(model.config):
        raise UsageError(
            "this model has no scorers: it is dense",
            hint="convert it first (`sparsek convert`), or set train=all or train=lora",
        )
    if train == "lora":
        tuner = _add_adapters(model, lora)
    for name, parameter in model.named_parameters():
        if is_scorer(name):
            learns = _scorer_learns(name, scorers) and (train != "lora" or lora.scorers)
        else:
            learns = train == "all" or (train == "lora" and "lora_" in name)
        parameter.requires_grad_(learns)
        # Changed between steps and by no gradient: a part of what a checkpoint has to keep.
        parameter.refitted = scorers == "refit" and is_scorer(name) and not _is_stand_in(name)
    if train != "scorers" or scorers == "concurrent":
        # The loss that scores have of their own would reach stand-ins of the layers below.
        _set_shaping(model, shape_base)
    for name in _idle_scorers(model):
        model.get_parameter(name).requires_grad_(False)
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not learning:
        raise UsageError(
            f"with train: {train} and scorer_training: {scorers} there is nothing to train: the "
            "model has no stand-ins" + ("" if scorers == "refit" else " and selects nothing"),
            hint="set train=all or train=lora; `sparsek convert MODEL OUT --again` fits scorers to "
            "a model as it is, without training",
        )
    for parameter in learning:
        parameter.data = parameter.data.float()
    return tuner


def _scorer_learns(name: str, scorers: str) -> bool:
    """Whether a parameter of a scorer has a gradient; slopes feel the gates' alone.

    Stand-ins have that of the loss, whatever scorers learn from, if they learn.
    """
    if _is_stand_in(name):
        return scorers != "frozen"
    if scorers == "concurrent":
        return not name.endswith(".slopes")
    return scorers == "gates"


def _is_stand_in(name: str) -> bool:
    return name.endswith(".scorer.stand_ins")


def changing_parameters(model: Any) -> dict[str, torch.nn.Parameter]:
    """Those that a run changes, by name: those that learn, and scorers that are fitted anew."""
    return {
        name: parameter
        for name, parameter in model.named_parameters()
        if parameter.requires_grad or getattr(parameter, "refitted", False)
    }


def _set_shaping(model: Any, shape: bool) -> None:
    """Whether the gradient of scores goes on into the layers below.

    It estimates the slope of a hard choice and is not the gradient of what is minimised.
    """
    for name, module in model.named_modules():
        if name.endswith(".scorer"):
            module.shapes_input = shape


def _idle_scorers(model: Any) -> Iterable[str]:
    """Scorers of layers that select nothing: they get no gradient, which DDP takes for a fault.

    Their stand-ins do: a window leaves tokens out, too.
    """
    if not is_converted(model.config):
        return
    topk = model.config.sparsek.get("topk")
    for name, _ in model.named_parameters():
        if not is_scorer(name) or _is_stand_in(name):
            continue
        layer = next(int(part) for part in name.split(".") if part.isdigit())
        here = topk[layer] if isinstance(topk, list | tuple) else topk
        if not any(here) if isinstance(here, list | tuple) else not here:
            yield name


def _add_adapters(model: Any, lora: "Lora") -> Any:
    from peft import LoraConfig
    from peft.tuners.lora import LoraModel

    from sparsek_cli.models import family_of

    wanted = lora.targets or list(family_of(model.config).lora_targets)
    settings = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=wanted,
    )
    try:
        return LoraModel(model, {"default": settings}, "default")
    except ValueError as error:
        raise UsageError(
            f"lora.targets {wanted}: {str(error).splitlines()[0]}",
            hint=f"layers of this model: {', '.join(sorted(_linear_names(model)))}",
        ) from error


def _linear_names(model: Any) -> set[str]:
    """Last names of the linear layers inside the blocks (not the output layer, not scorers)."""
    from transformers.pytorch_utils import Conv1D

    output = model.get_output_embeddings()
    return {
        name.split(".")[-1]
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D)
        and module is not output
        and not is_scorer(f"{name}.")
    }


def optimizer_groups(
    model: Any, rate: float, scorer_rate: float, weight_decay: float
) -> list[dict[str, Any]]:
    """AdamW groups: matrices decay, vectors and embeddings do not, scorers have their own rate."""
    embeddings = {
        id(p) for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters()
    }
    scorers, matrices, rest = [], [], []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if is_scorer(name):
            scorers.append(parameter)
        elif parameter.ndim >= 2 and id(parameter) not in embeddings:
            matrices.append(parameter)
        else:
            rest.append(parameter)
    groups = [
        {"params": matrices, "weight_decay": weight_decay, "lr": rate},
        {"params": rest, "weight_decay": 0.0, "lr": rate},
        {"params": scorers, "weight_decay": 0.0, "lr": scorer_rate},
    ]
    return [group for group in groups if group["params"]]


def trained_state(model: Any) -> dict[str, torch.Tensor]:
    """The parameters that a run changes, by name, on the CPU."""
    return {
        name: parameter.detach().cpu().clone()
        for name, parameter in changing_parameters(model).items()
    }
