"""GGUF files of tiny models, written as llama.cpp's converter writes them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_families import VOCAB_SIZE

_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
}


def _name(weight: str) -> str:
    stem, ending = weight.rsplit(".", 1)
    if stem.startswith("model.layers."):
        _, _, layer, rest = stem.split(".", 3)
        return f"blk.{layer}.{_NAMES[rest]}.{ending}"
    return f"{_NAMES[stem]}.{ending}"


def _rotated(name: str, array: np.ndarray, config: Any) -> np.ndarray:
    """Llama's queries and keys as ggml rotates them: pairs side by side, not half by half."""
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    found = next((n for key, n in heads.items() if f".{key}." in name), None)
    if found is None:
        return array
    shape = array.shape
    return array.reshape(found, 2, shape[0] // found // 2, -1).swapaxes(1, 2).reshape(shape)


def _write_metadata(writer: Any, config: Any, family: str) -> None:
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_rope_dimension_count(head_dim)
    writer.add_key_length(head_dim)
    writer.add_vocab_size(config.vocab_size)


def _write_tokenizer(writer: Any, tokenizer: Any) -> None:
    tokens = sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().get)
    assert len(tokens) == VOCAB_SIZE
    control = set(tokenizer.all_special_tokens)
    tokens[-1] = "ab"  # an unused one, so that there is something to merge
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token in control else 1 for token in tokens])
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(tokenizer.bos_token_id)
    writer.add_eos_token_id(tokenizer.eos_token_id)
    writer.add_pad_token_id(tokenizer.pad_token_id)
    writer.add_eot_token_id(3)
    writer.add_chat_template(tokenizer.chat_template)


@pytest.fixture
def write_gguf(tmp_path, dense_model, tokenizer) -> Callable[..., tuple[Path, Any]]:
    """`write_gguf(family, kind="F32", extra=, ...)` -> file, dense float32 model.

    Args of the call:
        kind: number format of matrices: "F32", "F16" or "Q8_0"; norms are always F32.
        architecture: what the file calls itself, instead of `family`.
        extra: more metadata by key.
        tensors: more tensors by name. drop: a name that is left out.
        words: whether a tokenizer is in it.
        options: overrides of the config.
    """

    def write(
        family: str = "llama",
        kind: str = "F32",
        *,
        architecture: str | None = None,
        extra: dict[str, str | int] | None = None,
        tensors: dict[str, np.ndarray] | None = None,
        drop: str = "",
        words: bool = True,
        name: str = "model.gguf",
        **options: Any,
    ) -> tuple[Path, Any]:
        import gguf
        import torch

        model = dense_model(family, **options)
        # Numbers that bfloat16 and float16 both have, so that files of values lose nothing.
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_((parameter * 64).round() / 64)
        file = tmp_path / "files" / name
        file.parent.mkdir(exist_ok=True)
        writer = gguf.GGUFWriter(file, architecture or family)
        _write_metadata(writer, model.config, family)
        if words:
            _write_tokenizer(writer, tokenizer)
        for key, value in (extra or {}).items():
            (writer.add_string if isinstance(value, str) else writer.add_uint16)(key, value)
        for weight, parameter in model.named_parameters():
            array = parameter.detach().numpy()
            array = _rotated(_name(weight), array, model.config) if family == "llama" else array
            if _name(weight) == drop:
                continue
            if array.ndim == 1 or kind == "F32":
                writer.add_tensor(_name(weight), np.ascontiguousarray(array, np.float32))
            elif kind == "F16":
                writer.add_tensor(_name(weight), np.ascontiguousarray(array, np.float16))
            else:
                packed = gguf.GGMLQuantizationType[kind]
                blocks = gguf.quantize(np.ascontiguousarray(array, np.float32), packed)
                writer.add_tensor(_name(weight), blocks, raw_dtype=packed)
        for tensor, array in (tensors or {}).items():
            writer.add_tensor(tensor, array)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return file, model

    return write
