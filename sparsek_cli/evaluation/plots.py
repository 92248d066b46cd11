"""Figures of a result folder, as PNG and SVG."""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sparsek_cli.evaluation.policies import DENSE
from sparsek_cli.evaluation.store import write_atomically

COLOURS = {"dense": "#222222", "sparsek": "#d1495b", "window": "#2e86ab", "random": "#8d99ae"}
OTHERS = ("#edae49", "#66a182", "#6a4c93", "#00798c", "#b56576")


def write_plots(folder: Path, report: dict[str, Any]) -> list[Path]:
    """Every figure the results have data for; returns the files written."""
    written = []
    for name, figure in figures(report).items():
        for kind in ("png", "svg"):
            buffer = io.BytesIO()
            # No date inside: the same results give the same bytes.
            metadata = {"Software": None} if kind == "png" else {"Date": None}
            figure.savefig(buffer, format=kind, dpi=150, metadata=metadata)
            write_atomically(folder / f"{name}.{kind}", buffer.getvalue())
            written.append(folder / f"{name}.{kind}")
    return written


def figures(report: dict[str, Any]) -> dict[str, Any]:
    """Figures by name; only those with data."""
    found = {
        "score_by_budget": score_by_budget(report),
        "recall_by_depth": recall_by_depth(report),
        "loss_by_position": loss_by_position(report),
    }
    return {name: figure for name, figure in found.items() if figure is not None}


def _new_figure(
    columns: int, rows: int = 1, width: float = 4.4, height: float = 3.4
) -> tuple[Any, Any]:
    # A Figure of its own: pyplot keeps global state and may look for a display.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(1.2 + width * columns, 0.4 + height * rows), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, columns, squeeze=False)
    for ax in axes.flat:
        ax.spines[["top", "right"]].set_visible(False)
        ax.grid(alpha=0.25, linewidth=0.6)
    return figure, axes


def colour(policy: str, policies: Sequence[str]) -> str:
    """A policy's colour, the same in every figure and at every budget."""
    name = _base(policy)
    if name in COLOURS:
        return COLOURS[name]
    others = list(dict.fromkeys(n for n in map(_base, policies) if n not in COLOURS))
    return OTHERS[others.index(name) % len(OTHERS)]


def _base(policy: str) -> str:
    """A policy's name without its budget."""
    name, _, budget = policy.rpartition("-")
    return name if budget.isdigit() else policy


def _stroke(policy: str, policies: Sequence[str]) -> Any:
    """A line style that tells the budgets of one policy apart."""
    same = [p for p in policies if _base(p) == _base(policy)]
    return ("-", (0, (5, 2)), (0, (1.5, 1.5)), (0, (6, 2, 1, 2)))[same.index(policy) % 4]


def loss_by_position(report: dict[str, Any]) -> Any:
    """Loss against position, one column per length; below it, the difference to dense."""
    units = [unit for unit in report["units"] if "loss_by_position" in unit]
    if not units:
        return None
    lengths = sorted({unit["length"] for unit in units})
    dense = {u["length"]: u["loss_by_position"] for u in units if u["policy"] == DENSE}
    figure, axes = _new_figure(len(lengths), 2 if dense and len(units) > len(dense) else 1)
    for column, length in enumerate(lengths):
        top = axes[0, column]
        for unit in (u for u in units if u["length"] == length):
            curve, name = unit["loss_by_position"], unit["policy"]
            style = {
                "color": colour(name, report["policies"]),
                "linestyle": _stroke(name, report["policies"]),
                "linewidth": 1.6,
                "label": name,
            }
            top.plot(curve["position"], curve["loss"], **style)
            if len(axes) > 1 and name != DENSE and length in dense:
                gap = [a - b for a, b in zip(curve["loss"], dense[length]["loss"], strict=True)]
                axes[1, column].plot(curve["position"], gap, **style)
        top.set_title(f"{length:,} tokens", fontsize=10)
        top.set_ylabel("loss (nats per token)")
        if len(axes) > 1:
            axes[1, column].axhline(0, color=COLOURS["dense"], linewidth=0.8)
            axes[1, column].set_ylabel("loss above dense")
        axes[-1, column].set_xlabel("position (tokens)")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right upper", frameon=False, fontsize=8)
    figure.suptitle(f"{report['model']['name']}: loss by position", fontsize=11)
    return figure


DEPTHS = 5  # bands of depth in the heat map


