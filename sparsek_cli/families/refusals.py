"""Families that cannot be converted, and why: one sentence each, the text of the refusal.

Together with the table these are all causal language models that transformers knows by type.
"""

from __future__ import annotations

# By reason, the types it holds for.
_REASONS: dict[str, str] = {
    "its attention is written out in its own block, which hands nothing to transformers' "
    "attention functions, so that scores cannot reach it":
        "falcon gptj bloom mpt codegen gpt_neo xglm cpmant gpt_neox_japanese openai-gpt",
    "its heads share one compressed latent per token (multi-head latent attention), so that "
    "dropping pairs of single KV heads would save nothing":
        "deepseek_v2 deepseek_v3 deepseek_v32 youtu minicpm3 glm4_moe_lite axk1 axk2 "
        "bailing_hybrid dots3_note dots3_note_text glm_moe_dsa hy_v4 kimi_linear longcat_flash",
    "it drafts for another model, whose keys and values it reads: it has none to drop":
        "gemma4_assistant gemma4_unified_assistant",
    "it is one part of a model that also sees or hears; only text models are converted, and its "
    "text part is one where it is saved by itself":
        "cohere_compass_text emu3 fuyu gemma3 gemma3n gemma4 gemma4_unified git got_ocr2 "
        "llama4 mllama moshi moss_transcribe_diarize musicgen musicgen_melody "
        "phi4_multimodal qwen3_5 qwen3_5_moe qwen4_exp",
    "it is an encoder, or the decoder of a model with one, whose attention also reads what was "
    "encoded; only decoder-only models are converted":
        "bart bert bert-generation big_bird bigbird_pegasus blenderbot blenderbot-small blt "
        "camembert data2vec-text electra ernie marian mbart megatron-bert mvp pegasus plbart "
        "prophetnet reformer rembert roberta roberta-prelayernorm roc_bert roformer trocr whisper "
        "xlm xlm-roberta xlm-roberta-xl xlnet xmod",
    "none of its layers attends to everything: what it keeps of a text is bounded already":
        "falcon_mamba mamba mamba2 recurrent_gemma rwkv xlstm",
    "its attention selects tokens or compresses them already, by an index of its own":
        "deepseek_v4 doge minimax_m3_vl_text qwen4_exp_text",
    "its other layers attend within chunks of the text, which no cache of a converted model keeps":
        "llama4_text",
    "it adds a learned bias of relative positions to the logits, which the kernels do not know":
        "inkling_text inkling2_text",
    "its keys and values pass a convolution over tokens, whose state no packed batch respects":
        "zaya",
    "its attention is a difference of two, of which each would select pairs of its own":
        "diffllama",
    "its linear attention brings a cache of its own and takes no other": "minimax",
    "its values are narrower than its keys, which the kernels do not know": "mimo_v2_flash",
    "its queries are routed to experts, and have more heads than its config says": "jetmoe",
    "it runs the same layers several times over, with keys and values of each time": "hrm_text",
    "its attention layers are one block with the weights of all of them, so that scorers of single "
    "layers have no place": "zamba zamba2",
    "its sizes stand in a nested block of config.json, where conversion does not read": "dbrx",
    "transformers' class counts positions from zero again at every step of a cache": "bamba",
    "a block of its own stands between its last layer and its logits, which calibration and losses "
    "would leave out": "modernbert-decoder",
    "its attention class does not bear its family's name, by which a row finds it": "ctrl",
    'transformers runs it by GPT-2\'s classes; as "model_type": "gpt2" in its config.json it is '
    "the same model, and converts": "gpt-sw3",
}  # fmt: skip

REFUSED: dict[str, str] = {
    name: reason for reason, names in _REASONS.items() for name in names.split()
}
