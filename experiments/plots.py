"""Figures of what the experiments measured.

    python -m experiments.plots FOLDER RESULTS [RESULTS ...]

RESULTS are folders of experiments (or their results.json). FOLDER gets a PNG and an SVG for each
figure, named after the folder of the results: loss by position (scratch, budgets, conversion), loss
and recall against budget (budgets, conversion), recall by depth and length (budgets), the effect of
each part of calibration (ablations), milliseconds by length and by k (cost), tokens per second
(training_step), loss and needles against bytes (docs/results/smollm2).
"""

import argparse
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from sparsek_cli.benchmarks.session import RESULTS
from sparsek_cli.errors import SparsekError, UsageError
from sparsek_cli.evaluation.policies.registry import DENSE, OWN
from sparsek_cli.evaluation.report import plots

Rows = list[dict[str, Any]]
# What a figure by position and one by depth show of the budgets: one of them.
_SHARE = 16
MIB = 2**20  # bytes


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m experiments.plots",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("folder", type=Path, help="where the figures go")
    parser.add_argument("results", type=Path, nargs="+", help="folders of experiments")
    given = parser.parse_args()
    try:
        for place in given.results:
            for file in draw(place, given.folder):
                print(file)
    except SparsekError as error:
        parser.exit(2, f"error: {error}\nhint: {error.hint}\n")


def draw(place: Path, folder: Path) -> list[Path]:
    """Every figure that the results have data for; the files written.

    Raises:
        UsageError: there are no results, or none to draw.
    """
    file = place / RESULTS if place.is_dir() else place
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(f"no results in {place}", hint="name an experiment's folder") from error
    rows: Rows = record.get("rows", [])
    name = file.resolve().parent.name
    made = {key: figure for key, figure in figures(rows, name).items() if figure is not None}
    if not made:
        raise UsageError(f"{file} holds nothing to draw", hint="let the experiment finish a row")
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for key, figure in made.items():
        for kind in ("png", "svg"):
            written.append(folder / f"{name}-{key}.{kind}")
            figure.savefig(written[-1], format=kind, dpi=150)
    return written


def figures(rows: Rows, name: str) -> dict[str, Any]:
    """Figures by name, of whichever experiment the rows are."""
    keys = rows[0].keys() if rows else ()
    if "cache_bytes" in keys:
        return {"by_bytes": quality_by_bytes(rows)}
    if "table" in keys:
        return {"by_length": parts_by_length(rows), "by_k": time_by_k(rows)}
    if "row" in keys:
        return {"ablations": ablations(rows)}
    if "attention" in keys:
        return {"tokens": training_speed(rows)}
    if "share" in keys:
        return _of_units(list(_budget_units(rows)), name)
    if "policy" in keys:
        return _of_units(list(_conversion_units(rows)), name)
    if "loss_by_position" in keys:
        return _of_units(list(_scratch_units(rows)), name)
    return {}


# Figures that `sparsek evaluate` draws too, from results in its words.


def _of_units(units: Rows, name: str) -> dict[str, Any]:
    policies = list(dict.fromkeys(unit["policy"] for unit in units))
    report = {"units": units, "policies": policies, "model": {"name": name}}
    return {
        "score_by_budget": plots.score_by_budget(report),
        "recall_by_depth": plots.recall_by_depth(report),
        "loss_by_position": plots.loss_by_position(report),
    }


def _unit(policy: str, length: int | None, **more: Any) -> dict[str, Any]:
    return {"policy": policy, "length": length, "task": "documents", **more}


def _curve(losses: list[float], length: int) -> dict[str, list[float]]:
    step = length / len(losses)
    return {"position": [step * (i + 0.5) for i in range(len(losses))], "loss": losses}


def _scores(row: dict[str, Any], policy: str, budget: int | None) -> Iterable[dict[str, Any]]:
    """Loss and mean recall of a row against its budget; of dense attention without one."""
    recall = [value for split in row["recall"].values() for value in split.values()]
    scores = {"loss_last_quarter": row["loss_last"]}
    if recall:
        scores["recall_percent"] = sum(recall) / len(recall)
    for task, value in scores.items():
        metrics = {task: {"value": value, "stderr": None}}
        unit = _unit(policy, None, primary=task, metrics=metrics, budget=budget)
        yield {**unit, "task": task.replace("_", " ")}


