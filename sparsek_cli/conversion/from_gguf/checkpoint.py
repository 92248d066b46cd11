"""A GGUF file as a base that `convert` plans with: config and sizes, no tensor read."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from sparsek_cli.checkpoint_files.shards import Shard, TensorEntry
from sparsek_cli.checkpoint_files.weights_beside import listed, weight_files
from sparsek_cli.errors import UsageError, first_line
from sparsek_cli.families import TABLE
from sparsek_cli.gguf.header import FREQUENCIES, Header, read_header
from sparsek_cli.gguf.recognise import gguf_files, is_gguf
from sparsek_cli.hub import Checkpoint, is_short_name
from sparsek_cli.silence import quiet_transformers

_WIDTHS = {"bfloat16": ("BF16", 2), "float16": ("F16", 2), "float32": ("F32", 4)}
# Of every Llama since 3.1: what the factors in a file are computed from, but for `factor`.
_LLAMA3 = {
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


@dataclass(frozen=True, kw_only=True)
class GgufCheckpoint(Checkpoint):
    """A GGUF file; `path` is the file, `source` is "gguf"."""

    header: Header

    def config(self) -> dict[str, Any]:
        """config.json as the unpacked checkpoint will have it.

        Raises:
            UsageError: transformers cannot read files of this architecture.
        """
        config = self.transformers_config.to_dict()
        row = TABLE.get(config["model_type"])
        return {
            **config,
            "architectures": [row.causal_lm] if row else None,
            "dtype": self.header.dtype,
        }

    @cached_property
    def transformers_config(self) -> Any:
        """The config object, rotary frequencies included."""
        from transformers import AutoConfig

        header = self.header
        try:
            with quiet_transformers():
                config = AutoConfig.from_pretrained(self.path.parent, gguf_file=self.path.name)
        except Exception as error:  # ValueError, KeyError, NotImplementedError: by architecture
            why = first_line(error)
            raise UsageError(
                f"transformers cannot read GGUF files of architecture '{header.architecture}': "
                f"{why}",
                hint="name the checkpoint that the file was made from; its folder has a "
                "config.json",
            ) from error
        # Some families' sizes of heads are taken from the config class, not from the file.
        if header.head_dim is not None and hasattr(config, "head_dim"):
            config.head_dim = header.head_dim
        if header.frequencies is not None:
            _set_frequencies(config, header)
        return config

    def outline(self) -> list[Shard]:
        """The tensors that unpacking will write, as one shard that is not there yet."""
        import torch
        from transformers import AutoModelForCausalLM

        kind, width = _WIDTHS[self.header.dtype]
        with torch.device("meta"), quiet_transformers():
            model = AutoModelForCausalLM.from_config(self.transformers_config)
        # parameters() names what is tied once, as the file does.
        sizes = {name: tuple(p.shape) for name, p in model.named_parameters()}
        at, tensors = 0, {}
        for name, shape in sizes.items():
            end = at + width * int(np.prod(shape))
            tensors[name] = TensorEntry(kind, shape, at, end)
            at = end
        return [Shard(self.path, at, tensors)]


def find(name: str, revision: str | None = None) -> GgufCheckpoint | None:
    """The GGUF file that `name` means, a file or a folder that holds one and no config.json.

    As with every verb, a folder called as a known model is that model, unless it has a config.json.

    Raises:
        UsageError: a folder holds several, or other weights, `revision` is given, or see
            `read_header`.
        SparsekError: the file is damaged.
    """
    path = Path(name).expanduser()
    if path.is_dir() and not (path / "config.json").is_file() and not is_short_name(name):
        path = _only_file(path) or path
    if not path.is_file() or not is_gguf(path):
        return None
    if revision is not None:
        raise UsageError(
            f"--revision {revision} given, but '{name}' is a file",
            hint="a revision belongs to a hub id; drop it",
        )
    header = read_header(path)
    return GgufCheckpoint(path=header.path, name=path.stem, source="gguf", header=header)


def _only_file(folder: Path) -> Path | None:
    """The GGUF file of a folder without config.json; None where there is none.

    Raises:
        UsageError: something else there could be meant as well.
    """
    files = gguf_files(folder)
    if len(files) > 1:
        raise UsageError(
            f"'{folder}' holds {len(files)} GGUF files", hint=f"name one of them: '{files[0]}'"
        )
    others = [file.name for file in weight_files(folder) if file not in files]
    if files and others:
        raise UsageError(
            f"'{folder}' holds {files[0].name}, and {listed(others)} without a config.json: it is "
            "not clear which is meant",
            hint=f"name the file: '{files[0]}'; or fetch config.json and the tokenizer of the "
            "others",
        )
    return files[0] if files else None


def _set_frequencies(config: Any, header: Header) -> None:
    """Puts the settings behind a file's factors into the config.

    Raises:
        UsageError: no settings that are known give these factors.
    """
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    factors = header.frequencies
    plain = dict(config.rope_parameters)
    scaled = {**plain, **_LLAMA3, "rope_type": "llama3", "factor": float(factors.max())}
    config.rope_parameters = scaled
    frequencies = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")[0].numpy()
    half = len(frequencies)
    unscaled = plain["rope_theta"] ** (-np.arange(half) / half)
    if factors.shape != (half,) or not np.allclose(unscaled / frequencies, factors, rtol=1e-3):
        raise UsageError(
            f"'{header.path.name}' scales rotary frequencies ({FREQUENCIES}) in a way that is not "
            "known",
            hint="name the checkpoint it was made from",
        )
