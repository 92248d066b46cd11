"""Figures of a result folder, as PNG and SVG."""

import io
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparsek_cli.disk import write_atomically
from sparsek_cli.evaluation.policies.registry import DENSE

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
        "score_by_length": score_by_length(report),
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
    number = same.index(policy) if policy in same else 0  # a name alone stands for all its budgets
    return ("-", (0, (5, 2)), (0, (1.5, 1.5)), (0, (6, 2, 1, 2)))[number % 4]


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
    rows = -(-len(policies) // 4)
    columns = -(-len(policies) // rows)  # five are three and two, not four and one
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
    tasks = list(dict.fromkeys(unit["task"] for unit in units))
    where = ", ".join(tasks) if len(tasks) <= 3 else f"{len(tasks)} tasks"
    figure.suptitle(f"{report['model']['name']}: facts found in {where}", fontsize=11)
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
    panels = []
    for task, length in dict.fromkeys((unit["task"], unit["length"]) for unit in swept):
        here = [u for u in report["units"] if (u["task"], u["length"]) == (task, length)]
        title = task if length is None else f"{task}, {length:,} tokens"
        lines = _lines([u for u in here if u.get("budget")], "budget", _base)
        level = [_primary(u)["value"] for u in here if u["policy"] == DENSE]
        panels.append(Panel(title, here[0]["primary"], lines, level[0] if level else None))
    return _score_panels(report, panels, "pairs kept per KV head", "score against budget")


def score_by_length(report: dict[str, Any]) -> Any:
    """Each task's primary metric against the length of its prompts."""
    panels = []
    for task in dict.fromkeys(unit["task"] for unit in report["units"]):
        here = [u for u in report["units"] if u["task"] == task and u["length"] is not None]
        if len({unit["length"] for unit in here}) > 1:
            panels.append(Panel(task, here[0]["primary"], _lines(here, "length", str)))
    if not panels:
        return None
    return _score_panels(report, panels, "tokens", "score against length")


@dataclass
class Panel:
    """One task's curves.

    Attributes:
        title, metric: above it, and beside it.
        lines: {policy: [(x, value, standard error)]}, x rising.
        level: the dense score where it does not depend on x.
    """

    title: str
    metric: str
    lines: dict[str, list[tuple[int, float, float]]]
    level: float | None = None


def _lines(
    units: Sequence[dict[str, Any]], key: str, name_of: Callable[[str], str]
) -> dict[str, list[tuple[int, float, float]]]:
    lines: dict[str, list[tuple[int, float, float]]] = {}
    for unit in sorted(units, key=lambda u: u[key]):
        found = _primary(unit)
        point = (unit[key], found["value"], found["stderr"] or 0.0)
        lines.setdefault(name_of(unit["policy"]), []).append(point)
    return lines


def _primary(unit: dict[str, Any]) -> dict[str, Any]:
    return unit["metrics"][unit["primary"]]


def _score_panels(report: dict[str, Any], panels: Sequence[Panel], xlabel: str, title: str) -> Any:
    """A figure with a panel per task and a line with error bars per policy; x in powers of two."""
    columns = min(3, len(panels))
    figure, axes = _new_figure(columns, -(-len(panels) // columns), width=3.9, height=3.0)
    shown: dict[str, Any] = {}
    for ax, panel in zip(axes.flat, panels, strict=False):
        if panel.level is not None:
            shown[DENSE] = ax.axhline(
                panel.level, color=COLOURS[DENSE], linewidth=1.2, linestyle="--"
            )
        for name in _in_order(report, panel.lines):
            x, value, error = zip(*panel.lines[name], strict=True)
            style = {
                "color": colour(name, report["policies"]),
                "linestyle": _stroke(name, report["policies"]),
            }
            shown[name] = ax.errorbar(
                x, value, yerr=error, marker="o", markersize=4, linewidth=1.6, capsize=2, **style
            )
        points = [point for line in panel.lines.values() for point in line]
        if not any(value for _, value, _ in points):
            ax.set_ylim(-0.05, 1.05)  # an axis of thousandths around 0 would look like something
        ticks = sorted({place for place, _, _ in points})
        ax.set_xscale("log", base=2)
        ax.set_xticks(ticks, [f"{tick:,}" for tick in ticks], fontsize=8)
        ax.minorticks_off()
        ax.set_title(panel.title, fontsize=9)
        ax.set_ylabel(panel.metric, fontsize=8)
        ax.set_xlabel(xlabel, fontsize=8)
    for ax in list(axes.flat)[len(panels) :]:
        ax.set_visible(False)
    figure.legend(
        shown.values(), shown.keys(), loc="outside right upper", frameon=False, fontsize=8
    )
    figure.suptitle(f"{report['model']['name']}: {title}", fontsize=11)
    return figure


def _in_order(report: dict[str, Any], lines: Iterable[str]) -> list[str]:
    """Names of lines in the order of the report's policies."""
    order = list(dict.fromkeys(n for p in report["policies"] for n in (p, _base(p))))
    return sorted(lines, key=order.index)
