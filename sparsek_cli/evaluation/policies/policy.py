"""What a model is compared with: the same weights under another rule for what to keep.

Every policy but `dense` holds as many key-value pairs as the converted model does, so a difference
in score is a difference in choice. Budgets that differ by head belong to the converted model alone;
the others spread the same total evenly.

    sparsek   the model as it is
    dense     every pair, ordinary attention
    window    sinks and the newest k + w pairs
    random    sinks, window and k random pairs
    snapkv    dense while the prompt is read; its last queries choose what stays (eviction.py)
    h2o       dense while the prompt is read; attention received so far chooses
    kvpress:NAME  the same cache, and a press of that package chooses (kvpress.py)
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from difflib import get_close_matches
from typing import Any

from sparsek_cli.errors import SparsekError, UsageError

OWN = "sparsek"
DENSE = "dense"
SUMMARIES = {
    OWN: "the converted model as it is",
    DENSE: "the same weights with ordinary attention and a growing cache",
    "window": "sinks and the newest pairs, at the same bytes",
    "random": "sinks, window and random pairs, at the same bytes",
    "snapkv": "dense prompt, then what its last queries looked at, at the same bytes",
    "h2o": "dense prompt, then what received most attention, at the same bytes",
}
RIVALS = ("snapkv", "h2o")
PRESS = "kvpress:"


@dataclass(frozen=True)
class Policy:
    """One row of the result.

    Attributes:
        name: key of `SUMMARIES`, or "kvpress:" and the name of a press.
        budget: total pairs per layer and KV head to set, or None for the checkpoint's own.
        seed: of `random`.
    """

    name: str
    budget: int | None = None
    seed: int = 0

    @property
    def label(self) -> str:
        """Name in tables and folders, e.g. "window-512"."""
        return self.name if self.budget is None else f"{self.name}-{self.budget}"

    @property
    def bounded(self) -> bool:
        """Whether the cache stops growing."""
        return self.name != DENSE

    @property
    def evicts_after_prompt(self) -> bool:
        """Whether the prompt is read densely and the cache cut when it ends."""
        return self.name in RIVALS or self.is_press

    @property
    def is_press(self) -> bool:
        """Whether kvpress chooses."""
        return self.name.startswith(PRESS)

    @property
    def sparse(self) -> bool:
        """Whether SparseK attention has to run under it."""
        return self.bounded and not self.evicts_after_prompt

    def unfit_for(self, requests: str) -> str | None:
        """Why the policy cannot be measured on a task of these requests, or None."""
        if self.evicts_after_prompt and requests == "loglikelihood_rolling":
            return "it evicts when a prompt ends, and running text has no prompt"
        return None

    @contextmanager
    def applied(self, model: Any) -> Iterator[None]:
        """Makes `model` follow the policy inside the block."""
        if not is_converted(model):
            if self.bounded:
                raise SparsekError(
                    f"policy '{self.name}' needs a converted model",
                    hint="run `sparsek convert` first",
                )
            yield
            return
        from sparsek_cli import models
        from sparsek_cli.evaluation.policies.head_budgets import as_window, evenly

        with ExitStack() as stack:
            if not self.sparse:
                stack.enter_context(models.dense_attention(model))
            if self.budget is not None and self.bounded:
                stack.enter_context(models.budget(model, topk=self._topk(model)))
            if self.name == "window":
                stack.enter_context(as_window(model))
            elif self.name == "random":
                stack.enter_context(evenly(model))
                stack.enter_context(models.random_scores(model, self.seed))
            elif self.is_press:
                from sparsek_cli.evaluation.policies import kvpress

                stack.enter_context(kvpress.heard_inputs(model, kvpress.find(self.name)))
            elif self.evicts_after_prompt:
                from sparsek_cli.evaluation.policies.eviction import observed_attention

                stack.enter_context(observed_attention(model))
            yield

    def _topk(self, model: Any) -> int | list:
        """What to select so that a head keeps `budget` pairs on average, spread as it was."""
        from sparsek_cli.evaluation.policies.head_budgets import per_head, scaled

        block = model.config.sparsek
        topk = self.budget - block["window"] - block["sinks"]
        if topk < 1:
            raise UsageError(
                f"budget {self.budget} is below the model's window and sinks "
                f"({block['window']} + {block['sinks']}) and one pair to select",
                hint=f"name --budgets of {block['window'] + block['sinks'] + 1} or more",
            )
        return topk if isinstance(block["topk"], int) else scaled(per_head(model), topk)

    def new_cache(self, model: Any) -> Any:
        """An empty cache of the kind that the policy uses; call it inside `applied`."""
        if self.sparse:
            from sparsek_cli.models import SparseKCache

            return SparseKCache(model.config)
        if self.evicts_after_prompt:
            from sparsek_cli.evaluation.policies import eviction, kvpress
            from sparsek_cli.evaluation.policies.head_budgets import slots_per_head

            layers, window = model.config.num_hidden_layers, model.config.sparsek["window"]
            kind = kvpress.PressLayer if self.is_press else eviction.LAYERS[self.name]
            return eviction.new_cache(kind, layers, slots_per_head(model), window)
        from transformers import DynamicCache

        return DynamicCache(config=model.config)

    def end_prompt(self, model: Any, cache: Any) -> None:
        """Called when a prompt has been read and an answer is about to begin."""
        if self.is_press:
            from sparsek_cli.evaluation.policies import kvpress

            kvpress.end_prompt(model, cache, kvpress.find(self.name))
        elif self.evicts_after_prompt:
            from sparsek_cli.evaluation.policies import eviction

            eviction.end_prompt(cache)

    def most_pairs(self, model: Any) -> int | None:
        """Pairs that all layers and heads may hold together; None without a bound."""
        if not self.bounded:
            return None
        from sparsek_cli.evaluation.policies.head_budgets import per_head

        block = model.config.sparsek
        rows = per_head(model)
        return sum(k + block["sinks"] + block["window"] for row in rows for k in row)


def is_converted(model: Any) -> bool:
    """Whether `model` came out of `sparsek convert`."""
    return getattr(model.config, "sparsek", None) is not None


def plan_policies(
    model: Any, baselines: list[str], budgets: list[int], seed: int, *, own: bool = True
) -> list[Policy]:
    """The rows of a run: dense first (it is the reference), then ours, then the other baselines.

    Args:
        model: the model; without SparseK attention it has only its dense row.
        baselines: names asked for.
        budgets: pairs per layer and head; empty for the checkpoint's own.
        seed: of `random`.
        own: whether the model's scores mean something, so that its own row belongs in the table.

    Raises:
        UsageError: a budget that has no room for the model's window and sinks.
    """
    if not is_converted(model):
        return [Policy(DENSE)]
    wanted = [OWN, *baselines] if own else [n for n in baselines if n != OWN] or [DENSE]
    names = [n for n in dict.fromkeys([DENSE, OWN, *wanted]) if n in wanted]
    rows: list[Policy] = []
    for name in names:
        policy = Policy(name, seed=seed)
        sweep = budgets if budgets and policy.bounded else [None]
        rows += [replace(policy, budget=budget) for budget in sweep]
    for policy in rows:
        if policy.budget is not None:
            policy._topk(model)
    return rows


def check_names(baselines: list[str]) -> None:
    """Refuses what is no policy, before a model is loaded for it.

    Raises:
        UsageError: a name that is no policy, or a press of a package that is not installed.
    """
    for name in baselines:
        if name.startswith(PRESS):
            from sparsek_cli.evaluation.policies import kvpress

            kvpress.find(name)
        elif name not in SUMMARIES:
            near = get_close_matches(name, SUMMARIES, n=1)
            known = f"known: {', '.join(SUMMARIES)}, {PRESS}NAME"
            raise UsageError(
                f"unknown baseline '{name}'", hint=f"did you mean '{near[0]}'?" if near else known
            )
