"""Families that cannot be converted, and why: one sentence each, the text of the refusal."""

from __future__ import annotations

_OWN_BLOCK = (
    "its attention is written out in its own block, which hands nothing to transformers' "
    "attention functions, so that scores cannot reach it"
)
_LATENT = (
    "its heads share one compressed latent per token (multi-head latent attention), so that "
    "dropping pairs of single KV heads would save nothing"
)
_SHARED = (
    "some of its layers reuse the keys and values of others, which would need them after a layer "
    "has dropped them"
)
_LLAMA = (
    "transformers runs it by Llama's classes under a type of its own; as "
    '"model_type": "llama" with "architectures": ["LlamaForCausalLM"] in its config.json it is the '
    "same model, and converts"
)

REFUSED: dict[str, str] = {
    **dict.fromkeys(
        ("deepseek_v2", "deepseek_v3", "deepseek_v32", "youtu", "minicpm3", "glm4_moe_lite"),
        _LATENT,
    ),
    **dict.fromkeys(("falcon", "gptj", "bloom", "mpt", "codegen", "gpt_neo", "xglm"), _OWN_BLOCK),
    **dict.fromkeys(("gemma3n_text", "gemma4_text"), _SHARED),
    "internlm3": _LLAMA,
}