def _budget_units(rows: Rows) -> Iterable[dict[str, Any]]:
    longest = max(row["slots"] for row in rows)
    shares = {row["share"] for row in rows if row["share"]}
    shown = _SHARE if _SHARE in shares else min(shares, default=None)
    for row in rows:
        policy, slots = row["policy"], row["slots"] if row["share"] else None
        label = policy if slots is None else f"{policy}-{slots}"
        yield from _scores(row, label, slots)
        if row["share"] in (None, shown):
            yield _unit(policy, longest, loss_by_position=_curve(row["loss_by_position"], longest))
            for length, found in row["by_depth"].items():
                yield _unit(policy, int(length), by_depth=found)


def _conversion_units(rows: Rows) -> Iterable[dict[str, Any]]:
    """Dense attention of the base once; by position what the smallest budget gave."""
    longest = max(row["slots"] for row in rows)
    smallest = min(row["slots"] for row in rows)
    for row in rows:
        dense = row["policy"] == DENSE
        if dense and row["model"] != "calibrated":
            continue
        name = row["model"] if row["policy"] == OWN else row["policy"]
        slots = None if dense else row["slots"]
        yield from _scores(row, name if dense else f"{name}-{slots}", slots)
        if row.get("loss_by_position") and slots in (None, smallest):
            yield _unit(name, longest, loss_by_position=_curve(row["loss_by_position"], longest))


def _scratch_units(rows: Rows) -> Iterable[dict[str, Any]]:
    for row in rows:
        for length, losses in row["loss_by_position"].items():
            yield _unit(row["model"], int(length), loss_by_position=_curve(losses, int(length)))


# Figures of their own.


def _axes(columns: int, width: float = 4.8, height: float = 3.6) -> tuple[Any, list[Any]]:
    # A Figure of its own: pyplot keeps global state and may look for a display.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width * columns, height), layout="constrained")
    FigureCanvasAgg(figure)
    axes = list(figure.subplots(1, columns, squeeze=False).flat)
    for ax in axes:
        ax.spines[["top", "right"]].set_visible(False)
        ax.grid(alpha=0.25, linewidth=0.6)
    return figure, axes


def _lines(
    ax: Any, rows: Rows, x: str, series: dict[str, str | Callable[[dict], Any]], label: str
) -> None:
    """One line per series over `x`, both axes logarithmic; rows without a value are left out."""
    from matplotlib.ticker import LogLocator, NullFormatter

    for name, of in series.items():
        value = of if callable(of) else lambda row, key=of: row.get(key)
        points = sorted((row[x], value(row)) for row in rows if value(row))
        if points:
            colour = plots.COLOURS.get("sparsek" if name == "sparse" else name)
            ax.plot(*zip(*points, strict=True), marker="o", markersize=4, color=colour, label=name)
    ax.set(xscale="log", yscale="log", xlabel=x, ylabel=label)
    ticks = sorted({row[x] for row in rows})
    ax.set_xticks(ticks, [f"{tick:,}" for tick in ticks], fontsize=8)
    ax.minorticks_off()
    ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    ax.yaxis.set_major_formatter("{x:,.6g}")
    ax.yaxis.set_minor_formatter(NullFormatter())
    if ax.get_lines():
        ax.legend(frameon=False, fontsize=8)


def quality_by_bytes(rows: Rows) -> Any:
    """Loss and needles against bytes of the KV cache: policies by colour, contexts by marker."""
    figure, axes = _axes(2)
    contexts = sorted({row["context"] for row in rows})
    labels = {"loss_last": "nats per token, unseen novels", "needles": "needles found, mean of six"}
    for ax, (key, label) in zip(axes, labels.items(), strict=True):
        for context, marker in zip(contexts, "os^v", strict=False):
            here = [row for row in rows if row["context"] == context and key in row]
            points: dict[str, list[tuple[float, float]]] = {}
            for row in sorted(here, key=lambda row: row["cache_bytes"]):
                place = row["cache_bytes"] / MIB, row[key]
                points.setdefault(row["policy"], []).append(place)
            for policy, found in points.items():
                colour = plots.colour(policy, sorted({row["policy"] for row in rows}))
                name = f"{policy}, {context:,} tokens"
                style = dict(marker=marker, markersize=7, color=colour, label=name, ls="none")
                ax.plot(*zip(*found, strict=True), **style)
                way = found if policy == DENSE else found + points.get(DENSE, [])
                ax.plot(*zip(*way, strict=True), color=colour, alpha=0.3, zorder=0)
        ax.set(xscale="log", xlabel="KV cache, MiB", ylabel=label)
        ticks = sorted({round(row["cache_bytes"] / MIB) for row in rows})
        ax.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
        ax.minorticks_off()
        ax.legend(frameon=False, fontsize=8)
    axes[1].set_ylim(bottom=0)
    return figure


