"""A byte-level BPE tokenizer with a chat template, trained on the user's own text.

    python tools/train_tokenizer.py OUT FILES... --vocab-size 4096

The chat template puts no white space between its marks and the messages, so that a document's
tokens do not depend on what follows it.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

BEGIN, END = "<|begin|>", "<|end|>"  # of a document or conversation; of a message
ROLES = ("system", "user", "assistant")
CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def train_tokenizer(
    texts: Iterable[str], vocab_size: int = 4096, max_length: int = 8192
) -> PreTrainedTokenizerFast:
    """Train on `texts`. Digits stay single tokens, so that numbers are copied digit by digit."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    marks = [BEGIN, END, *(f"<|{role}|>" for role in ROLES)]
    tokenizer.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=marks,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BEGIN,
        eos_token=END,
        pad_token=END,
        additional_special_tokens=marks[2:],
        chat_template=CHAT_TEMPLATE,
        model_max_length=max_length,
        clean_up_tokenization_spaces=False,
    )


def main() -> None:
    import argparse

    from sparsek_cli.data.text.documents import iterate_texts

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", help="folder to write the tokenizer to")
    parser.add_argument("files", nargs="+", help="files, folders or globs of text")
    parser.add_argument("--vocab-size", type=int, default=4096)
    given = parser.parse_args()
    train_tokenizer(iterate_texts(given.files), given.vocab_size).save_pretrained(given.out)


if __name__ == "__main__":
    main()
