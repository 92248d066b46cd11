"""Dense models of families that are not converted: whether they read on, found out at once."""

import json

import pytest
import torch
import transformers

import sparsek_cli as sparsek
from sparsek_cli.dialogue.engine import Engine
from sparsek_cli.errors import UsageError
from sparsek_cli.loading import reads_on
from sparsek_cli.loading.reads_on import check_reads_on, stands_where_told

SIZES = {
    "vocab_size": 128, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3,
    "num_attention_heads": 4, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
LATENT = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8}
BART = {
    "vocab_size": 128, "d_model": 32, "decoder_layers": 2, "decoder_attention_heads": 4,
    "decoder_ffn_dim": 64, "max_position_embeddings": 64,
}  # fmt: skip
STRANGE = {
    "MiniMax": ("in pieces: MiniMax uses cache of its own", {"num_key_value_heads": 4}),
    "RecurrentGemma": ("say something else", {"lru_width": 32}),
    "OpenAIGPT": ("say something else", {}),
    "Mamba": ("say something else", {"state_size": 8}),
    "Bamba": ("say something else", {"attn_layer_indices": [1], "mamba_n_heads": 4}),
}
CLASSES = {"OpenAIGPT": "LMHeadModel", "Bert": "LMHeadModel"}


def tiny(name, dtype=torch.float32, **more):
    config = getattr(transformers, f"{name}Config")(**(SIZES | more))
    kind = getattr(transformers, name + CLASSES.get(name, "ForCausalLM"))
    torch.manual_seed(0)
    return kind(config).to(dtype).eval()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", STRANGE)
def test_who_does_not_is_refused(name, dtype):
    """GPT-1 and Mamba answered in chat as if there were no text but their last token."""
    why, more = STRANGE[name]
    with pytest.raises(UsageError, match=why) as refused:
        Engine(tiny(name, dtype, **more))
    assert refused.value.hint.startswith("name a model")


def test_an_encoder_that_reads_from_both_ends_is_refused():
    """It was measured and answered, as if it read from left to right."""
    with pytest.raises(UsageError, match="this bert model sees tokens ahead") as refused:
        Engine(tiny("Bert"))
    assert "is_decoder" in refused.value.hint


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("name", "more"),
    [
        ("Bert", {"is_decoder": True}),
        ("Bart", BART),
        ("DeepseekV3", LATENT | {"v_head_dim": 16, "first_k_dense_replace": 3}),
        ("Falcon", {"multi_query": True}),
        ("Doge", {}),
    ],
)
def test_who_does_is_not(name, more, dtype):
    check_reads_on(tiny(name, dtype, **more))


@pytest.mark.parametrize("padding", [0, 1, 7])
def test_the_trial_holds_no_padding(padding):
    """With padding 1 (BART's) it could: positions and masks leave padding out."""
    model = tiny("Falcon", vocab_size=8, pad_token_id=padding)
    assert padding not in reads_on._text(model).tolist()[0]


@pytest.mark.parametrize("name", ["MiniMax", "RecurrentGemma"])
def test_evaluate_refuses_it_before_the_first_prompt(name, tokenizer, tmp_path):
    """They were a ValueError and an AttributeError."""
    tiny(name, **STRANGE[name][1]).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    settings = {"tasks": ["recall_1"], "baselines": ["dense"], "device": "cpu"}
    with pytest.raises(UsageError, match=STRANGE[name][0]):
        sparsek.evaluate(str(tmp_path / "model"), **settings, out=str(tmp_path / "out"))


@pytest.mark.parametrize(("name", "more", "heeds"), [("Bart", BART, False), ("Falcon", {}, True)])
def test_answers_come_one_by_one_where_positions_are_not_heeded(
    name, more, heeds, tokenizer, tmp_path
):
    """With --batch-size, and on a GPU without, BART answered shorter prompts from other places."""
    wide = {"init_std": 0.5, "initializer_range": 0.5}  # so that answers hang on every token
    model = tiny(name, **(more | wide | {"max_position_embeddings": 1024}))
    assert stands_where_told(model) == heeds
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    answers = []
    for size in (1, 4):
        out = tmp_path / str(size)
        sparsek.evaluate(
            str(tmp_path / "model"), tasks=["recall_1"], lengths=[700], limit=4, out=str(out),
            baselines=["dense"], device="cpu", batch_size=size, max_new_tokens=6,
        )  # fmt: skip
        [file] = out.rglob("*.jsonl")
        answers.append([json.loads(line)["responses"] for line in file.read_text().splitlines()])
    assert answers[0] == answers[1]