def parts_by_length(rows: Rows) -> Any:
    """Milliseconds of each part forward, of the whole with gradients, and memory."""
    rows = [row for row in rows if row["table"] == "parts"]
    if not rows:
        return None
    peaks = {"forward": "peak_mib", "with gradients": "train_peak_mib"}
    measured = any(row.get(key) for row in rows for key in peaks.values())
    figure, (forward, train, *memory) = _axes(3 if measured else 2)
    parts = ("scorer", "selection", "attention", "sparse", "dense")
    _lines(forward, rows, "length", {part: part for part in parts}, "forward (ms)")
    gradients = {"sparse": "train", "dense": "dense_train"}
    _lines(train, rows, "length", gradients, "with gradients (ms)")
    for ax in memory:
        _lines(ax, rows, "length", peaks, "sparse, peak memory (MiB)")
    return figure


def time_by_k(rows: Rows) -> Any:
    """Milliseconds by k, one line per length, forward and with gradients."""
    rows = [row for row in rows if row["table"] == "k"]
    if not rows:
        return None
    figure, (forward, train) = _axes(2)
    lengths = sorted({row["length"] for row in rows})
    for ax, key, label in (
        (forward, "sparse", "forward"), (train, "train", "with gradients"),
    ):  # fmt: skip
        series = {
            f"{n:,} tokens": lambda row, n=n, key=key: row[key] if row["length"] == n else None
            for n in lengths
        }
        _lines(ax, rows, "k", series, f"{label} (ms)")
    return figure


def ablations(rows: Rows) -> Any:
    """Share of the gap closed, and recall in known and unknown phrasings, one bar per row."""
    rows = [row for row in rows if row.get("closed") is not None and row["row"] != "window"]
    rows = [row for row in rows if row["row"] not in (DENSE, "random")]
    if not rows:
        return None
    figure, (left, right) = _axes(2, height=0.9 + 0.24 * len(rows))
    names = [row["row"] for row in rows]
    places = list(range(len(rows)))
    default = next((row["closed"] for row in rows if row["row"] == "default"), None)
    left.barh(places, [row["closed"] for row in rows], color=plots.COLOURS["sparsek"], height=0.6)
    if default is not None:
        left.axvline(default, color=plots.COLOURS[DENSE], linewidth=0.8, linestyle="--")
    left.set_xlabel("loss between window and dense closed (%)")
    for number, split in enumerate(("calibration", "held_out")):
        values = [list(row["recall"].get(split, {}).values()) for row in rows]
        means = [sum(found) / len(found) if found else 0 for found in values]
        shifted = [place + 0.17 * (2 * number - 1) for place in places]
        label = "known" if split == "calibration" else "unknown"
        right.barh(shifted, means, height=0.32, label=f"{label} phrasings")
    right.set_xlabel("recall (%), mean over numbers of facts")
    right.legend(frameon=False, fontsize=8, loc="lower left", bbox_to_anchor=(0, 1), ncols=2)
    for ax in (left, right):
        ax.margins(y=0.01)
        ax.set_yticks(places, names, fontsize=7)
        ax.invert_yaxis()
    return figure


def training_speed(rows: Rows) -> Any:
    """Tokens per second and peak memory of a training step by length."""
    figure, (speed, memory) = _axes(2)
    kinds = list(dict.fromkeys(row["attention"] for row in rows))
    for ax, key, label in (
        (speed, "tokens_per_s", "tokens per second"), (memory, "peak_gib", "peak (GiB)"),
    ):  # fmt: skip
        series = {
            kind: lambda row, kind=kind, key=key: row[key] if row["attention"] == kind else None
            for kind in kinds
        }
        _lines(ax, rows, "length", series, label)
    return figure


if __name__ == "__main__":
    main()
