"""The results of `failfast bench` as one HTML file, which loads nothing. Needs matplotlib."""

import base64
import io
from html import escape
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from failfast_vllm.tools.report import Row, Table, facts, full_table, speedups_table

# the policy holds whatever the results contain: no scripts, no addresses
PAGE = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>failfast bench</title>
<style>
:root { color-scheme: light dark }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 72rem; margin: auto; padding: 1rem }
div { overflow-x: auto; margin-bottom: 2rem }
table { border-collapse: collapse; font-variant-numeric: tabular-nums }
th, td { padding: .3rem .6rem; text-align: right; border-bottom: 1px solid #8886 }
img { width: 100%; max-width: 44rem; background: white }
dd { margin: 0 0 .5rem; overflow-wrap: anywhere }
</style></head><body>
<h1>failfast bench</h1>
"""
# Okabe and Ito, safe for the colour-blind; without their yellow, which is too light for lines
COLORS = ("#000000", "#E69F00", "#56B4E9", "#009E73", "#D55E00", "#CC79A7", "#0072B2")
MARKERS = "os^DvPX*<>h"  # told apart without colours


def page(result: dict[str, Any]) -> str:
    """The page: speed-ups, throughput as a picture, all figures, and where they come from."""
    rows, source = result["rows"], result["provenance"]
    summary = "; ".join(str(source.get(key)) for key in ("target", "dtype", "device", "date"))
    parts = [PAGE, f"<p>{escape(summary)}</p>", "<h2>Speed-up</h2>", _html(speedups_table(rows))]
    with matplotlib.rc_context({"text.parse_math": False, "font.size": 8}):
        parts += ["<h2>Throughput against interactivity</h2>", throughput(rows)]
    parts += ["<h2>All figures</h2>", _html(full_table(rows))]
    parts += ["<h2>Where they come from</h2>", "<dl>"]
    parts += [f"<dt>{escape(key)}</dt><dd>{escape(value)}</dd>" for key, value in facts(result)]
    return "\n".join([*parts, "</dl></body></html>\n"])


def _html(table: Table) -> str:
    titles, lines = table
    head = "".join(f"<th>{escape(title)}</th>" for title in titles)
    body = ("".join(f"<td>{escape(cell)}</td>" for cell in line) for line in lines)
    rows = "\n".join(f"<tr>{cells}</tr>" for cells in (head, *body))
    return f"<div><table>{rows}</table></div>"


def throughput(rows: list[Row]) -> str:
    """Tokens per second of the server against those of one request; up and right is better."""
    figure, file = Figure(figsize=(5.5, 4), layout="constrained"), io.BytesIO()
    axes = figure.add_subplot()
    for i, name in enumerate(dict.fromkeys(row["method"] for row in rows)):
        points = [row for row in rows if row["method"] == name]
        x = [row["tokens_per_second_per_request"] for row in points]
        y = [row["tokens_per_second"] for row in points]
        axes.plot(x, y, label=name, color=COLORS[i % len(COLORS)], marker=MARKERS[i % len(MARKERS)])
        for row, *point in zip(points, x, y, strict=True) if i == 0 else ():
            axes.annotate(f"{row['concurrency']}  ", (point[0], point[1]), ha="right", va="top")
    text = f"tokens/s of a request (numbers beside {rows[0]['method']}: concurrency)"
    axes.set(xlabel=text, ylabel="tokens/s of all requests", xlim=(0, None), ylim=(0, None))
    axes.grid(color="#E5E5E5")
    axes.legend(frameon=False)
    figure.savefig(file, format="svg")
    data = base64.b64encode(file.getvalue()).decode()
    return f'<div><img alt="" src="data:image/svg+xml;base64,{data}"></div>'
