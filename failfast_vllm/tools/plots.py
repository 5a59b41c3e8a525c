"""The figures of `failfast bench`, drawn from its results alone. Needs matplotlib."""

import io
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

Row = dict[str, Any]

# Okabe and Ito, safe for the colour-blind; without their yellow, which is too light for lines
COLORS = ("#000000", "#E69F00", "#56B4E9", "#009E73", "#D55E00", "#CC79A7", "#0072B2")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*", "<", ">", "h")  # told apart without colours


def draw(result: dict[str, Any]) -> dict[str, bytes]:
    """Title -> SVG: throughput, and the first answer's rounds where the results hold them."""
    rows = result["rows"]
    lowest = min(row["concurrency"] for row in rows)
    first = [row for row in rows if row["concurrency"] == lowest and row.get("trajectory")]
    with matplotlib.rc_context({"text.parse_math": False}):
        found = {"Throughput against interactivity": _svg(throughput(rows))}
        if first:
            found[f"The first answer at concurrency {lowest}"] = _svg(trajectory(first))
    return found


def _svg(figure: Figure) -> bytes:
    file = io.BytesIO()
    figure.savefig(file, format="svg")
    return file.getvalue()


def throughput(rows: list[Row]) -> Figure:
    """Tokens per second of the server against those of one request; up and right is better."""
    figure = Figure(figsize=(5.5, 4), layout="constrained")
    axes = figure.add_subplot()
    _clean(axes)
    first, *_ = names = list(dict.fromkeys(row["method"] for row in rows))
    for i, name in enumerate(names):
        points = [row for row in rows if row["method"] == name]
        x = [row["tokens_per_second_per_request"] for row in points]
        y = [row["tokens_per_second"] for row in points]
        look: dict[str, Any] = {
            "clip_on": False,
            "color": COLORS[i % len(COLORS)],
            "marker": MARKERS[i % len(MARKERS)],
            "linestyle": ("-", "--", ":")[i // len(COLORS) % 3],
        }
        axes.plot(x, y, label=name, markersize=5, linewidth=1.5, **look)
        for row, *point in zip(points, x, y, strict=True) if name == first else ():
            place: dict[str, Any] = {"textcoords": "offset points", "ha": "right", "fontsize": 7}
            axes.annotate(str(row["concurrency"]), (point[0], point[1]), (-6, -6), **place)
    text = f"tokens/s of a request (numbers beside {first}: concurrency)"
    axes.set(xlabel=text, ylabel="tokens/s of all requests", xlim=(0, None), ylim=(0, None))
    axes.legend(fontsize=8, frameon=False)
    return figure


def trajectory(rows: list[Row]) -> Figure:
    """One answer, round by round, a panel per method: up what was emitted, down the rejected."""
    figure = Figure(figsize=(5.5, 0.9 + 1.4 * len(rows)), layout="constrained")
    panels = figure.subplots(len(rows), squeeze=False, sharex=True, sharey=True)[:, 0]
    for axes, row in zip(panels, rows, strict=True):
        rounds = row["trajectory"]
        accepted, bonus = ([r[kind] for r in rounds] for kind in ("accepted", "bonus"))
        x = range(len(rounds))
        axes.bar(x, accepted, color="#0072B2", label="accepted")
        copied = [r.get("copied", 0) for r in rounds]
        axes.bar(x, bonus, bottom=accepted, color="#E69F00", label="bonus")
        if any(copied):
            drafted = [a - c for a, c in zip(accepted, copied, strict=True)]
            axes.bar(x, copied, bottom=drafted, color="#009E73", label="of them copied")
        axes.bar(x, [-r["rejected"] for r in rounds], color="#BBBBBB", label="rejected")
        axes.axhline(0, color="black", linewidth=0.6)
        num_tokens = sum(accepted) + sum(bonus)
        text = f"{row['method']}: {num_tokens} tokens in {len(rounds)} rounds"
        axes.set_title(text, loc="left", fontsize=9)
        axes.yaxis.set_major_formatter(lambda value, _: f"{abs(value):.0f}")
        axes.set_ylabel("tokens", fontsize=9)
        _clean(axes)
    panels[0].set_xlim(-0.7, max(len(row["trajectory"]) for row in rows) - 0.3)
    found = (axes.get_legend_handles_labels() for axes in panels)
    names = {label: bar for bars, labels in found for bar, label in zip(bars, labels, strict=True)}
    place: dict[str, Any] = {"loc": "outside lower center", "ncols": 4, "frameon": False}
    figure.legend(names.values(), names, fontsize=8, **place)
    panels[-1].set_xlabel("round", fontsize=9)
    return figure


def _clean(axes: Axes) -> None:
    axes.grid(color="#E5E5E5", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
