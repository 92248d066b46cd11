"""report.html: one file with the table, the plots and the proof; no script, nothing fetched."""

import io
import json
import re
from collections.abc import Iterator
from importlib import resources
from typing import Any

from sparsek_cli.byte_units import size
from sparsek_cli.evaluation.report import plots, table
from sparsek_cli.evaluation.report.notes import notes
from sparsek_cli.evaluation.report.numbers_as_text import beside_dense, number
from sparsek_cli.evaluation.report.rows import rows

# A cell of a table: text, or what page.html.j2 writes as a score.
Cell = str | dict[str, Any]


def page(report: dict[str, Any]) -> str:
    """The whole report as one HTML document; the template escapes what it is given."""
    from jinja2 import Environment, StrictUndefined

    text = resources.files(__package__).joinpath("page.html.j2").read_text(encoding="utf-8")
    template = Environment(autoescape=True, undefined=StrictUndefined).from_string(text)
    policies = report["policies"]
    return template.render(
        name=report["model"]["name"],
        title=table.title(report),
        score_head=["task", "metric", "tokens", "n", *policies],
        scores=list(_scores(report)),
        notes=notes(report),
        figures=list(_figures(report)),
        proof_head=[
            "task", "policy", "backend", "SparseK calls", "pairs held", "share of all", "KV bytes",
            "after tokens", "prompts cut",
        ],
        proof=list(_proof(report)),
        settings=_settings(report),
    ) + "\n"  # fmt: skip


def _scores(report: dict[str, Any]) -> Iterator[list[Cell]]:
    policies = report["policies"]
    for row in rows(report):
        metric = _cell(row["metric"], lower=not row["higher_is_better"])
        cells = [_score(row, row["cells"].get(name)) for name in policies]
        samples = next(iter(row["cells"].values()))["samples"]
        yield [row["task"], metric, str(row["length"] or "data"), str(samples), *cells]
    for task, tokens, _, metric, *cells in table.byte_rows(report):
        yield [task, metric, tokens, "", *cells]


def _score(row: dict[str, Any], cell: dict[str, Any] | None) -> Cell:
    if cell is None:
        return "-"
    stderr, delta = cell["stderr"], cell["delta"]
    return _cell(
        number(cell["value"]),
        stderr=None if stderr is None else number(stderr),
        delta=None if delta is None else beside_dense(cell),
        better=delta == 0 or (delta is not None and (delta >= 0) == row["higher_is_better"]),
    )


def _cell(value: str, **more: Any) -> Cell:
    return {"value": value, "lower": False, "stderr": None, "delta": None, "better": False, **more}


def _figures(report: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Captions, and figures as SVG."""
    for name, figure in plots.figures(report).items():
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None})
        svg = buffer.getvalue()
        svg = svg[svg.index("<svg") :]  # without the XML prologue, which HTML does not know
        # Two figures in one page must not share the names of their clip paths and glyphs.
        svg = re.sub(r'(id="|href="#|url\(#)', rf"\g<1>{name}-", svg)
        yield name.replace("_", " ").capitalize(), svg


def _proof(report: dict[str, Any]) -> Iterator[list[str]]:
    for unit in report["units"]:
        proof = unit["proof"]
        yield [
            unit["task"] if unit["length"] is None else f"{unit['task']}@{unit['length']}",
            unit["policy"],
            ", ".join(proof["backends"]) or "dense",
            f"{proof['sparse_calls']:,}",
            f"{proof['kv_pairs']:,}",
            f"{proof['kept_share']:.2%}",
            size(proof["kv_bytes"]),
            f"{proof['kv_tokens']:,}",
            f"{proof['truncated_prompts']} of {proof['prompts']}",
        ]


def _settings(report: dict[str, Any]) -> str:
    keys = ("recipe", "environment", "model", "soundness", "fingerprint")
    return json.dumps({key: report[key] for key in keys}, indent=2, default=str)
