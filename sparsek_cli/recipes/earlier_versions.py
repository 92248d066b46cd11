"""What recipes of earlier versions had: keys that are settled, names that are words now."""

from typing import Any

# Shipped recipes of 0.1.0 that another one and a few words say.
_DENSE, _WINDOW = "sparsek=null", "sparsek.topk=0 sparsek.window="
_ROWS = {
    "dense": _DENSE,
    "window": f"{_WINDOW}512",
    "sparsek": "",
    "random": "sparsek.scorer=random sparsek.topk=252 sparsek.sinks=4",
    "alone": "sparsek.topk=511 sparsek.window=1",
}
RENAMED = {
    "distill": "lora objective.lm=0 objective.distill=1",
    "full-fsdp": "full launch.strategy=fsdp",
    "full-zero3": "full launch.strategy=zero3",
    **{
        f"scratch-{m}-{row}": f"scratch-{m} {_ROWS[row]}"
        for m in ("llama", "gpt2")
        for row in _ROWS
    },
    **{
        f"{stream}-{row}": f"{stream} {words}"
        for stream in ("nucleotides", "series")
        for row, words in (("dense", _DENSE), ("window", f"{_WINDOW}128"), ("sparsek", ""))
    },
}
# Keys of earlier versions that ablations settled: by name, the values that are what is now always
# done (None: any), and what to do about another one.
Settled = dict[str, tuple[tuple[Any, ...] | None, str]]
SETTLED_FINETUNE: Settled = {
    "budget_stages": (([],), "leave it out: it gained nothing over training at the budget itself"),
    "scorers_shape_base": ((None,), "leave it out: true from random weights, else false"),
    "keep_checkpoints": ((1,), "leave it out: the newest checkpoint is kept"),
    "loss_chunk": (None, "leave it out: it follows from the vocabulary"),
    "betas": (([0.9, 0.95], (0.9, 0.95)), "leave it out: it is [0.9, 0.95]"),
    "architecture.scaled_init": ((True,), "leave it out: it is true"),
    "objective.future": ((0, 0.0), "leave it out, or set scorer_training=concurrent in its place"),
    "objective.temperature": ((1, 1.0), "leave it out: it is 1"),
    "objective.outputs": (
        (0, 0.0),
        "leave it out: predictions alone are distilled",
    ),
    "evaluation.needles": ((4,), "leave it out: it is 4"),
}
SETTLED_EVALUATE: Settled = {
    "share_prefix": ((True,), "leave it out: a document is read once for all questions about it"),
}

# The block `method` of convert recipes, which lies beside every model that was converted with it.
_SCORERS = (
    "leave the block method out: how scorers are found is settled (docs/method.md, section 5), and "
    "recall is a key of its own"
)
_MAPS = "text", "all", "answers", "blend"
_SLOPES = 0.0, 0.05, 0.2, 0.7, 2.5
_SIZES = 0.0, 0.0625, 0.125, 0.25, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0
SETTLED_CONVERT: Settled = {
    "method.scorer": (("mlp",), _SCORERS),
    "method.width": ((128,), _SCORERS),
    "method.target": (("max",), _SCORERS),
    "method.documents": (("auto",), _SCORERS),
    "method.maps": ((_MAPS, [*_MAPS]), _SCORERS),
    "method.slopes": ((_SLOPES, [*_SLOPES]), _SCORERS),
    "method.sizes": ((_SIZES, [*_SIZES]), _SCORERS),
    "method.answer_weight": ((), _SCORERS),
    "method.recall": ((), "it is called recall now: write recall=... in its place"),
    "method": (({},), _SCORERS),
}


def with_recall(given: Any) -> Any:
    """A convert recipe as written, `method.recall` under the name that it has now.

    It stays, to be refused, where it is no share, or says something else than `recall` beside it.
    """
    method = given.get("method") if isinstance(given, dict) else None
    share = method.get("recall") if isinstance(method, dict) else None
    if isinstance(share, bool) or not isinstance(share, int | float) or not 0 <= share <= 1:
        return given
    if given.get("recall", share) != share:
        return given
    rest = {key: value for key, value in method.items() if key != "recall"}
    return {**given, "recall": share, "method": rest}


def without_settled(given: Any, settled: Settled) -> Any:
    """A recipe as written without the settled keys that ask for nothing else."""
    if not isinstance(given, dict):
        return given
    kept = dict(given)
    for key, (allowed, _) in settled.items():
        place, _, name = key.rpartition(".")
        block = kept.get(place) if place else kept
        if not isinstance(block, dict) or name not in block:
            continue
        if allowed is None or block[name] in allowed:
            block = {k: v for k, v in block.items() if k != name}
            kept = {**kept, place: block} if place else block
    return kept
