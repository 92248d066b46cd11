"""What transformers answers, with SparseK and without, which vLLM is compared with."""

from __future__ import annotations

from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from checkpoints import NEW


@dataclass(frozen=True)
class Expected:
    """What transformers makes of one prompt.

    Attributes:
        written, dense_written: tokens that greedy search adds, with SparseK and without.
        logprobs, dense_logprobs: of the prompt's own tokens, from the second on.
    """

    written: list[int]
    dense_written: list[int]
    logprobs: list[float]
    dense_logprobs: list[float]


class Answers:
    """Answers in float32, each found once."""

    def __init__(self) -> None:
        self._done: dict[tuple[Path, tuple[int, ...]], Expected] = {}
        self._loaded: dict[Path, Any] = {}

    @torch.inference_mode()
    def of(self, folder: Path, prompts: list[list[int]]) -> list[Expected]:
        """For every prompt, token ids, what the checkpoint in `folder` makes of it."""
        from transformers import AutoModelForCausalLM

        import sparsek_cli.models as models

        if folder not in self._loaded:
            self._loaded[folder] = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        model = self._loaded[folder]
        for prompt in prompts:
            if (folder, tuple(prompt)) not in self._done:
                written, logs = _one(model, prompt)
                with models.dense_attention(model):
                    dense_written, dense_logs = _one(model, prompt)
                found = Expected(written, dense_written, logs, dense_logs)
                self._done[folder, tuple(prompt)] = found
        return [self._done[folder, tuple(prompt)] for prompt in prompts]


def answers_apart(folder: Path, prompts: list[list[int]]) -> list[Expected]:
    """The same, from a process in which no vLLM has run.

    vLLM changes transformers' own classes where it serves a family by them: such a model cannot be
    made any more by transformers alone.
    """
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as apart:
        return apart.submit(_answers, folder, prompts).result()


def _answers(folder: Path, prompts: list[list[int]]) -> list[Expected]:
    return Answers().of(folder, prompts)


def _one(model: Any, prompt: list[int]) -> tuple[list[int], list[float]]:
    ids = torch.tensor([prompt])
    out = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW, do_sample=False
    )
    logs = model(ids, use_cache=False).logits[0, :-1].log_softmax(-1)
    return out[0, len(prompt) :].tolist(), logs.gather(1, ids[0, 1:, None])[:, 0].tolist()
