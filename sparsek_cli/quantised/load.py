"""One way to load a checkpoint, quantised or not."""

from typing import TYPE_CHECKING, Any

from sparsek_cli.quantised.methods import METHODS, block_of, method_of

if TYPE_CHECKING:
    from pathlib import Path

    import torch
    from transformers import PreTrainedConfig, PreTrainedModel


def load(
    kind: Any,
    path: "Path",
    config: "PreTrainedConfig",
    dtype: "torch.dtype",
    device: "torch.device | str" = "cpu",
    **options: Any,
) -> "tuple[PreTrainedModel, dict[str, Any]]":
    """The model in a folder on a device, quantised or not, and transformers' report on its keys.

    Args:
        kind: class to load with. config: as read from the folder; it learns how it is loaded.
        dtype: of plain weights. A quantised checkpoint computes in the format that it was made
            for, which all methods round to; unpacked weights also in float32.
        device: "meta": of weights that do not stay packed, only names and shapes are read.
        options: passed on to `from_pretrained`.
    """
    import torch

    options |= {"config": config, "output_loading_info": True, "use_safetensors": True}
    method, meta = METHODS.get(method_of(config) or ""), str(device) == "meta"
    if method is None:
        place = {"device_map": "meta"} if meta else {}
        model, report = kind.from_pretrained(path, dtype=dtype, **place, **options)
        return (model if meta else model.to(device)), report
    # What is plain in such a checkpoint keeps the format it has, whatever is asked for.
    own = config.dtype or dtype
    if method.unpacked:
        config.quantization_config = {**block_of(config), "dequantize": True}
        model, report = kind.from_pretrained(path, dtype=own, **options)
        # To float32 alone: any other would round buffers, which are kept in it.
        return (model.float() if dtype == torch.float32 else model).to(device), report
    # Some methods choose a device by themselves and do not move; none can look without reading.
    place = {"": "cpu" if meta else device}
    return kind.from_pretrained(path, dtype=own, device_map=place, **options)
