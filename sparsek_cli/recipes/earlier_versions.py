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

# Keys that a convert recipe had below `method`, and what to do about them.
_SETTLED_SCORERS = "leave it out: how scorers are found is settled (docs/method.md, section 5)"
SETTLED_METHOD: dict[str, str] = {
    "method.recall": "it is called recall now: write recall=... in its place",
    **{
        f"method.{key}": _SETTLED_SCORERS
        for key in (
            "scorer", "width", "target", "documents", "maps", "slopes", "sizes", "answer_weight",
        )
    },
    "method": _SETTLED_SCORERS,
}  # fmt: skip


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
