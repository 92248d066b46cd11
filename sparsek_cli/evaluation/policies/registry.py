"""The policies by name, and which of them a run compares.

Every policy but `dense` holds as many key-value pairs as the converted model does, so a difference
in score is a difference in choice. A policy's file is imported when it is asked for: names are
checked without torch.
"""

from collections.abc import Sequence
from difflib import get_close_matches
from typing import Any

from sparsek_cli.converted import is_converted
from sparsek_cli.errors import UsageError
from sparsek_cli.evaluation.policies.policy import Policy
from sparsek_cli.evaluation.tasks.skipped import Absent

OWN = "sparsek"
SCORED = (OWN, "sparsek:int8")  # by the model's own scores
DENSE = "dense"
PRESS = "kvpress:"
SHARED = ":shared"  # after the name of a rule that evicts: slots shared out over layers and heads
SUMMARIES = {
    OWN: "the converted model as it is",
    "sparsek:int8": "the converted model, keys and values of its cache in 8 bits",
    DENSE: "the same weights with ordinary attention and a growing cache",
    "window": "sinks and the newest pairs, at the same bytes",
    "random": "sinks, window and random pairs, at the same bytes",
    "snapkv": "dense prompt, then what its last queries looked at, at the same bytes",
    "h2o": "dense prompt, then what received most attention, at the same bytes",
    "kvzip": "oracle: dense context, told again to choose, then the question; the same bytes",
    "snapkv:shared": "snapkv, its slots shared out over all layers and heads",
    "h2o:shared": "h2o, its slots shared out over all layers and heads",
    "kvzip:shared": "kvzip, its slots shared out over all layers and heads",
}


def make_policy(name: str, budget: int | None = None, seed: int = 0) -> Policy:
    """The policy of that name.

    Args:
        name: key of `SUMMARIES`, or "kvpress:" and the name of a press.
        budget: total pairs per layer and KV head to set, or None for the checkpoint's own.
        seed: of `random`.

    Raises:
        UsageError: see `check_names`.
    """
    check_names([name])
    if name.startswith(PRESS):
        from sparsek_cli.evaluation.policies.kvpress import Press

        return Press(budget, seed, press=name.removeprefix(PRESS))
    from sparsek_cli.evaluation.policies import dense, sparse

    kinds: list[type[Policy]] = [
        dense.Dense, sparse.SparseK, sparse.SparseK8Bit, sparse.Window, sparse.Random,
    ]  # fmt: skip
    found = next((kind for kind in kinds if kind.name == name), None)
    if found is not None:
        return found(budget, seed)
    from sparsek_cli.evaluation.policies import kvzip, snapkv_h2o

    rules = (snapkv_h2o.SnapKV, snapkv_h2o.H2O, kvzip.KVzip)
    rule = next(rule for rule in rules if rule.kind == name.removesuffix(SHARED))
    return rule(budget, seed, shared=name.endswith(SHARED))


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
        UsageError: a budget that has no room for the model's window and sinks, or a rule that
            evicts from layers of another kind.
    """
    if not is_converted(model.config):
        return [make_policy(DENSE)]
    wanted = [OWN, *baselines] if own else [n for n in baselines if n not in SCORED] or [DENSE]
    names = [n for n in dict.fromkeys([DENSE, OWN, *wanted]) if n in wanted]
    rows: list[Policy] = []
    for name in names:
        sweep = budgets if budgets and name != DENSE else [None]
        rows += [make_policy(name, budget, seed) for budget in sweep]
    for policy in rows:
        if policy.budget is not None:
            policy.topk(model)
        if policy.evicts_after_prompt:
            policy.new_cache(model)  # refused where its rule does not know the model's layers
    return rows


def left_out(
    model: Any, baselines: Sequence[str], budgets: Sequence[int], *, own: bool
) -> list[Absent]:
    """Rows that were asked for and that this model cannot have; arguments of `plan_policies`."""
    if not is_converted(model.config):
        names = [name for name in baselines if name != DENSE]
        reason = (
            f"models of type {model.config.model_type} cannot be converted, and only layers of "
            "those that can drop pairs here"
        )
        remedy = "baselines=dense leaves them out; docs/families.md lists the families"
    else:
        names = [] if own else [name for name in baselines if name in SCORED]
        reason = "the model is not converted: its scores would be drawn at random"
        remedy = "measure what `sparsek convert` makes of it"
    found = [Absent(name, reason, remedy) for name in names]
    if budgets and not (own and is_converted(model.config)) and not {*baselines} - {*names, DENSE}:
        sizes = f"budgets {', '.join(map(str, budgets))}"
        found.append(Absent(sizes, "dense attention alone is measured", "leave budgets out"))
    return found


def check_names(baselines: list[str]) -> None:
    """Refuses what is no policy, before a model is loaded for it.

    Raises:
        UsageError: a name that is no policy, or a press of a package that is not installed.
    """
    for name in baselines:
        if name.startswith(PRESS):
            from sparsek_cli.evaluation.policies.kvpress import find

            find(name.removeprefix(PRESS))
        elif name not in SUMMARIES:
            near = get_close_matches(name, SUMMARIES, n=1)
            known = f"known: {', '.join(SUMMARIES)}, {PRESS}NAME"
            raise UsageError(
                f"unknown baseline '{name}'", hint=f"did you mean '{near[0]}'?" if near else known
            )
