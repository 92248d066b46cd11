"""Tokenizers as they stand on the hub: small vocabularies, the files and keys of the real ones.

Each shape is a function that writes its files into a folder. `SHAPES` names them; `VOCABULARY` is
the number of rows an embedding needs for any of them.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tokenizers import (
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

VOCABULARY = 640
CORPUS = [
    "The harbour master counted 1234 crates and wrote them down, twice.",
    "def f(x):\n    return x ** 2  # a comment\n\n\nclass A:\n\tpass\n",
    "[INST] What's the weather in Zürich? [/INST] It's 21 degrees; don't worry!",
    "Fish, chips & peas: £3.50 each. Naïve café, jalapeño, straße.",
] * 20
# Leading, double and trailing spaces, contractions, digits, marks of chats, other scripts.
PROBES = [
    "Hello there, world!",
    "  two spaces, and 12345 digits ",
    "<s>[INST] Hi there [/INST]",
    "ok</s> [INST] More [/INST]",
    "ok</s>[INST] More [/INST]",
    "<|im_start|>user\nhi<|im_end|>\n",
    "a<|endoftext|>b <|eot_id|> c",
    "    return x\n\n\tdon't we'll I'M",
    "Zürich 東京 🙂 ﬁ",
    "",
]
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
INSTRUCT = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}[INST] {{ m['content'] }} "
    "[/INST]{% else %}{{ m['content'] }}{{ eos_token }}{% endif %}{% endfor %}"
)


@functools.cache
def _byte_level(special: tuple[str, ...], *, digits: bool = False) -> str:
    tokenizer = Tokenizer(models.BPE())
    bytes_ = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.pre_tokenizer = (
        pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), bytes_])
        if digits
        else bytes_
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    tokenizer.train_from_iterator(
        CORPUS,
        trainers.BpeTrainer(
            vocab_size=VOCABULARY - 32,
            special_tokens=list(special),
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    return tokenizer.to_str()


@functools.cache
def _sentence_pieces() -> str:
    """As converted from a sentencepiece BPE: a normaliser instead of a pre-tokenizer."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=True)
    special = ["<unk>", "<s>", "</s>"]
    tokenizer.train_from_iterator(
        CORPUS,
        trainers.BpeTrainer(
            vocab_size=VOCABULARY - 32,
            special_tokens=[*special, *(f"<0x{byte:02X}>" for byte in range(256))],
            show_progress=False,
        ),
    )
    state = json.loads(tokenizer.to_str())
    state["pre_tokenizer"] = None
    state["added_tokens"] = [t for t in state["added_tokens"] if t["content"] in special]
    strip = {"type": "Strip", "content": " ", "start": 1, "stop": 0}
    space = {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}
    steps = [space, {"type": "ByteFallback"}, {"type": "Fuse"}, strip]
    state["decoder"] = {"type": "Sequence", "decoders": steps}
    state["post_processor"] = _begins_with("<s>", 1)
    return json.dumps(state)


@functools.cache
def _unigram() -> str:
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.train_from_iterator(
        CORPUS,
        trainers.UnigramTrainer(
            vocab_size=300,
            special_tokens=["<pad>", "</s>", "<unk>"],
            unk_token="<unk>",
            show_progress=False,
        ),
    )
    return tokenizer.to_str()


def _begins_with(token: str, index: int) -> dict[str, Any]:
    """A post-processor that puts a token in front."""
    text = {"Sequence": {"id": "A", "type_id": 0}}
    other = {"Sequence": {"id": "B", "type_id": 1}}
    return {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": token, "type_id": 0}}, text],
        "pair": [text, other],
        "special_tokens": {token: {"id": token, "ids": [index], "tokens": [token]}},
    }


def _write(folder: Path, backend: str | None, config: dict[str, Any] | None, **files: Any) -> None:
    if backend is not None:
        (folder / "tokenizer.json").write_text(backend, encoding="utf-8")
    if config is not None:
        files["tokenizer_config.json"] = config
    for name, content in files.items():
        text = content if isinstance(content, str) else json.dumps(content)
        (folder / name).write_text(text, encoding="utf-8")


def _vocabulary(folder: Path, backend: str) -> None:
    Tokenizer.from_str(backend).model.save(str(folder))  # vocab.json and merges.txt


GPT2 = ("<|endoftext|>",)
QWEN = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
LLAMA3 = ("<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>", "<|im_start|>", "<|im_end|>")


def gpt2_bare(folder: Path) -> None:
    _write(folder, _byte_level(GPT2), {"model_max_length": 1024})
    _vocabulary(folder, _byte_level(GPT2))


def gpt2_vocabulary_only(folder: Path) -> None:
    _vocabulary(folder, _byte_level(GPT2))


def gpt2_named(folder: Path) -> None:
    config = {"tokenizer_class": "GPT2Tokenizer", "add_prefix_space": False, "pad_token": None}
    _write(folder, None, config)
    _vocabulary(folder, _byte_level(GPT2))


def json_alone(folder: Path) -> None:
    _write(folder, _byte_level(QWEN), None)


def neox(folder: Path) -> None:
    end = "<|endoftext|>"
    config = {"tokenizer_class": "GPTNeoXTokenizer", "add_prefix_space": False}
    config |= {"bos_token": end, "eos_token": end, "unk_token": end}
    _write(folder, _byte_level(GPT2), config, **{"special_tokens_map.json": {"eos_token": end}})


