"""The results of `failfast bench` as one HTML file, which loads nothing. Needs matplotlib."""

import base64
from html import escape
from typing import Any

from failfast_vllm.tools import plots
from failfast_vllm.tools.report import Table, facts, full_table, speedups_table

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
th { vertical-align: bottom }
.all :is(th, td):nth-child(2) { position: sticky; left: 0; background: Canvas; text-align: left }
img { width: 100%; max-width: 44rem; background: white }
dl { columns: 24rem }
dt { break-after: avoid; font-weight: bold }
dd { break-inside: avoid; margin: 0 0 .5rem; overflow-wrap: anywhere }
</style></head><body>
<h1>failfast bench</h1>
"""


def page(result: dict[str, Any]) -> str:
    """The page: speed-ups, all figures as pictures and in numbers, and where they come from."""
    rows, source = result["rows"], result["provenance"]
    summary = "; ".join(str(source.get(key)) for key in ("target", "dtype", "device", "date"))
    parts = [PAGE, f"<p>{escape(summary)}</p>", "<h2>Speed-up</h2>", _html(speedups_table(rows))]
    for title, svg in plots.draw(result).items():
        data = f"data:image/svg+xml;base64,{base64.b64encode(svg).decode()}"
        parts.append(f'<h2>{title}</h2><div><img alt="" src="{data}"></div>')
    parts += ["<h2>All figures</h2>", _html(full_table(rows), "all")]
    parts += ["<h2>Where they come from</h2>", "<dl>"]
    parts += [f"<dt>{escape(key)}</dt><dd>{escape(value)}</dd>" for key, value in facts(result)]
    return "\n".join([*parts, "</dl></body></html>\n"])


def _html(table: Table, look: str = "") -> str:
    titles, lines = table
    head = "".join(f"<th>{escape(title)}</th>" for title in titles)
    body = ("".join(f"<td>{escape(cell)}</td>" for cell in line) for line in lines)
    rows = "\n".join(f"<tr>{cells}</tr>" for cells in (head, *body))
    return f'<div><table class="{look}">{rows}</table></div>'
