"""`sparsek convert FILE.gguf`: the model of the file, its tokenizer, and refusals by name."""

import json
import os
import re
import shutil
import struct
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("gguf")

from sparsek_cli.app import run
from sparsek_cli.conversion.from_gguf import checkpoint, unpack
from sparsek_cli.gguf import header


@pytest.fixture
def convert(tmp_path, monkeypatch, capsys):
    """`convert(file, *words)` -> exit code, stdout, stderr, OUT."""
    monkeypatch.setenv("SPARSEK_STATE_DIR", str(tmp_path / "state"))

    def call(file, *words):
        out = tmp_path / "out"
        size = () if "--budget" in words else ("--topk", 20, "--window", 4, "--sinks", 1)
        capsys.readouterr()
        code = run([str(w) for w in ("convert", file, out, "--calibrate", "none", *size, *words)])
        return code, *capsys.readouterr(), out

    return call


def dense_logits(folder: Path, ids: torch.Tensor) -> torch.Tensor:
    """float32 logits of the converted model, attending densely."""
    from transformers import AutoModelForCausalLM

    import sparsek_cli.models as models

    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation=models.DENSE_ATTENTION
    )
    with torch.no_grad():
        return model(ids).logits


@pytest.mark.parametrize(
    ("family", "kind", "dtype", "tolerance"),
    [
        ("llama", "F32", "float32", 1e-5),
        ("llama", "F16", "float16", 1e-5),
        ("llama", "Q8_0", "bfloat16", 0.05),
        ("qwen3", "F32", "float32", 1e-5),
    ],
)
def test_the_model_in_the_file_is_the_model_in_out(
    write_gguf, convert, family, kind, dtype, tolerance
):
    file, model = write_gguf(family, kind, intermediate_size=64)
    code, shown, said, out = convert(file)
    assert code == 0, said
    config = json.loads((out / "config.json").read_text())
    assert config["dtype"] == dtype and config["model_type"] == f"sparsek_{family}"
    values = sum(p.numel() for p in model.parameters())
    size = values * (4 if dtype == "float32" else 2)
    assert f"{size:,} bytes of {dtype}" in said and f"unpacked from {kind}" in shown
    ids = torch.arange(40)[None] % 100
    with torch.no_grad():
        expected = model(ids).logits
    difference = (dense_logits(out, ids) - expected).abs().max() / expected.abs().max()
    assert difference < tolerance
    # Nothing stays beside OUT, and nothing points back to the file.
    assert sorted(p.name for p in out.parent.iterdir()) == ["files", "out", "state"]
    assert all(p.stat().st_nlink == 1 for p in out.iterdir())
    assert str(file) in (out / "sparsek.yaml").read_text()


def test_tokenizer_chat_template_and_ends_come_from_the_file(write_gguf, convert, tokenizer):
    from transformers import AutoTokenizer

    file, _ = write_gguf()
    # What lies beside the file is of another model.
    (file.parent / "tokenizer_config.json").write_text('{"tokenizer_class": "BertTokenizer"}')
    code, _, said, out = convert(file)
    assert code == 0, said
    found = AutoTokenizer.from_pretrained(out)
    assert found.chat_template == tokenizer.chat_template
    text = "Whoever enters,  12345 times."
    assert found(text).input_ids == tokenizer(text).input_ids
    ends = json.loads((out / "generation_config.json").read_text())["eos_token_id"]
    assert ends == [tokenizer.eos_token_id, 3]


def test_a_folder_with_one_file_is_that_file(write_gguf, convert):
    file, _ = write_gguf()
    assert convert(file.parent, "--dry-run")[0] == 0
    shutil.copy(file, file.with_name("other.gguf"))
    code, _, said, _ = convert(file.parent, "--dry-run")
    assert code == 2 and "holds 2 GGUF files" in said and f"'{file}'" in said


def test_beside_other_weights_the_file_must_be_named(write_gguf, convert):
    file, _ = write_gguf()
    (file.parent / "model.safetensors").write_bytes(b"")
    code, _, said, _ = convert(file.parent, "--dry-run")
    assert code == 2 and "it is not clear which is meant" in said
    named = said.split("name the file: '")[1].split("'")[0]
    assert convert(named, "--dry-run")[0] == 0


@pytest.fixture
def beside(tmp_path, tokenizer):
    """A folder of the tokenizer alone."""
    tokenizer.save_pretrained(tmp_path / "words")
    return tmp_path / "words"


@pytest.mark.parametrize("fault", ["none there", "other ids"])
def test_a_tokenizer_that_cannot_be_read_is_named_instead(
    write_gguf, convert, beside, tokenizer, monkeypatch, fault
):
    from transformers import AutoTokenizer

    file, _ = write_gguf(words=fault == "other ids")
    if fault == "other ids":
        monkeypatch.setattr(unpack, "bring", lambda *given: False)
    code, _, said, out = convert(file)
    error, hint = said.strip().splitlines()[-2:]
    assert code == 1 and "the tokenizer in model.gguf" in error and not out.exists()
    for package in ("transformers", "tokenizers"):
        assert f"{package} {version(package)}" in hint
    flag = re.search(r"folder or hub id .* with (--tokenizer)", hint)[1]
    code, shown, said, out = convert(file, flag, beside)  # as hinted
    assert code == 0, said
    assert f"tokenizer   {beside}" in shown and ", as of words" in shown
    found = AutoTokenizer.from_pretrained(out)
    assert found.chat_template == tokenizer.chat_template
    assert found.get_vocab() == tokenizer.get_vocab()
    assert (out / "generation_config.json").exists()
    assert f"tokenizer: {beside}" in (out / "sparsek.yaml").read_text()


