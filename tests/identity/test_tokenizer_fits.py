"""A tokenizer and a model belong together only if every id is a row of the embedding."""

from __future__ import annotations

import json

import pytest
from tiny_families import VOCAB_SIZE
from transformers import AutoTokenizer

import sparsek_cli as sparsek
from sparsek_cli.errors import SparsekError
from sparsek_cli.loading import check_tokenizer, embedding_rows, load_tokenizer, tokenizers


def test_ids_must_be_rows(tokenizer):
    check_tokenizer(tokenizer, VOCAB_SIZE, "m")
    check_tokenizer(tokenizer, 2 * VOCAB_SIZE, "m")  # embeddings are often rounded up
    with pytest.raises(SparsekError, match=f"with id {VOCAB_SIZE - 1}, and the model has") as no:
        check_tokenizer(tokenizer, VOCAB_SIZE - 1, "m")
    assert "resize_token_embeddings" in no.value.hint


def test_the_hint_works(tokenizer, dense_model):
    model = dense_model("llama")
    tokenizer.add_tokens(["<one more>"])
    with pytest.raises(SparsekError, match="'<one more>'"):
        check_tokenizer(tokenizer, embedding_rows(model), "m")
    model.resize_token_embeddings(len(tokenizer))
    check_tokenizer(tokenizer, embedding_rows(model), "m")


def test_a_pad_token_beyond_the_rows_is_replaced_in_memory_and_told(tokenizer, caplog):
    tokenizers._warn_pad.cache_clear()
    for name in ("m", "in/a/folder/m"):
        tokenizer.add_special_tokens({"pad_token": "[PAD]"})
        assert tokenizer.pad_token_id == VOCAB_SIZE
        check_tokenizer(tokenizer, VOCAB_SIZE, name)
        assert tokenizer.pad_token == tokenizer.eos_token
    assert caplog.messages == [
        f"the tokenizer of 'm' pads with '[PAD]', whose id {VOCAB_SIZE} is beyond the model's "
        f"{VOCAB_SIZE} embeddings: '</s>' pads in its place here; name it as pad_token in "
        "tokenizer_config.json for other programs"
    ]
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    tokenizer.eos_token = None
    with pytest.raises(SparsekError, match=r"'\[PAD\]'"):
        check_tokenizer(tokenizer, VOCAB_SIZE, "m")


def test_a_batch_is_padded_with_what_the_model_has(tokenizer, dense_checkpoint):
    """What `load` gave padded with an id beyond the rows: an IndexError, on a GPU the end."""
    folder = dense_checkpoint()
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    tokenizer.save_pretrained(folder)
    model, tokenizer = sparsek.load(folder, device="cpu")
    rows = tokenizer(["some words", "one"], padding=True, return_tensors="pt")
    assert model.generate(**rows, max_new_tokens=2).shape == (2, 12)


def test_an_end_that_a_class_made_up_is_refused(tokenizer):
    """As Qwen2's does beside a tokenizer.json alone, as the unknown token, too, which was let
    through: finetune put it behind texts, and evaluate ended in an IndexError."""
    made_up = {"eos_token": "<made up>", "unk_token": "<made up>"}
    tokenizer.add_special_tokens(made_up)
    assert tokenizer.eos_token_id == VOCAB_SIZE
    for pad in ("<pad>", "<made up>"):
        tokenizer.pad_token = pad
        with pytest.raises(SparsekError, match=f"id {VOCAB_SIZE} is beyond .* made it up") as no:
            check_tokenizer(tokenizer, VOCAB_SIZE, "m")
    assert '"eos_token"' in no.value.hint
    tokenizer.eos_token = "</s>"  # as hinted
    tokenizer.pad_token = "<pad>"
    check_tokenizer(tokenizer, VOCAB_SIZE, "m")


@pytest.mark.parametrize("content", [None, "{", "[]", '{"version": "1.0", "model": {}}'])
def test_none_or_a_broken_one_is_refused(content, tmp_path, tokenizer):
    folder = tmp_path / "model"
    tokenizer.save_pretrained(folder)
    file = folder / "tokenizer.json"
    text = file.read_text()
    file.unlink() if content is None else file.write_text(content)
    with pytest.raises(SparsekError, match="has no usable tokenizer") as no:
        load_tokenizer(folder)
    assert "copy tokenizer.json" in no.value.hint and "\n" not in no.value.message
    assert "tokenizer.json, or" in no.value.message or content is not None
    file.write_text(text)  # as hinted
    assert load_tokenizer(folder)("hi").input_ids


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("model_max_length", "16", "TypeError: .* .in one of its files"),
        ("auto_map", {"AutoTokenizer": ["own.Own", None]}, "needs code of its own"),
    ],
)
def test_why_one_does_not_load_is_said_in_words(key, value, says, tmp_path, tokenizer):
    folder = tmp_path / "model"
    tokenizer.save_pretrained(folder)
    file = folder / "tokenizer_config.json"
    named = json.loads(file.read_text()) | {key: value, "tokenizer_class": "Own"}
    file.write_text(json.dumps(named))
    with pytest.raises(SparsekError, match=says):
        load_tokenizer(folder)


def test_additional_chat_templates_come_along(pair, tmp_path):
    from verbs import convert

    from sparsek_cli.output.contents import MODEL
    from sparsek_cli.output.tokenizer_files import bring
    from sparsek_cli.recipes.schema_convert import ConvertRecipe

    base = tmp_path / "base"
    base.mkdir()
    for file in pair("llama", "llama3").base.iterdir():
        (base / file.name).write_bytes(file.read_bytes())
    (base / "chat_template.jinja").write_text("{{ messages[0]['content'] }}")
    (base / "additional_chat_templates").mkdir()
    (base / "additional_chat_templates" / "tool_use.jinja").write_text("tools: {{ tools }}")
    config = json.loads((base / "tokenizer_config.json").read_text())
    config.pop("chat_template", None)
    (base / "tokenizer_config.json").write_text(json.dumps(config))
    expected = AutoTokenizer.from_pretrained(base).chat_template
    assert expected.keys() == {"default", "tool_use"}
    out = tmp_path / "out"
    recipe = ConvertRecipe(model=str(base), out=str(out), calibrate="none", topk=6, window=4)
    assert convert(recipe).tokenizer.endswith("as of the base")
    assert AutoTokenizer.from_pretrained(out).chat_template == expected
    assert MODEL.foreign(out) is None  # so that --overwrite takes it for a folder of ours
    again = tmp_path / "again"
    again.mkdir()
    (again / "config.json").write_text((out / "config.json").read_text())
    assert bring(AutoTokenizer.from_pretrained(out), again)
    assert AutoTokenizer.from_pretrained(again).chat_template == expected


def test_the_hub_is_asked_for_them_and_for_no_other_folder():
    from huggingface_hub.utils import filter_repo_objects

    from sparsek_cli.hub.download import UNWANTED, WANTED

    there = [
        "config.json", "model.safetensors", "chat_template.jinja", "pytorch_model.bin",
        "additional_chat_templates/tool_use.jinja", "onnx/model.json", "original/params.json",
        "assets/a.json", "adapter/adapter_config.json", "checkpoint-1/model.safetensors",
    ]  # fmt: skip
    found = filter_repo_objects(there, allow_patterns=list(WANTED), ignore_patterns=list(UNWANTED))
    assert list(found) == [
        "config.json", "model.safetensors", "chat_template.jinja",
        "additional_chat_templates/tool_use.jinja",
    ]  # fmt: skip
