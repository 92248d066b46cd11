"""Budget annealing: more selected keys at first, the target's number at the end.

With four times the budget the keys between k and 4 k are seen, so their scores learn what they are
worth; with k alone a dropped key has no gradient. A few fixed sizes, because kernels are compiled
for each.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from transformers import TrainerCallback

from sparsek_cli.models import budget, set_budget


class BudgetStages(TrainerCallback):
    """Sets topk at the start of each step; a pure function of the step, so a run can resume.

    Args:
        model: a SparseK model, its topk being the target.
        factors: multiples of the target for equal parts of the run; a last part has the target.
    """

    def __init__(self, model: Any, factors: Sequence[float]):
        self._model, self._factors = model, (*factors, 1.0)
        self.target = model.config.sparsek["topk"]

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        stage = state.global_step * len(self._factors) // state.max_steps
        set_budget(self._model, topk=_scaled(self.target, self._factors[stage]))

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        set_budget(self._model, topk=self.target)

    @contextmanager
    def at_target(self) -> Iterator[None]:
        """Within the block the model has the target's budget."""
        with budget(self._model, topk=self.target):
            yield


def _scaled(topk: Any, factor: float) -> Any:
    if isinstance(topk, list):
        return [_scaled(entry, factor) for entry in topk]
    return None if topk is None else round(topk * factor)
