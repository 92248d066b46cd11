"""Names people type instead of hub ids; data, read by `hub.resolve` and `convert --list-models`."""

from dataclasses import dataclass


@dataclass(frozen=True)
class ShortName:
    """One row: where the weights live, what reads them, whether a licence must be accepted."""

    hub_id: str
    family: str
    gated: bool = False


def _rows(family: str, *pairs: tuple[str, str], gated: bool = False) -> dict[str, ShortName]:
    return {name: ShortName(hub_id, family, gated) for name, hub_id in pairs}


BUNDLED = ("tiny",)

SHORT_NAMES: dict[str, ShortName] = {
    **_rows("llama", ("llama-7b", "huggyllama/llama-7b"), ("llama-13b", "huggyllama/llama-13b")),
    **_rows(
        "llama",
        ("llama-2-7b", "meta-llama/Llama-2-7b-hf"),
        ("llama-2-7b-chat", "meta-llama/Llama-2-7b-chat-hf"),
        ("llama-2-13b", "meta-llama/Llama-2-13b-hf"),
        ("llama-3.1-8b", "meta-llama/Llama-3.1-8B"),
        ("llama-3.1-8b-instruct", "meta-llama/Llama-3.1-8B-Instruct"),
        ("llama-3.2-1b", "meta-llama/Llama-3.2-1B"),
        ("llama-3.2-1b-instruct", "meta-llama/Llama-3.2-1B-Instruct"),
        ("llama-3.2-3b", "meta-llama/Llama-3.2-3B"),
        ("llama-3.2-3b-instruct", "meta-llama/Llama-3.2-3B-Instruct"),
        gated=True,
    ),
    **_rows(
        "mistral",
        ("mistral-7b", "mistralai/Mistral-7B-v0.3"),
        ("mistral-7b-instruct", "mistralai/Mistral-7B-Instruct-v0.3"),
    ),
    **_rows(
        "qwen2",
        ("qwen2.5-0.5b", "Qwen/Qwen2.5-0.5B"),
        ("qwen2.5-0.5b-instruct", "Qwen/Qwen2.5-0.5B-Instruct"),
        ("qwen2.5-1.5b", "Qwen/Qwen2.5-1.5B"),
        ("qwen2.5-1.5b-instruct", "Qwen/Qwen2.5-1.5B-Instruct"),
        ("qwen2.5-3b", "Qwen/Qwen2.5-3B"),
        ("qwen2.5-3b-instruct", "Qwen/Qwen2.5-3B-Instruct"),
        ("qwen2.5-7b", "Qwen/Qwen2.5-7B"),
        ("qwen2.5-7b-instruct", "Qwen/Qwen2.5-7B-Instruct"),
    ),
    **_rows(
        "qwen3",
        ("qwen3-0.6b", "Qwen/Qwen3-0.6B"),
        ("qwen3-1.7b", "Qwen/Qwen3-1.7B"),
        ("qwen3-4b", "Qwen/Qwen3-4B"),
        ("qwen3-8b", "Qwen/Qwen3-8B"),
    ),
    **_rows(
        "gpt_neox",
        ("pythia-70m", "EleutherAI/pythia-70m"),
        ("pythia-160m", "EleutherAI/pythia-160m"),
        ("pythia-410m", "EleutherAI/pythia-410m"),
        ("pythia-1b", "EleutherAI/pythia-1b"),
        ("pythia-1.4b", "EleutherAI/pythia-1.4b"),
        ("pythia-2.8b", "EleutherAI/pythia-2.8b"),
        ("pythia-6.9b", "EleutherAI/pythia-6.9b"),
    ),
    **_rows(
        "gpt2",
        ("gpt2", "openai-community/gpt2"),
        ("gpt2-medium", "openai-community/gpt2-medium"),
        ("gpt2-large", "openai-community/gpt2-large"),
        ("gpt2-xl", "openai-community/gpt2-xl"),
    ),
}
