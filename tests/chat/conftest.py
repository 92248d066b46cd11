"""Chat fixtures: an engine that writes down what it was fed, and a byte-pair tokenizer."""

from collections.abc import Callable
from pathlib import Path

import pytest


@pytest.fixture
def engine(dense_model, monkeypatch) -> Callable:
    """`engine(family="llama", chunk=...)` -> Engine of a tiny dense model, with `.seen` ids.

    Replies are letters only: a random model's other tokens have no text that tokenizes back.
    """
    from sparsek_cli.dialogue import engine as module

    draw = module.draw

    def draw_letters(logits, *rest):
        logits = logits.clone()
        logits[:40] = logits[90:] = float("-inf")
        return draw(logits, *rest)

    monkeypatch.setattr(module, "draw", draw_letters)

    def make(family: str = "llama", chunk: int = 32, **overrides):
        from sparsek_cli.dialogue.engine import Engine

        class RecordingEngine(Engine):
            def reset(self) -> None:
                super().reset()
                self.seen: list[int] = []
                self.forwards = 0

            def feed(self, tokens, **options):
                before, queue = self.fed, [*self._unfed, *tokens]
                whole = super().feed(tokens, **options)
                self.seen += queue[: self.fed - before]
                self.forwards += 1
                return whole

        return RecordingEngine(dense_model(family, **overrides), chunk=chunk)

    return make


@pytest.fixture(scope="session")
def pair_tokenizer():
    """A small byte-pair tokenizer with real merges and the whole byte alphabet."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator([Path(__file__).read_text("utf-8")] * 3, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )
