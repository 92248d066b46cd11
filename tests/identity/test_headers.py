"""Headers and indexes of weights that lie: refused in our own words, for every verb."""

from __future__ import annotations

import json

import pytest

from sparsek_cli import hub
from sparsek_cli.checkpoint_files.shards import read_shard
from sparsek_cli.errors import SparsekError

PLAIN = {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}
DATA = bytes(48)


def write(file, header: str | dict, data: bytes = DATA) -> None:
    text = (header if isinstance(header, str) else json.dumps(header)).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + data)


def second(**other) -> dict:
    return {"a": PLAIN, "b": PLAIN | {"data_offsets": [24, 48]} | other}


LIES = {
    "another dtype": second(dtype="F16"),
    "a dtype that nobody knows": second(dtype="F31"),
    "a dtype that is a list": second(dtype=[]),
    "another shape": second(shape=[2, 4]),
    "a negative size": second(shape=[-2, -3]),
    "a size that is true": second(shape=[True, 6]),
    "a shape that is a word": second(shape="6"),
    "a shape that overflows": second(shape=[2**40, 2**40]),
    "no shape": {"a": {"dtype": "F32", "data_offsets": [0, 48]}},
    "one offset": second(data_offsets=[24]),
    "offsets the other way round": second(data_offsets=[48, 24]),
    "offsets that are null": second(data_offsets=None),
    "an overlap": second(data_offsets=[12, 36]),
    "a gap": {"a": PLAIN, "b": PLAIN | {"data_offsets": [30, 54]}},
    "an entry that is a number": {"a": 3},
    "a header that is a list": "[]",
    "a header that is null": "null",
    "a header that is no JSON": "{]",
    "a header without end": '{"a": ' * 50_000,
    "a tensor twice": json.dumps(second())[:-1] + ', "a": ' + json.dumps(PLAIN) + "}",
    "a key twice": '{"a": {"dtype": "F16", ' + json.dumps(PLAIN)[1:] + "}",
}


@pytest.mark.parametrize("lie", LIES)
def test_headers(lie, tmp_path):
    file = tmp_path / "model.safetensors"
    write(file, second())
    assert set(read_shard(file).tensors) == {"a", "b"}
    write(file, LIES[lie])
    with pytest.raises(SparsekError, match="corrupt safetensors file|truncated shard") as refusal:
        read_shard(file)
    assert "again" in refusal.value.hint and "\n" not in refusal.value.message


def test_headers_of_more_tensors_than_any_model_has(tmp_path, monkeypatch):
    from sparsek_cli.checkpoint_files import shards

    monkeypatch.setattr(shards, "_MOST_TENSORS", 1)
    file = tmp_path / "model.safetensors"
    write(file, {"a": PLAIN, "__metadata__": {"format": "pt"}}, bytes(24))
    assert set(read_shard(file).tensors) == {"a"}
    write(file, second())
    with pytest.raises(SparsekError, match="it names 2 tensors"):
        read_shard(file)


@pytest.mark.parametrize("length", [0, 1, 2**40, 2**63])
def test_headers_of_another_length(length, tmp_path):
    file = tmp_path / "model.safetensors"
    file.write_bytes(length.to_bytes(8, "little") + DATA)
    with pytest.raises(SparsekError, match="corrupt safetensors file"):
        read_shard(file)


INDEXES = {
    "null": "null",
    "a number": "3",
    "a list": "[]",
    "no map": "{}",
    "a null map": '{"weight_map": null}',
    "a number as a map": '{"weight_map": 7}',
    "an empty map": '{"weight_map": {}}',
    "a null as a file": '{"weight_map": {"a": null}}',
    "a number as a file": '{"weight_map": {"a": 1}}',
    "a list as a file": '{"weight_map": {"a": []}}',
    "a file elsewhere": '{"weight_map": {"a": "../w.safetensors"}}',
    "a file that is not there": '{"weight_map": {"a": "w.safetensors"}}',
    "a tensor that is not there": '{"weight_map": {"nothing": "model-1.safetensors"}}',
    "a tensor twice": '{"weight_map": {"a": "model-1.safetensors", "a": "model-1.safetensors"}}',
    "other bytes": b"\xff\xfe\x00",
    "depth": '{"weight_map": ' + "[" * 50_000,
}


@pytest.mark.parametrize("index", INDEXES)
def test_indexes_are_refused_wherever_a_model_is_named(index, dense_checkpoint):
    folder = dense_checkpoint()
    (folder / "model.safetensors").rename(folder / "model-1.safetensors")
    text = INDEXES[index]
    content = text if isinstance(text, bytes) else text.encode()
    (folder / "model.safetensors.index.json").write_bytes(content)
    with pytest.raises(SparsekError, match="index") as refusal:
        hub.resolve(folder)
    assert refusal.value.hint and "\n" not in refusal.value.message


@pytest.mark.parametrize("metadata", ["gone", None, []])
def test_an_index_without_metadata_is_told_as_that(metadata, dense_checkpoint):
    """transformers fails on it with a KeyError, for which config.json was blamed."""
    from sparsek_cli import load

    folder = dense_checkpoint(max_shard_size="20KB")
    file = folder / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    index.pop("metadata")
    file.write_text(json.dumps(index if metadata == "gone" else {**index, "metadata": metadata}))
    with pytest.raises(SparsekError, match='has no object "metadata"'):
        hub.resolve(folder)
    file.write_text(json.dumps({**index, "metadata": {}}))  # as hinted
    assert load(folder)[0].num_parameters()


def test_a_mask_of_old_files_may_be_infinite(tmp_path):
    """Pythia's float16 files hold -1e9 as such a value, which no model reads."""
    import torch
    from safetensors.torch import save_file

    from sparsek_cli.checkpoint_files.shards import find_nan, read_shards

    name = "gpt_neox.layers.0.attention.masked_bias"
    for value, weights in ((float("-inf"), True), (float("nan"), False)):
        save_file({name: torch.tensor(value).half()}, tmp_path / "model.safetensors")
        if weights:
            assert find_nan(read_shards(tmp_path), limit=1 << 20)
        else:
            with pytest.raises(SparsekError, match="NaN weights"):
                find_nan(read_shards(tmp_path), limit=1 << 20)
