"""Converted models on vLLM: a plugin, found by its entry point; no file of vLLM is changed.

vLLM keeps a state of constant size per request for state-space models. A SparseK cache is such a
state, so this package presents one block per request to vLLM's manager of states, and computes in
it with `sparsek_kernels`, as transformers does.

| file | what it holds |
|---|---|
| engine.py | every name of vLLM that is used and not part of its plugin interface |
| blocks.py | one request's state in one layer as a block of bytes |
| layer.py | the attention layer over those blocks |
| models.py | a family's class of vLLM with such layers |
| heads.py | which rank of tensor parallelism has which heads |
| sizes.py | bytes of a request's blocks, without vLLM |
| limits.py | what is refused, and what to do instead |
| allocator.py | how free memory goes back to the system |
| server.py | vLLM's server, which ends with one line where this package refuses |
| __main__.py | sees that server to its end |
"""

VERSIONS = ("0.31.0", "0.32.0")  # lowest and highest that tests ran on
# Rows of sparsek's table whose blocks of vLLM end in its plain attention layer, as tests have seen.
FAMILIES = (
    "llama", "mistral", "qwen2", "qwen3", "granite", "phi3", "gemma", "glm4",
    "ernie4_5", "nemotron",
    "mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "granitemoe",
    # Those that vLLM runs by transformers' own code.
    "arcee", "glm", "hunyuan_v1_dense", "olmo", "olmo2", "phi", "seed_oss", "smollm3",
    "starcoder2",
)  # fmt: skip
# Of these, vLLM 0.31 loads no converted models: it asserts another config, or fails by itself.
NOT_ON_LOWEST = ("nemotron", "mixtral", "phi")


def register() -> None:
    """vLLM's entry point, called in each of its processes and perhaps more than once."""
    import logging

    from packaging.version import Version
    from vllm import __version__

    from sparsek_vllm.allocator import give_back
    from sparsek_vllm.models import register_models

    give_back()
    lowest, highest = map(Version, VERSIONS)
    if not lowest.release <= Version(__version__).release <= highest.release:
        logging.getLogger(__name__).warning(
            "vLLM %s was never tried with converted models; %s to %s were", __version__, *VERSIONS
        )
    register_models()
