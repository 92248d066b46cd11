"""report.html: one file with the table, the plots and the proof; no script, nothing fetched."""

import io
import re
from collections.abc import Iterable, Sequence
from html import escape
from typing import Any

from sparsek_cli.evaluation.report import plots, table

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 75rem;
       padding: 0 1rem; color: #222; background: #fff; }
h1 { font-size: 1.4rem; } h2 { font-size: 1.1rem; margin-top: 2.2rem; }
div.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: 0.87rem; }
th, td { padding: 0.25rem 0.7rem; border-bottom: 1px solid #e3e3e3; text-align: right;
         white-space: nowrap; }
th { border-bottom: 2px solid #999; } td.word, th.word { text-align: left; }
small { color: #666; } .better { color: #18794e; } .worse { color: #b42318; }
svg { max-width: 100%; height: auto; } pre { background: #f6f6f6; padding: 0.8rem;
      overflow-x: auto; font-size: 0.8rem; } p.note { color: #555; }
"""


def page(report: dict[str, Any]) -> str:
    """The whole report as one HTML document."""
    name = escape(report["model"]["name"])
    parts = [
        "<!doctype html>",
        '<html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f'<link rel="icon" href="data:,"><title>{name}: evaluation</title>',
        f"<style>{STYLE}</style></head><body>",
        f"<h1>{escape(table.title(report))}</h1>",
        "<h2>Scores</h2>",
        _scores(report),
        *(f'<p class="note">{escape(note)}</p>' for note in table.notes(report)),
        *_figures(report),
        "<h2>What ran</h2>",
        _proof(report),
        "<h2>Settings</h2>",
        f"<pre>{escape(_settings(report))}</pre>",
        "</body></html>",
    ]
    return "\n".join(parts) + "\n"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]], words: int) -> str:
    """An HTML table whose first `words` columns are text; cells are HTML already."""

    def line(tag: str, cells: Sequence[str]) -> str:
        marked = (
            f'<{tag} class="word">{cell}</{tag}>' if i < words else f"<{tag}>{cell}</{tag}>"
            for i, cell in enumerate(cells)
        )
        return "<tr>" + "".join(marked) + "</tr>"

    body = "\n".join(line("td", row) for row in rows)
    return (
        f'<div class="wide"><table><thead>{line("th", head)}</thead>\n'
        f"<tbody>{body}</tbody></table></div>"
    )


def _scores(report: dict[str, Any]) -> str:
    policies = report["policies"]
    lines = []
    for row in table.rows(report):
        arrow = "" if row["higher_is_better"] else " <small>(lower)</small>"
        cells = [_score(row, row["cells"].get(name)) for name in policies]
        samples = next(iter(row["cells"].values()))["samples"]
        where = [escape(row["task"]), escape(row["metric"]) + arrow]
        lines.append([*where, str(row["length"] or "data"), str(samples), *cells])
    for task, tokens, _, metric, *cells in table.byte_rows(report):
        lines.append([escape(task), escape(metric), tokens, "", *map(escape, cells)])
    head = ["task", "metric", "tokens", "n", *map(escape, policies)]
    return _table(head, lines, words=2)


def _score(row: dict[str, Any], cell: dict[str, Any] | None) -> str:
    if cell is None:
        return "-"
    text = table.number(cell["value"])
    if cell["stderr"] is not None:
        text += f" <small>±{table.number(cell['stderr'])}</small>"
    if cell["delta"] is not None:
        good = (cell["delta"] >= 0) == row["higher_is_better"] or cell["delta"] == 0
        kind = "better" if good else "worse"
        text += f' <span class="{kind}">{table.beside_dense(cell)}</span>'
    return text


def _figures(report: dict[str, Any]) -> list[str]:
    parts = []
    for name, figure in plots.figures(report).items():
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None})
        svg = buffer.getvalue()
        svg = svg[svg.index("<svg") :]  # without the XML prologue, which HTML does not know
        # Two figures in one page must not share the names of their clip paths and glyphs.
        svg = re.sub(r'(id="|href="#|url\(#)', rf"\g<1>{name}-", svg)
        parts += [f"<h2>{escape(name.replace('_', ' ').capitalize())}</h2>", svg]
    return parts


def _proof(report: dict[str, Any]) -> str:
    lines = []
    for unit in report["units"]:
        proof = unit["proof"]
        where = unit["task"] if unit["length"] is None else f"{unit['task']}@{unit['length']}"
        backends = ", ".join(proof["backends"]) or "dense"
        lines.append(
            [
                escape(where),
                escape(unit["policy"]),
                escape(backends),
                f"{proof['sparse_calls']:,}",
                f"{proof['kv_pairs']:,}",
                f"{proof['kept_share']:.2%}",
                table.size(proof["kv_bytes"]),
                f"{proof['kv_tokens']:,}",
                f"{proof['truncated_prompts']} of {proof['prompts']}",
            ]
        )
    head = ["task", "policy", "backend", "SparseK calls", "pairs held", "share of all", "KV bytes"]
    return _table([*head, "after tokens", "prompts cut"], lines, words=3)


def _settings(report: dict[str, Any]) -> str:
    import json

    keys = ("recipe", "environment", "model", "soundness", "fingerprint")
    return json.dumps({key: report[key] for key in keys}, indent=2, default=str)