def test_a_tokenizer_that_does_not_fit_is_found_before_anything_is_unpacked(
    write_gguf, convert, beside
):
    file, _ = write_gguf(vocab_size=100)
    for place, says in ((beside, "embeddings for 100 ids"), ("nowhere", "is no folder")):
        code, _, said, out = convert(file, "--tokenizer", place, "--dry-run")
        assert code in (1, 2) and says in said and "unpacking" not in said
        assert not out.exists()


def test_dry_run_tells_what_will_be_written_and_writes_nothing(write_gguf, convert):
    file, model = write_gguf(kind="Q8_0", intermediate_size=64)
    code, shown, said, out = convert(file, "--dry-run", "--json")
    plan = json.loads(shown)
    assert code == 0 and plan["model"] == str(file) and not out.exists()
    assert plan["base_bytes_to_copy"] == 2 * sum(p.numel() for p in model.parameters())


def test_llama_3_frequencies_become_its_settings(write_gguf, convert):
    settings = {
        "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0,
        "high_freq_factor": 4.0, "original_max_position_embeddings": 8192,
    }  # fmt: skip
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    config = LlamaConfig(hidden_size=128, num_attention_heads=4, rope_parameters=settings)
    scaled = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")[0].numpy()
    plain = 500000.0 ** (-np.arange(16) / 16)
    sizes = {"hidden_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2,
             "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}}  # fmt: skip
    factors = (plain / scaled).astype(np.float32)
    assert factors[0] == 1 and 1.5 < factors[8] < 7 and factors.max() == 8
    file, _ = write_gguf(tensors={"rope_freqs.weight": factors}, **sizes)
    code, _, said, out = convert(file)
    assert code == 0, said
    found = json.loads((out / "config.json").read_text())["rope_parameters"]
    assert found == settings
    file, _ = write_gguf(tensors={"rope_freqs.weight": factors**2}, name="odd.gguf", **sizes)
    code, _, said, _ = convert(file, "--overwrite")
    assert code == 2 and "rope_freqs.weight" in said


@pytest.mark.parametrize(
    ("made", "error", "hint"),
    [
        ({"extra": {"llama.rope.scaling.type": "yarn"}}, "(yarn)", "checkpoint"),
        ({"extra": {"general.type": "adapter"}}, "'adapter'", "checkpoint"),
        ({"extra": {"split.count": 3}}, "one of 3 parts", "--merge"),
        ({"tensors": {"odd.weight": np.ones(32, np.int32)}}, "format I32 (odd.weight)", "GGUF"),
        ({"architecture": "plamo"}, "architecture 'plamo'", "checkpoint"),
        ({"drop": "blk.1.attn_v.weight"}, "v_proj", "checkpoint"),
        ({"tensors": {"blk.0.attn_q_norm.weight": np.ones(8, np.float32)}}, "no place", "check"),
    ],
)
def test_what_cannot_be_read_is_refused_by_name(write_gguf, convert, made, error, hint):
    file, _ = write_gguf(**made)
    code, _, said, out = convert(file)
    lines = said.strip().splitlines()
    assert code in (1, 2) and error in lines[-2] and hint in lines[-1]
    assert not out.exists() and "Traceback" not in said
    assert not list(out.parent.glob(".*.part"))


def test_counts_that_no_file_can_hold(convert, tmp_path):
    """Of pairs, of a name's letters, of a list's values: nobody counts to 2^60."""
    key = struct.pack("<Q", 1) + b"a"
    tails = {
        "pairs": struct.pack("<QQ", 2**60, 2**60),
        "letters": struct.pack("<QQQ", 1, 1, 2**62),
        "values": struct.pack("<QQ", 0, 1) + key + struct.pack("<IIQ", 9, 0, 10**9),
        "texts": struct.pack("<QQ", 0, 1) + key + struct.pack("<IIQ", 9, 8, 10**9),
    }
    for name, tail in tails.items():
        file = tmp_path / f"{name}.gguf"
        file.write_bytes(b"GGUF" + struct.pack("<I", 3) + tail + bytes(64))
        code, _, said, _ = convert(file)
        assert code == 1 and "damaged or cut short" in said


def test_files_that_are_damaged_or_no_gguf(write_gguf, convert, tmp_path):
    file, _ = write_gguf()
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    code, _, said, _ = convert(file)
    assert code == 1 and "damaged or cut short" in said
    file.write_bytes(b"not a model at all")
    code, _, said, _ = convert(file)
    assert code == 2 and "is not a GGUF file" in said


def test_without_room_nothing_is_unpacked(write_gguf, convert, monkeypatch):
    file, _ = write_gguf()
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(9, 9, 0))
    code, _, said, out = convert(file)
    assert code == 1 and "not enough space" in said and "another disk" in said
    assert not out.exists()


def test_without_the_package_the_extra_is_named(write_gguf, convert, monkeypatch):
    file, _ = write_gguf()
    monkeypatch.setattr(header.importlib.util, "find_spec", lambda name: None)
    code, _, said, _ = convert(file)
    assert code == 2 and "pip install gguf" in said and "-e '.[gguf]'" in said


def test_names_that_are_no_gguf_file_are_left_to_others(tmp_path, dense_checkpoint):
    folder = dense_checkpoint()
    (folder / "model.gguf").write_bytes(b"GGUF")
    assert checkpoint.find(str(folder)) is None  # config.json stands beside it
    assert checkpoint.find("tiny") is None and checkpoint.find("owner/name") is None


@pytest.mark.slow
@pytest.mark.skipif("SPARSEK_GGUF" not in os.environ, reason="SPARSEK_GGUF names no file")
def test_a_real_file(convert):
    code, shown, said, out = convert(os.environ["SPARSEK_GGUF"], "--budget", "1/8")
    assert code == 0, said
    assert "unpacked from" in shown and "base-00001.safetensors" in os.listdir(out)
