"""Weights that a run writes whole, with what loaders compare in their headers.

transformers writes the files and takes no metadata. Files up to 2 GiB are hashed afterwards; larger
ones would have to be written twice to hold anything, so that room for a sample is left beforehand.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import modeling_utils

from sparsek_cli import disk
from sparsek_cli.checkpoint_files.file_hashes import SOON
from sparsek_cli.checkpoint_files.samples import BLANK, fill_sample
from sparsek_cli.checkpoint_files.samples import KEY as SAMPLE
from sparsek_cli.checkpoint_files.seal import seal
from sparsek_cli.converted import is_converted
from sparsek_cli.output.written_config import KEY as CONFIG


def write_weights(model: Any, folder: Path, state: dict[str, torch.Tensor] | None) -> None:
    """`save_pretrained`, and what was written said in each file.

    Args:
        state: the full state dict where the model is sharded, else None.
    """
    with _saying(_metadata(model)):
        model.save_pretrained(folder, state_dict=state)
    files = sorted(folder.glob("*.safetensors"))
    few = sum(file.stat().st_size for file in files) <= SOON
    for file in files:
        fill_sample(file)
        if few:
            seal(file)
        disk.readable(file)


def _metadata(model: Any) -> dict[str, str]:
    converted = is_converted(model.config)
    return {SAMPLE: BLANK, **({CONFIG: model.config.to_json_string()} if converted else {})}


@contextmanager
def _saying(metadata: dict[str, str]) -> Iterator[None]:
    """What transformers writes meanwhile has these in its header, too."""
    real = modeling_utils.safe_save_file

    def save(tensors: Any, file: Any, given: Any = None, **named: Any) -> None:
        given = named.pop("metadata", given) or {}
        real(tensors, file, metadata={**given, **metadata}, **named)

    modeling_utils.safe_save_file = save
    try:
        yield
    finally:
        modeling_utils.safe_save_file = real
