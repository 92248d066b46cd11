"""Losses: language model and distillation to dense attention, without logits for whole sequences.

`attach` gives a causal LM a `forward` that returns loss sums instead of logits. The loss is
computed inside `forward`, so DDP, FSDP and DeepSpeed see one ordinary forward pass.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import MethodType
from typing import Any, Protocol

import torch
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from sparsek_cli.converted import is_converted
from sparsek_cli.data import ANSWER, IGNORED, TEXT
from sparsek_cli.models.output import output_layer

# From final states [..., C] to logits; see models/output.py.
OutputLayer = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Objective:
    """What is minimised: lm x (text + a x answers) + distill x the same two means of the KL
    + the losses that layers have of their own (`LayerLoss`), weighed already.

    Attributes:
        lm, distill: weights of the parts.
        answer_weight: the factor a of the mean over ANSWER tokens.
        loss_chunk: tokens whose logits exist at one time.
    """

    lm: float = 1.0
    distill: float = 0.0
    answer_weight: float = 1.0
    loss_chunk: int = 2048

    def combine(self, sums: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
        """The loss from sums [5] and counts [3] (see `attach` and `count_targets`)."""
        text, answers, sequences = counts.clamp(min=1).to(sums.dtype).unbind()
        lm = sums[0] / text + self.answer_weight * sums[1] / answers
        kl = sums[2] / text + self.answer_weight * sums[3] / answers
        return self.lm * lm + self.distill * kl + sums[4] / sequences


class Teacher(Protocol):
    """The model that is distilled; see teacher.py."""

    @property
    def head(self) -> OutputLayer: ...

    def states(self, **inputs: Any) -> torch.Tensor: ...


class LayerLoss(Protocol):
    """What a model's layers lose of their own, its weight included; such as future_attention.py."""

    @property
    def needs_teacher(self) -> bool:
        """Whether the teacher's pass must come before the model's."""

    def begin(self, roles: torch.Tensor, bounds: torch.Tensor | None) -> None:
        """Before both passes over roles [B, N]; bounds [documents + 1] over all B * N tokens."""

    def loss(self) -> torch.Tensor | float:
        """Summed over sequences; after the model's pass."""


def attach(
    model: Any,
    objective: Objective,
    teacher: Teacher | None = None,
    layer_losses: Sequence[LayerLoss] = (),
) -> None:
    """Replaces `model.forward` by one that returns {"sums": [5] float32}; `detach` undoes it.

    The sums are those of `loss_sums`, then what layers have of their own.

    Args:
        model: a transformers causal LM.
        objective: which sums are needed.
        teacher: the model that is distilled where `objective.distill` > 0, or compared with.
        layer_losses: count while the model trains.
    """
    decoder = decoder_of(model)
    sparse = is_converted(model.config)

    def forward(
        self: Any,
        input_ids: torch.Tensor,
        roles: torch.Tensor,
        position_ids: torch.Tensor | None = None,
        cu_seq_lens: torch.Tensor | None = None,
        **_: Any,
    ) -> dict[str, torch.Tensor]:
        # Dense families make a block mask of position_ids that start again; SparseK takes bounds.
        inputs = {"input_ids": input_ids, "position_ids": position_ids}
        if sparse and cu_seq_lens is not None:
            inputs["cu_seq_lens_q"] = cu_seq_lens
        parts = layer_losses if self.training else ()
        for part in parts:
            part.begin(roles, cu_seq_lens)
        known = None
        compared = objective.distill or any(part.needs_teacher for part in parts)
        if self.training and teacher is not None and compared:
            states = teacher.states(**inputs)
            known = (states, teacher.head) if objective.distill else None
        hidden = decoder(**inputs, use_cache=False).last_hidden_state
        own = hidden.new_zeros((), dtype=torch.float32)
        own = own + sum(part.loss() for part in parts)
        head = output_layer(self)
        sums = loss_sums(hidden, known, head, input_ids, roles, objective)
        return {"sums": torch.cat([sums, own[None]])}

    model.forward = MethodType(forward, model)


def detach(model: Any) -> None:
    """Gives the model its own `forward` back."""
    model.__dict__.pop("forward", None)


def decoder_of(model: Any) -> torch.nn.Module:
    """The part of a causal LM below its output layer."""
    return getattr(model, model.base_model_prefix)


def count_targets(roles: torch.Tensor) -> torch.Tensor:
    """[3] int64: tokens of roles [B, N] that count as TEXT and as ANSWER, and sequences."""
    targets = roles[:, 1:]
    sequences = torch.tensor(len(roles), device=roles.device)
    return torch.stack([(targets == TEXT).sum(), (targets == ANSWER).sum(), sequences])


def loss_sums(
    hidden: torch.Tensor,
    known: tuple[torch.Tensor, OutputLayer] | None,
    head: OutputLayer,
    input_ids: torch.Tensor,
    roles: torch.Tensor,
    objective: Objective,
) -> torch.Tensor:
    """Sums over tokens: [text nll, answer nll, text KL, answer KL], float32 [4].

    Args:
        hidden: [B, N, C] states below the output layer.
        known: the teacher's states [B, N, C] and output layer, or None.
        head: the output layer.
        input_ids, roles: [B, N]; position t is scored on the token at t + 1.

    Logits exist for `objective.loss_chunk` tokens at a time and are made again for the backward
    pass, so memory is O(chunk x vocabulary), whatever the length.
    """
    wanted = (roles[:, 1:] != IGNORED).reshape(-1).nonzero().squeeze(1)
    width = hidden.shape[-1]
    states = hidden[:, :-1].reshape(-1, width)[wanted]
    targets = input_ids[:, 1:].reshape(-1)[wanted]
    answers = (roles[:, 1:] == ANSWER).reshape(-1)[wanted].float()
    aims = None if known is None else known[0][:, :-1].reshape(-1, width)[wanted]
    total = torch.zeros(4, dtype=torch.float32, device=hidden.device)
    for start in range(0, len(wanted), objective.loss_chunk):
        piece = slice(start, start + objective.loss_chunk)
        aim = None if aims is None else (aims[piece], known[1])
        total = total + checkpoint(
            _chunk_sums,
            states[piece],
            aim,
            head,
            targets[piece],
            answers[piece],
            use_reentrant=False,
        )
    # A batch without any target still needs a graph: DDP expects a gradient from every process.
    return total + 0.0 * hidden.flatten()[:1].float().sum()


def _chunk_sums(
    states: torch.Tensor,
    known: tuple[torch.Tensor, OutputLayer] | None,
    head: OutputLayer,
    targets: torch.Tensor,
    answers: torch.Tensor,
) -> torch.Tensor:
    logits = head(states).float()
    nll = F.cross_entropy(logits, targets, reduction="none")
    if known is None:
        kl = torch.zeros_like(nll)
    else:
        with torch.no_grad():
            states_there, head_there = known
            aim = torch.log_softmax(head_there(states_there).float(), dim=-1)
        ours = torch.log_softmax(logits, dim=-1)
        kl = F.kl_div(ours, aim, reduction="none", log_target=True).sum(-1)
    text = 1.0 - answers
    return torch.stack([(nll * text).sum(), (nll * answers).sum(),
                        (kl * text).sum(), (kl * answers).sum()])  # fmt: skip
