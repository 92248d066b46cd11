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
    found = {"loss_by_position": loss_by_position(report)}
    return {name: figure for name, figure in found.items() if figure is not None}


def _new_figure(columns: int, rows: int = 1, height: float = 3.4) -> tuple[Any, Any]:
    # A Figure of its own: pyplot keeps global state and may look for a display.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(1.2 + 4.4 * columns, height * rows), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, columns, squeeze=False)
    for ax in axes.flat:
        ax.spines[["top", "right"]].set_visible(False)
        ax.grid(alpha=0.25, linewidth=0.6)
    return figure, axes


def colour(policy: str, policies: Sequence[str]) -> str:
    """A policy's colour; the same policy always has the same one."""
    if policy in COLOURS:
        return COLOURS[policy]
    return OTHERS[[p for p in policies if p not in COLOURS].index(policy) % len(OTHERS)]


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
            style = {"color": colour(name, report["policies"]), "linewidth": 1.6, "label": name}
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
    axes[0, 0].legend(frameon=False, fontsize=8)
    figure.suptitle(f"{report['model']['name']}: loss by position", fontsize=11)
    return figure
