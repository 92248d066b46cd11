"""How much calibration looks at and tries: a CPU affords less than an accelerator."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from sparsek_cli.conversion.calibrate.head_budgets.refine import WAYS
from sparsek_cli.conversion.calibrate.sequences.reconstruction import LONGEST


@dataclass(frozen=True)
class Effort:
    """What the device affords: proposals run as whole models, and times the best is refined."""

    proposals: int
    refinements: int

    @property
    def passes(self) -> int:
        """Whole models run at most, a plain window's among them."""
        return 1 + self.proposals + self.refinements * WAYS


@dataclass(frozen=True)
class Affordable:
    """What a device affords.

    Attributes:
        target_rows: queries of a sequence whose attention forms a target.
        error_rows: queries of a sequence at which candidates are compared: in text, at answers.
        held_out: documents that candidates are compared on.
        turns: parts of a document that are told again (None: all), each of `turn_length` tokens
            at most.
        whole_tokens: of documents that are run through the whole model (two at least: enough for
            the many rows of very long ones).
        valued: documents of those on which single parts of the model are valued.
        parts: how many parts of neighbouring layers the model is valued in.
        refining: documents, others than those that judge, along whose gradient the best proposal
            is refined.
        stand_in_tokens: of sequences that stand-ins are fitted on (one at least); stand_in_rows:
            queries of each, in text and at answers.
        kept: bytes of what the dense model makes of documents that are kept until they are needed
            again, not computed anew.
        whole_models: proposals that are run as whole models, and how often the best is refined.
    """

    target_rows: int
    error_rows: tuple[int, int]
    held_out: int
    turns: int | None
    turn_length: int
    whole_tokens: int
    valued: int
    parts: int
    refining: int
    stand_in_tokens: int
    stand_in_rows: tuple[int, int]
    kept: int
    whole_models: Effort


CPU = Affordable(
    target_rows=512, error_rows=(64, 32), held_out=4, turns=2, turn_length=512,
    whole_tokens=8192, valued=1, parts=12, refining=1,
    stand_in_tokens=1 << 15, stand_in_rows=(384, 64), kept=1 << 29,
    whole_models=Effort(5, 1),
)  # fmt: skip
ACCELERATOR = Affordable(
    target_rows=4096, error_rows=(256, 192), held_out=12, turns=None, turn_length=LONGEST,
    whole_tokens=1 << 20, valued=2, parts=48, refining=4,
    stand_in_tokens=1 << 17, stand_in_rows=(512, 256), kept=0, whole_models=Effort(8, 2),
)  # fmt: skip


def affordable(device: torch.device) -> Affordable:
    """What `device` affords."""
    return CPU if device.type == "cpu" else ACCELERATOR
