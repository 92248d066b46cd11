"""Tensors under the names that something which wraps a model gives them."""

from collections.abc import Iterable

WRAPPED = (
    "its tensors have the names of something that wraps the model (a trainer's, or a larger "
    "model's part): save what is in there with save_pretrained, then name that folder"
)


def in_place_of(missing: str, names: Iterable[str]) -> str | None:
    """The one of `names` that is `missing` with more parts between its dots; None: there is none.

    `language_model.model.norm.weight` stands for `model.norm.weight`, and so does
    `model._fsdp_wrapped_module.norm.weight`.
    """
    wanted = missing.split(".")
    last = f".{wanted[-1]}"
    for name in names:
        if name != missing and name.endswith(last):
            parts = iter(name.split("."))
            if all(part in parts for part in wanted):
                return name
    return None
