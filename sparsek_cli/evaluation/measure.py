"""One task at one length under one policy: run by lm-eval, boiled down to a result."""

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from sparsek_cli.errors import DAMAGED_OR_TOO_LARGE, SparsekError
from sparsek_cli.evaluation.lm import proof as proofs
from sparsek_cli.evaluation.policies.policy import Policy
from sparsek_cli.evaluation.processes import Ranks
from sparsek_cli.evaluation.tasks.load_tasks import Unit, build_requests
from sparsek_cli.silence import quiet_lm_eval

BATCH_TOKENS = {"cpu": 2048, "cuda": 65536}  # `batch_size: auto` fills a batch with about so many
BATCH_LOGITS = {"cpu": 1 << 30, "cuda": 4 << 30}  # bytes of its float32 log-probabilities, at most
MAX_BATCH = 64


def run_unit(
    unit: Unit, policy: Policy, lm: Any, ranks: Ranks, *, limit: int | None, fills_batches: bool
) -> tuple[dict[str, Any], list[dict[str, Any]]] | None:
    """One task at one length under one policy.

    Args:
        limit: samples, None: all. fills_batches: prompts are scored as many at once as fit.

    Returns:
        The unit's result, and one record per sample; None in all processes but the first.

    Raises:
        SparsekError: the policy's attention did not run (see proof.check).
    """
    from lm_eval.evaluator import evaluate as lm_eval_evaluate

    lm.policy = policy
    lm.proof = proofs.Proof(attention="sparsek" if policy.sparse else "dense")
    if fills_batches:
        build_requests(unit, lm, limit)
        _, longest = lm.over_limit(unit.task.instances)
        kind = "cuda" if lm.device.type == "cuda" else "cpu"
        lm.batch_size_per_gpu = batch_size(longest, lm.vocab_width(), kind)
    with (
        quiet_lm_eval(),
        policy.applied(lm.model),
        _positions(lm.model, policy, unit),
        proofs.watch_attention(lm.proof),
    ):
        most_pairs = policy.most_pairs(lm.model)
        raw = lm_eval_evaluate(
            lm,
            {"tasks": {unit.entry.name: unit.task}, "groups": {}, "group_map": {}},
            limit=limit,
            bootstrap_iters=100,
            apply_chat_template=unit.wrapped,
            fewshot_as_multiturn=unit.wrapped,
        )
    proof = ranks.add_up(lm)
    if raw is None:
        return None
    expected = {"sparse": policy.sparse, "most_pairs": most_pairs}
    proofs.check(proof, **expected, task=unit.name, policy=policy.label)
    samples = raw["samples"][unit.entry.name]
    result = {
        "task": unit.entry.name,
        "length": unit.length,
        "policy": policy.label,
        "budget": policy.budget,
        "metrics": _metrics(raw, unit, samples),
        "primary": unit.entry.metric,
        "samples": len({s["doc_id"] for s in samples}),
        "chat_template": unit.chat,
        "num_fewshot": unit.task.get_config("num_fewshot"),
        "proof": proof.as_dict(),
    }
    result["primary"] = _primary(result)
    if unit.entry.name == "ppl":
        from sparsek_cli.evaluation.tasks.ppl import loss_by_position

        passages = [sample["resps"][0][0] for sample in samples]
        result["loss_by_position"] = loss_by_position(passages, unit.length)
    if samples and "depth" in samples[0]["doc"]:
        result["by_depth"] = [
            [s["doc"]["depth"], s[result["primary"]], s["doc"].get("phrasing")] for s in samples
        ]
    return result, [_sample(s) for s in samples]


def _positions(model: Any, policy: Policy, unit: Unit) -> AbstractContextManager[None]:
    """Where positions change with a text's length, rivals have transformers' for the longest.

    So dense figures are those of the dense model, which has other positions in short texts than
    in long ones; SparseK's are always those of the model's own length.
    """
    from sparsek_cli.models.positions import positions_for

    return nullcontext() if policy.sparse else positions_for(model, unit.longest)


def batch_size(longest: int, vocabulary: int, device: str) -> int:
    """Prompts scored side by side under `batch_size: auto`.

    They are padded to the longest and scored without a cache, so what takes memory is the
    log-probabilities of all their tokens. Nothing that varies from run to run is looked at.

    Args:
        longest: tokens. vocabulary: width of the logits. device: "cpu" or "cuda".
    """
    most = min(BATCH_TOKENS[device], BATCH_LOGITS[device] // (4 * vocabulary))
    return max(1, min(MAX_BATCH, most // max(1, longest)))


def _metrics(raw: dict, unit: Unit, samples: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """{metric: value, stderr, higher_is_better, samples} as lm-eval gives them.

    `samples` is how many the value is a mean of: not every sample has every metric.
    Where lm-eval has no standard error (its corpus metrics), it is that of the mean of the metric
    over single samples.
    """
    name = unit.entry.name
    values = raw["results"][name]
    better = raw.get("higher_is_better", {}).get(name, {})
    aggregation = unit.task.aggregation()
    metrics = {}
    for key, value in values.items():
        metric, _, filtered = key.partition(",")
        if metric not in aggregation or not isinstance(value, int | float) or math.isnan(value):
            continue
        rows = [s[metric] for s in samples if metric in s and s["filter"] == filtered]
        error = values.get(f"{metric}_stderr,{filtered}")
        if not isinstance(error, int | float):
            error = _standard_error(rows, aggregation.get(metric))
        label = metric if filtered in ("none", "") else f"{metric},{filtered}"
        metrics[label] = {
            "value": value,
            "stderr": error,
            "higher_is_better": bool(better.get(metric, True)),
            "samples": sum(row is not None for row in rows),
        }
    return metrics


def _standard_error(rows: list[Any], aggregate: Callable | None) -> float | None:
    """Standard error of the mean of `aggregate` over single rows, or None."""
    if len(rows) < 2 or aggregate is None:
        return None
    if hasattr(aggregate, "standard_error"):
        return aggregate.standard_error(rows)
    each = [aggregate([row]) for row in rows]
    mean = sum(each) / len(each)
    return math.sqrt(sum((x - mean) ** 2 for x in each) / (len(each) - 1) / len(each))


def _primary(result: dict[str, Any]) -> str:
    """The metric that stands for the task: the catalogue's, else the first one there is.

    Raises:
        SparsekError: none is a number.
    """
    metrics = result["metrics"]
    if not metrics:
        raise SparsekError(
            f"{result['task']} under {result['policy']}: no metric is a number",
            hint=DAMAGED_OR_TOO_LARGE,
        )
    named = [m for m in metrics if m.split(",")[0] == result["primary"]]
    return (named or list(metrics))[0]


def _sample(sample: dict[str, Any]) -> dict[str, Any]:
    """What is kept of one sample: documents are long and can be made again, so only their end."""
    doc = {k: v for k, v in sample["doc"].items() if not (isinstance(v, str) and len(v) > 500)}
    return {
        "doc_id": sample["doc_id"],
        "filter": sample["filter"],
        "doc": doc,
        "target": _short(sample["target"]),
        "prompt_end": str(sample["arguments"][0][0])[-300:],
        "prompt_hash": sample["prompt_hash"],
        "responses": [_short(r) for responses in sample["resps"] for r in responses],
        "scores": {metric: sample[metric] for metric in sample["metrics"]},
    }


def _short(value: Any) -> Any:
    return value if not isinstance(value, str) or len(value) <= 2000 else value[:2000] + "..."
