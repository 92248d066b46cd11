"""Runs a random checkpoint on vLLM and in transformers; skipped where vLLM is not installed."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # one process: ten starts in a minute
# On a GPU Triton would round float32 to TF32 in vLLM's experts, and routers would choose others.
os.environ.setdefault("TRITON_F32_DEFAULT", "ieee")

try:
    import vllm

    MISSING = ""
except ImportError as error:
    MISSING = f"vLLM is not installed here ({error}): run `make vllm-test`"
    collect_ignore_glob = [
        "test_parity.py", "test_layer.py", "test_limits.py", "test_sampling.py", "test_server.py",
        "test_killed.py", "test_flags.py", "test_memory.py", "test_benchmarks.py",
    ]  # fmt: skip


def pytest_report_header() -> str:
    return MISSING or f"vllm {vllm.__version__}"


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory) -> Callable[..., Path]:
    """`checkpoint(family, **settings of the sparsek block)`: a folder, written once."""
    from checkpoints import save_checkpoint

    @lru_cache
    def make(family: str, kv_heads: int = 2, **settings: Any) -> Path:
        if "scorer" in settings:
            settings["scorer"] = {"type": settings["scorer"]}
        folder = tmp_path_factory.mktemp(family)
        return save_checkpoint(folder, family, settings=settings, kv_heads=kv_heads)

    return make


@pytest.fixture(scope="session")
def expected() -> Callable[[Path, list[list[int]]], list[Any]]:
    """`expected(folder, prompts)`, by transformers in float32."""
    from transformers_answers import Answers

    return Answers().of


@contextmanager
def engine(folder: Path, **options: Any) -> Iterator[Any]:
    """vLLM's `LLM`, small and in float32; ended afterwards."""
    from sparsek_vllm.models import served_class
    from vllm import LLM, ModelRegistry
    from vllm.distributed import cleanup_dist_env_and_memory
    from vllm.plugins import load_general_plugins

    load_general_plugins()
    [name] = json.loads((folder / "config.json").read_text())["architectures"]
    # By name, as in test_server.py, vLLM imports itself in one process more to look at the class.
    ModelRegistry.register_model(name, served_class(name))
    settings = {
        "dtype": "float32",
        "enforce_eager": True,
        "max_model_len": 256,
        "max_num_seqs": 8,
        "max_num_batched_tokens": 64,
        "num_gpu_blocks_override": 64,
        "gpu_memory_utilization": 0.2,  # of a CPU's memory, others may have the rest
        "distributed_executor_backend": "uni",
        "disable_log_stats": False,
        "seed": 0,
    }
    llm = LLM(str(folder), **{**settings, **options})
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()
        cleanup_dist_env_and_memory()


@pytest.fixture(scope="session")
def run_engine() -> Callable[..., Any]:
    """`with run_engine(folder, **options of LLM) as llm`."""
    return engine