def _llama2(**config: Any) -> dict[str, Any]:
    named = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True, **named, **config}


def llama2_legacy(folder: Path) -> None:
    _write(folder, _sentence_pieces(), _llama2(legacy=True, add_eos_token=False))


def mistral_plain(folder: Path) -> None:
    _write(folder, _sentence_pieces(), _llama2(chat_template=INSTRUCT, padding_side="left"))


def llama3(folder: Path) -> None:
    state = json.loads(_byte_level(LLAMA3))
    state["post_processor"] = {
        "type": "Sequence",
        "processors": [state["post_processor"], _begins_with("<|begin_of_text|>", 0)],
    }
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": TEMPLATE}
    config |= {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"}
    config["clean_up_tokenization_spaces"] = True
    _write(folder, json.dumps(state), config)


def llama_declared_byte_level(folder: Path) -> None:
    config = {"tokenizer_class": "LlamaTokenizerFast", "bos_token": "<|begin_of_text|>"}
    config |= {"eos_token": "<|end_of_text|>", "legacy": False}
    _write(folder, _byte_level(LLAMA3, digits=True), config)


def _qwen2() -> dict[str, Any]:
    added = {
        str(index): dict(
            content=token, special=True, lstrip=False, rstrip=False, normalized=False,
            single_word=False,
        )
        for index, token in enumerate(QWEN)
    }  # fmt: skip
    return {
        "tokenizer_class": "Qwen2Tokenizer",
        "added_tokens_decoder": added,
        "additional_special_tokens": ["<|im_start|>", "<|im_end|>"],
        "bos_token": None,
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "errors": "replace",
        "split_special_tokens": False,
        "add_prefix_space": False,
        "model_max_length": 32768,
    }


def qwen2(folder: Path) -> None:
    _write(folder, _byte_level(QWEN), _qwen2(), **{"chat_template.jinja": TEMPLATE})
    _vocabulary(folder, _byte_level(QWEN))


def qwen2_vocabulary_only(folder: Path) -> None:
    _write(folder, None, _qwen2() | {"chat_template": TEMPLATE})
    _vocabulary(folder, _byte_level(QWEN))


def no_bos_no_eos(folder: Path) -> None:
    _write(folder, _byte_level(()), {"tokenizer_class": "PreTrainedTokenizerFast"})


def added_tokens(folder: Path) -> None:
    """Tokens that a user added: beside the vocabulary, with old files that name them."""
    tokenizer = Tokenizer.from_str(_byte_level(GPT2))
    tokenizer.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    tokenizer.add_tokens(["Zürich"])
    size = tokenizer.get_vocab_size(with_added_tokens=False)
    config = {"tokenizer_class": "GPT2TokenizerFast", "eos_token": "<|im_end|>"}
    config |= {"bos_token": "<|endoftext|>", "pad_token": "<|im_end|>", "chat_template": TEMPLATE}
    names = {"additional_special_tokens": ["<|im_start|>"], "eos_token": "<|im_end|>"}
    later = {"<|im_start|>": size, "<|im_end|>": size + 1, "Zürich": size + 2}
    files = {"special_tokens_map.json": names, "added_tokens.json": later}
    _write(folder, tokenizer.to_str(), config, **files)


def unigram(folder: Path) -> None:
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>"}
    _write(folder, _unigram(), config | {"pad_token": "<pad>", "unk_token": "<unk>"})


def cut_and_padded(folder: Path) -> None:
    """Truncation and padding saved with the backend, several chat templates, right padding."""
    tokenizer = Tokenizer.from_str(_byte_level(QWEN))
    tokenizer.enable_truncation(12)
    tokenizer.enable_padding(length=16)
    templates = [
        {"name": "default", "template": TEMPLATE},
        {"name": "tool_use", "template": INSTRUCT},
    ]
    config = {"tokenizer_class": "TokenizersBackend", "eos_token": "<|im_end|>"}
    config |= {"pad_token": "<|endoftext|>", "chat_template": templates, "padding_side": "right"}
    _write(folder, tokenizer.to_str(), config)


SHAPES: dict[str, Callable[[Path], None]] = {
    shape.__name__: shape
    for shape in (
        gpt2_bare, gpt2_vocabulary_only, gpt2_named, json_alone, neox, llama2_legacy,
        mistral_plain, llama3, llama_declared_byte_level, qwen2, qwen2_vocabulary_only,
        no_bos_no_eos, added_tokens, unigram, cut_and_padded,
    )
}  # fmt: skip


def described(tokenizer: Any) -> dict[str, Any]:
    """Everything that two tokenizers must share to be the same."""
    chat = [{"role": "user", "content": "Hi there"}, {"role": "assistant", "content": "yes"}]
    template = tokenizer.chat_template
    return {
        "ids": [tokenizer(text).input_ids for text in PROBES],
        "plain ids": [tokenizer(text, add_special_tokens=False).input_ids for text in PROBES],
        "text": [tokenizer.decode(tokenizer(text).input_ids) for text in PROBES],
        "vocabulary": tokenizer.get_vocab(),
        "special": (tokenizer.special_tokens_map, sorted(tokenizer.all_special_ids)),
        "ends": (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id),
        "sides": (tokenizer.padding_side, tokenizer.truncation_side, tokenizer.model_max_length),
        "template": template,
        "chat": tokenizer.apply_chat_template(chat, tokenize=False) if template else None,
    }
