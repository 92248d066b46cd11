"""What converted models cannot do on vLLM is refused in one line, and the hint works."""

from __future__ import annotations

import json
import shutil

import pytest
from sparsek_vllm import VERSIONS, limits
from vllm.engine.arg_utils import EngineArgs

from sparsek_cli.checkpoint_files.seal import seal
from sparsek_cli.errors import refusal
from sparsek_cli.output.contents import SCORERS

REFUSED = {
    "speculative decoding": {
        "speculative_config": {"method": "ngram", "num_speculative_tokens": 2,
                               "prompt_lookup_max": 3},
    },
    "pipeline parallelism": {"pipeline_parallel_size": 2, "distributed_executor_backend": "mp"},
    "a cache in fp8": {"kv_cache_dtype": "fp8"},
    "a cache in bfloat16": {"kv_cache_dtype": "bfloat16"},
    "context parallelism": {
        "decode_context_parallel_size": 2, "tensor_parallel_size": 4,
        "distributed_executor_backend": "mp",
    },
    "to another server": {
        "kv_transfer_config": {"kv_connector": "ExampleConnector", "kv_role": "kv_both"},
    },
    "to the CPU's memory": {"kv_offloading_size": 1},
    "adapters": {"enable_lora": True},
    "as pooling model": {"runner": "pooling"},
}  # fmt: skip


def configure(folder, **options):
    settings = {"dtype": "float32", "enforce_eager": True, "max_model_len": 128}
    return EngineArgs(str(folder), **{**settings, **options}).create_engine_config()


@pytest.mark.parametrize("words", REFUSED)
def test_refused_by_option(words, checkpoint):
    folder = checkpoint("qwen3")
    with pytest.raises(Exception, match=words) as refused:
        configure(folder, **REFUSED[words])
    told = refusal(refused.value)  # as `sparsek serve` finds it: one line, and a hint
    assert words in told.message and "\n" not in told.message + told.hint
    for option in REFUSED[words].keys() - {"tensor_parallel_size", "distributed_executor_backend"}:
        assert f"--{option.replace('_', '-')}" in told.hint
    config = configure(folder)  # every hint says: leave it out
    assert config.cache_config.mamba_cache_mode == "none"


@pytest.mark.parametrize(
    "words, settings",
    [
        ("gate 'log'", {"gate": "log"}),
        ("gate 'kv'", {"gate": "kv"}),
        ("random scores", {"scorer": "random"}),
    ],
)
def test_refused_by_model(words, settings, checkpoint):
    with pytest.raises(Exception, match=words):
        configure(checkpoint("llama", **settings))


@pytest.mark.parametrize("key", ["topk", "window", "sinks", "gate", "scorer"])
def test_a_file_that_lacks_settings_is_refused(key, checkpoint, tmp_path):
    """Their defaults would be another model's."""
    folder = shutil.copytree(checkpoint("llama"), tmp_path / "m")
    config = json.loads((folder / "config.json").read_text())
    del config["sparsek"][key]
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(Exception, match=f"lacks {key}") as refused:
        configure(folder)
    assert refusal(refused.value).hint


def test_families_that_the_lowest_vllm_does_not_load_are_refused(checkpoint, monkeypatch):
    folder = checkpoint("mixtral")
    monkeypatch.setattr(limits, "__version__", VERSIONS[0])
    with pytest.raises(Exception, match=f"vLLM {VERSIONS[0]} does not load converted mixtral"):
        configure(folder)
    monkeypatch.setattr(limits, "__version__", VERSIONS[1])  # as the hint says
    configure(folder)


def test_heads_that_vllm_would_cut_are_refused(tmp_path, run_engine):
    from checkpoints import save_checkpoint

    folder = save_checkpoint(tmp_path, "qwen2", head_dim=32)
    words = "heads of size 16 on vLLM, 32 in the model"
    with pytest.raises(Exception, match=words), run_engine(folder):
        pass


def test_scorers_that_were_changed_are_refused(checkpoint, tmp_path):
    """A damaged file is told from a whole one before vLLM reads it, as every verb does."""
    folder = shutil.copytree(checkpoint("llama"), tmp_path / "m")
    file = next(iter(folder.glob("*.safetensors"))).rename(folder / SCORERS)
    seal(file)
    configure(folder)
    bits = bytearray(file.read_bytes())
    bits[-1] ^= 1
    file.write_bytes(bits)
    with pytest.raises(Exception, match="is damaged") as refused:
        configure(folder)
    assert refusal(refused.value).hint
