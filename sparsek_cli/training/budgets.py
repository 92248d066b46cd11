"""Another budget at each step, so that a base learns to read with all keys and with fewer."""

from typing import Any

import numpy as np
from transformers import TrainerCallback

from sparsek_cli.models import layer_budget, set_budget, sparsek_attentions


class DrawnBudgets(TrainerCallback):
    """Each step keeps `length` / n slots per KV head on average, n drawn from `parts`.

    Window and selected keys of every head grow and shrink alike; where n is 1, every head keeps
    everything, also one that selects nothing else: a step of dense attention. What a step draws is
    a pure function of seed and step. Between steps the model has its own budget.
    """

    def __init__(self, model: Any, parts: tuple[int, ...], length: int, seed: int):
        self._model, self._parts, self._length, self._seed = model, parts, length, seed
        self._own: dict[str, Any] = {}

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        rng = np.random.default_rng([self._seed, state.global_step])
        part = self._parts[int(rng.integers(len(self._parts)))]
        everything = {"topk": self._length}
        drawn = everything if part == 1 else scaled(self._model, self._length / part)
        before = set_budget(self._model, **drawn)
        self._own = {key: before[key] for key in drawn}

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        set_budget(self._model, **self._own)


def scaled(model: Any, slots: float) -> dict[str, Any]:
    """`window` and `topk` for a mean of `slots` per KV head, heads having the shares they have."""
    attentions = sparsek_attentions(model)
    config = attentions[0].config
    budgets = {a.layer_idx: layer_budget(config, a.layer_idx) for a in attentions}
    each = {n: np.atleast_1d(budget.topk) for n, budget in budgets.items()}
    first = next(iter(budgets.values()))
    factor = (slots - first.sinks) / (np.mean([*map(np.mean, each.values())]) + first.window)

    def rounded(count: int) -> int:
        # A head that selects goes on selecting, and a window holds the token itself.
        return max(1, round(count * factor)) if count else 0

    # One number stays one number for all heads of its layer.
    topk = [
        None
        if n not in budgets
        else [rounded(int(count)) for count in each[n]]
        if isinstance(budgets[n].topk, tuple)
        else rounded(budgets[n].topk)
        for n in range(config.num_hidden_layers)
    ]
    return {"topk": topk, "window": rounded(first.window)}