def recall_by_depth(report: dict[str, Any]) -> Any:
    """Share of facts found, depth in the document against its length, one panel per policy."""
    units = [unit for unit in report["units"] if unit.get("by_depth")]
    if not units:
        return None
    lengths = sorted({unit["length"] for unit in units})
    policies = [p for p in report["policies"] if any(u["policy"] == p for u in units)]
    columns = min(4, len(policies))
    rows = -(-len(policies) // columns)
    figure, axes = _new_figure(columns, rows, width=2.2 + 0.35 * len(lengths), height=2.9)
    image = None
    for ax, policy in zip(axes.flat, policies, strict=False):
        share = _found_share([u for u in units if u["policy"] == policy], lengths)
        image = ax.imshow(share, vmin=0, vmax=1, cmap="RdYlGn", aspect="auto", origin="upper")
        for (row, column), value in _cells(share):
            if value == value:
                ink = "white" if value > 0.85 or value < 0.15 else "black"
                ax.text(
                    column, row, f"{value:.0%}", color=ink, ha="center", va="center", fontsize=7
                )
        ax.set_xticks(range(len(lengths)), [f"{n:,}" for n in lengths], fontsize=7, rotation=30)
        bands = [f"{100 * i // DEPTHS}-{100 * (i + 1) // DEPTHS}%" for i in range(DEPTHS)]
        ax.set_yticks(range(DEPTHS), bands, fontsize=7)
        ax.grid(False)
        ax.set_title(policy, fontsize=10)
        ax.set_xlabel("tokens", fontsize=8)
    for ax in list(axes.flat)[len(policies) :]:
        ax.set_visible(False)
    axes[0, 0].set_ylabel("depth of the fact", fontsize=8)
    figure.colorbar(image, ax=axes, shrink=0.8, label="answered exactly")
    figure.suptitle(f"{report['model']['name']}: facts found", fontsize=11)
    return figure


def _found_share(units: Sequence[dict[str, Any]], lengths: Sequence[int]) -> Any:
    """[DEPTHS, lengths] mean score; NaN where nothing was asked."""
    import numpy as np

    total = np.zeros((DEPTHS, len(lengths)))
    count = np.zeros_like(total)
    for unit in units:
        column = lengths.index(unit["length"])
        for depth, score, *_ in unit["by_depth"]:
            band = min(int(depth * DEPTHS), DEPTHS - 1)
            total[band, column] += score
            count[band, column] += 1
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)


def _cells(grid: Any) -> Any:
    import numpy as np

    return np.ndenumerate(grid)


def score_by_budget(report: dict[str, Any]) -> Any:
    """Each task's primary metric against pairs kept per KV head; dense as a level line."""
    swept = [u for u in report["units"] if u.get("budget")]
    if len({unit["budget"] for unit in swept}) < 2:
        return None
    panels = list(dict.fromkeys((unit["task"], unit["length"]) for unit in swept))
    columns = min(3, len(panels))
    figure, axes = _new_figure(columns, -(-len(panels) // columns), width=3.9, height=3.0)
    names = list(dict.fromkeys(_base(unit["policy"]) for unit in swept))
    for ax, (task, length) in zip(axes.flat, panels, strict=False):
        here = [u for u in report["units"] if (u["task"], u["length"]) == (task, length)]
        for unit in (u for u in here if u["policy"] == DENSE):
            level = unit["metrics"][unit["primary"]]["value"]
            ax.axhline(level, color=COLOURS[DENSE], linewidth=1.2, linestyle="--", label=DENSE)
        for name in names:
            points = sorted(
                (u["budget"], u["metrics"][u["primary"]])
                for u in here
                if u.get("budget") and _base(u["policy"]) == name
            )
            ax.errorbar(
                [budget for budget, _ in points],
                [metric["value"] for _, metric in points],
                yerr=[metric["stderr"] or 0 for _, metric in points],
                color=colour(name, names),
                marker="o",
                markersize=4,
                linewidth=1.6,
                capsize=2,
                label=name,
            )
        budgets = sorted({u["budget"] for u in here if u.get("budget")})
        ax.set_xscale("log", base=2)
        ax.set_xticks(budgets, [f"{b:,}" for b in budgets], fontsize=8)
        ax.minorticks_off()
        ax.set_title(task if length is None else f"{task}, {length:,} tokens", fontsize=9)
        ax.set_ylabel(next(u["primary"] for u in here), fontsize=8)
        ax.set_xlabel("pairs kept per KV head", fontsize=8)
    for ax in list(axes.flat)[len(panels) :]:
        ax.set_visible(False)
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right upper", frameon=False, fontsize=8)
    figure.suptitle(f"{report['model']['name']}: score against budget", fontsize=11)
    return figure
