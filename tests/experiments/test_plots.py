"""Every experiment's rows become figures; what cannot be drawn is refused."""

import json
import sys
from pathlib import Path

import pytest

from experiments import budgets, plots
from experiments.plots import draw, figures
from sparsek_cli.errors import UsageError

RESULTS = Path(__file__).parents[2] / "docs" / "results"
RECALL = {"calibration": {"4": 50.0}, "held_out": {"4": 100.0}}
PARTS = {"scorer": 0.1, "selection": 1.0, "attention": 2.0, "sparse": 3.0, "dense": 9.0}
TRAIN = {"train": 9.0, "dense_train": 30.0, "peak_mib": 10.0, "train_peak_mib": 40.0}


def budget(policy, share, slots, loss):
    curve = [loss + 0.1 * i for i in range(4)]
    depths = {"512": [[0.1, 1], [0.9, 0]], "1024": [[0.5, 1]]}
    return {"policy": policy, "share": share, "slots": slots, "loss_last": loss, "recall": RECALL,
            "loss_by_position": curve, "by_depth": depths}  # fmt: skip


ROWS = {
    "budgets": [budget("dense", None, 1024, 3.0), budget("window", 16, 64, 4.0),
                budget("sparsek", 16, 64, 3.5), budget("sparsek", 8, 128, 3.2)],
    "conversion": [
        {"model": model, "policy": policy, "slots": slots, "loss_last": 3.0, "recall": RECALL,
         "loss_by_position": [4.0, 3.0]}
        for model, policy, slots in [("calibrated", "dense", 1024), ("calibrated", "window", 64),
                                     ("calibrated", "sparsek", 64), ("all", "sparsek", 128)]
    ],
    "scratch": [{"model": name, "loss_by_position": {"512": [4.0, 3.0], "1024": [4.0, 3.5]}}
                for name in ("dense", "sparsek")],
    "ablations": [{"row": name, "closed": closed, "recall": RECALL}
                  for name, closed in [("dense", None), ("default", 40.0), ("slope-0", -3.0)]],
    "cost": [{"table": table, "length": length, "k": 64, **PARTS, **TRAIN}
             for table in ("parts", "k") for length in (8192, 32_768)],
    "smollm2": json.loads((RESULTS / "smollm2" / "results.json").read_text())["rows"],
    "speed": [{"attention": kind, "length": 8192, "tokens_per_s": 10, "peak_gib": 3.0}
              for kind in ("flash", "sparsek")],
}  # fmt: skip
DRAWN = {
    "budgets": ["score_by_budget", "recall_by_depth", "loss_by_position"],
    "conversion": ["score_by_budget", "loss_by_position"],
    "scratch": ["loss_by_position"],
    "ablations": ["ablations"],
    "cost": ["by_length", "by_k"],
    "speed": ["tokens"],
    "smollm2": ["by_bytes"],
}


def lines_of(axes):
    """What each line shows, by its label."""
    return {line.get_label(): line.get_ydata().tolist() for line in axes.get_lines()}


QUICK = ("cost", "scratch", "smollm2")


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n in QUICK else pytest.mark.slow) for n in ROWS]
)
def test_results_become_files(name, tmp_path, monkeypatch, capsys):
    place = tmp_path / name
    place.mkdir()
    (place / "results.json").write_text(json.dumps({"rows": ROWS[name]}))
    monkeypatch.setattr(sys, "argv", ["plots", str(tmp_path / "figures"), str(place)])
    plots.main()
    expected = {f"{name}-{figure}.{kind}" for figure in DRAWN[name] for kind in ("png", "svg")}
    assert {file.name for file in (tmp_path / "figures").iterdir()} == expected
    assert len(capsys.readouterr().out.splitlines()) == len(expected)


def test_figures_show_what_was_measured():
    made = figures(ROWS["budgets"], "a")
    loss = made["score_by_budget"].axes[0]
    shown = [(*line.get_xdata(), *line.get_ydata()) for line in loss.get_lines()]
    assert (64, 128, 3.5, 3.2) in shown and (64, 4.0) in shown
    curves = lines_of(made["loss_by_position"].axes[0])
    assert curves["sparsek"] == [3.5, 3.6, 3.7, 3.8] and curves["dense"][0] == 3.0
    loss, needles = figures(ROWS["smollm2"], "a")["by_bytes"].axes
    assert lines_of(loss)["window, 4,096 tokens"] == [3.603, 3.534]
    assert lines_of(needles)["sparsek, 4,096 tokens"] == [0.521, 0.569, 0.602]
    assert "snapkv, 4,096 tokens" in lines_of(needles) and "snapkv, 4,096 tokens" not in lines_of(
        loss
    )
    assert loss.get_xlabel() == "KV cache, MiB" and loss.get_xticks().tolist() == [
        6,
        12,
        24,
        90,
        180,
    ]
    parts = lines_of(figures(ROWS["cost"], "a")["by_length"].axes[0])
    assert parts["scorer"] == [0.1, 0.1] and parts["dense"] == [9.0, 9.0]


def test_nothing_to_draw_is_said(tmp_path):
    with pytest.raises(UsageError, match="no results in"):
        draw(tmp_path, tmp_path / "figures")
    (tmp_path / "results.json").write_text(json.dumps({"rows": []}))
    with pytest.raises(UsageError, match="holds nothing to draw"):
        draw(tmp_path, tmp_path / "figures")
    assert not (tmp_path / "figures").exists()


@pytest.mark.slow
def test_budgets_from_conversion_to_figure(novels, tmp_path, monkeypatch):
    out = tmp_path / "out"
    words = ["--held-out", novels[1], "--smoke", "--device", "cpu", "--shares", "16", "4"]
    monkeypatch.setattr(sys, "argv", ["budgets", str(out), *words])
    budgets.main()
    rows = json.loads((out / "results.json").read_text())["rows"]
    assert [(row["share"], row["policy"]) for row in rows] == [
        (None, "dense"), *((share, policy) for share in (16, 4) for policy in budgets.POLICIES),
    ]  # fmt: skip
    assert rows[1]["closed"] == 0 and rows[3]["slots"] == 64 and rows[6]["slots"] == 256
    assert set(rows[3]["by_depth"]) == {"256", "512", "1024"}
    assert len(draw(out, tmp_path / "figures")) == 6
