"""What a model is compared with: the same weights under another rule for what to keep.

Every policy but `dense` holds exactly as many key-value pairs as the converted model does, in the
same cache, so a difference in score is a difference in choice. Budgets that differ by head belong
to the converted model alone; the others spread the same total evenly.

    sparsek   the model as it is
    dense     every pair, ordinary attention
    window    sinks and the newest k + w pairs
    random    sinks, window and k random pairs
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
}


@dataclass(frozen=True)
class Policy:
    """One row of the result.

    Attributes:
        name: key of `SUMMARIES`.
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
    def sparse(self) -> bool:
        """Whether SparseK attention has to run under it."""
        return self.name != DENSE

    def unfit_for(self, requests: str) -> str | None:
        """Why the policy cannot be measured on a task of these requests, or None."""
        return None

    @contextmanager
    def applied(self, model: Any) -> Iterator[None]:
        """Makes `model` follow the policy inside the block."""
        if not is_converted(model):
            if self.sparse:
                raise SparsekError(
                    f"policy '{self.name}' needs a converted model",
                    hint="run `sparsek convert` first",
                )
            yield
            return
        from sparsek_cli import models

        with ExitStack() as stack:
            if self.name == DENSE:
                stack.enter_context(models.dense_attention(model))
            if self.budget is not None and self.sparse:
                stack.enter_context(models.budget(model, topk=self._topk(model)))
            if self.name == "window":
                stack.enter_context(_as_window(model))
            elif self.name == "random":
                stack.enter_context(_evenly(model))
                stack.enter_context(models.random_scores(model, self.seed))
            yield

    def _topk(self, model: Any) -> int | list:
        """What to select so that a head keeps `budget` pairs on average, spread as it was."""
        block = model.config.sparsek
        topk = self.budget - block["window"] - block["sinks"]
        if topk < 0:
            raise UsageError(
                f"budget {self.budget} is below the model's window and sinks "
                f"({block['window']} + {block['sinks']})",
                hint="name larger --budgets",
            )
        return topk if isinstance(block["topk"], int) else _scaled(_per_head(model), topk)

    def new_cache(self, model: Any) -> Any:
        """An empty cache of the kind that the policy uses; call it inside `applied`."""
        if self.sparse:
            from sparsek_cli.models import SparseKCache

            return SparseKCache(model.config)
        from transformers import DynamicCache

        return DynamicCache(config=model.config)


def _per_head(model: Any) -> list[list[int]]:
    """Selected pairs of every layer and KV head."""
    from sparsek_cli.models import kv_heads, layer_budget

    config = model.config
    rows = (layer_budget(config, layer).topk for layer in range(config.num_hidden_layers))
    return [[row] * kv_heads(config) if isinstance(row, int) else list(row) for row in rows]


def _scaled(per_head: list[list[int]], mean: int) -> list[list[int]]:
    """The same proportions with `mean` pairs on average, to the pair."""
    flat = [k for row in per_head for k in row]
    wanted = mean * len(flat)
    exact = [k * wanted / max(1, sum(flat)) for k in flat]
    whole = [int(k) for k in exact]
    # What rounding down left over goes to those that lost most by it.
    order = sorted(range(len(flat)), key=lambda i: whole[i] - exact[i])
    for i in order[: wanted - sum(whole)]:
        whole[i] += 1
    heads = len(per_head[0])
    return [whole[start : start + heads] for start in range(0, len(whole), heads)]


@contextmanager
def _evenly(model: Any) -> Iterator[int | None]:
    """The model's selected pairs spread evenly over all heads: uneven ones are SparseK's own idea.

    Yields:
        Pairs per head; None where they do not divide evenly, and the spread stays as it is.
    """
    from sparsek_cli import models

    flat = [k for row in _per_head(model) for k in row]
    if sum(flat) % len(flat):
        yield None
    else:
        with models.budget(model, topk=sum(flat) // len(flat)):
            yield sum(flat) // len(flat)


@contextmanager
def _as_window(model: Any) -> Iterator[None]:
    """The model's pairs spent on the newest ones."""
    from sparsek_cli import models

    window = model.config.sparsek["window"]
    with _evenly(model) as topk:
        if topk is not None:
            with models.budget(model, topk=0, window=window + topk):
                yield
        else:  # budgets differ by head, windows cannot: the newest pairs win by their scores
            with models.replaced_scorers(model, _recency):
                yield


def _recency(attention: Any) -> Any:
    import torch

    from sparsek_cli.models import kv_heads

    class RecencyScorer(torch.nn.Module):
        """Scores [B, G, N] that are the positions: the newest candidates are the best."""

        def __init__(self, heads: int):
            super().__init__()
            self.heads = heads
            self.register_buffer("slopes", torch.zeros(heads), persistent=False)

        def forward(self, hidden_states: Any, position_ids: Any = None) -> Any:
            batch, tokens = hidden_states.shape[:2]
            positions = position_ids.expand(batch, tokens).float()
            return positions[:, None, :].expand(batch, self.heads, tokens).contiguous()

    return RecencyScorer(kv_heads(attention.config))


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
        UsageError: a name that is no policy.
    """
    for name in baselines:
        if name not in SUMMARIES:
            near = get_close_matches(name, SUMMARIES, n=1)
            hint = f"did you mean '{near[0]}'?" if near else f"known: {', '.join(SUMMARIES)}"
            raise UsageError(f"unknown baseline '{name}'", hint=hint)
    if not is_converted(model):
        return [Policy(DENSE)]
    wanted = [OWN, *baselines] if own else [n for n in baselines if n != OWN] or [DENSE]
    names = [n for n in dict.fromkeys([DENSE, OWN, *wanted]) if n in wanted]
    rows: list[Policy] = []
    for name in names:
        policy = Policy(name, seed=seed)
        sweep = budgets if budgets and policy.sparse else [None]
        rows += [replace(policy, budget=budget) for budget in sweep]
    return rows
