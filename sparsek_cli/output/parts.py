"""Whether the parts of a converted folder are those that were written together."""

from pathlib import Path

from sparsek_cli.checkpoint_files import json_text, samples
from sparsek_cli.checkpoint_files.seal import check_seal
from sparsek_cli.checkpoint_files.shards import INDEX, read_shards
from sparsek_cli.output import written_config
from sparsek_cli.output.contents import SCORERS


def check_parts(folder: Path) -> None:
    """Nothing is known of a folder whose index does not say it. A changed config is warned of.

    Raises:
        SparsekError: scorers are damaged, or weights are others than those that were written.
    """
    if (folder / SCORERS).is_file():
        check_seal(folder / SCORERS)
    samples.check_samples(folder)
    written_config.say_changes(folder)


def record_parts(folder: Path, *, weights: bool) -> None:
    """Puts what `check_parts` compares into the index, which is made where there is none.

    Args:
        folder: a converted model, finished.
        weights: samples of its files, too; else the index keeps those that it has.
    """
    index = folder / INDEX
    if index.is_file():
        content = json_text.parse(index.read_text(encoding="utf-8"))
    else:
        places = {name: shard.path.name for shard in read_shards(folder) for name in shard.tensors}
        content = {"metadata": {}, "weight_map": places}
    metadata = content.setdefault("metadata", {})
    config = json_text.parse((folder / "config.json").read_text(encoding="utf-8"))
    metadata[written_config.KEY] = config
    if weights:
        files = sorted({*content["weight_map"].values()} - {SCORERS})
        metadata[samples.KEY] = samples.samples_of(folder / name for name in files)
    json_text.write(index, content)
