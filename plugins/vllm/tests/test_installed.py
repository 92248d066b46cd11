"""vLLM finds the plugin by its entry point, or is not there and the other tests are left out."""

from importlib.metadata import entry_points

import pytest


def test_vllm_finds_the_plugin():
    pytest.importorskip("vllm", reason="vLLM is not installed here: run `make vllm-test`")
    [found] = entry_points(group="vllm.general_plugins", name="sparsek")
    found.load()()
    found.load()()  # vLLM may call it again in the same process
    from vllm import ModelRegistry

    assert "SparseKQwen3ForCausalLM" in ModelRegistry.get_supported_archs()
