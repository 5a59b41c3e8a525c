"""The figures of `failfast bench`, drawn from its results alone. Needs matplotlib.

Counts by draft length, position and confidence are those of the lowest concurrency measured: under
load, drafts may get shorter.
"""

import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

Result = dict[str, Any]
Row = dict[str, Any]

# Okabe and Ito, safe for the colour-blind; without their yellow, which is too light for lines
COLORS = ("#000000", "#E69F00", "#56B4E9", "#009E73", "#D55E00", "#CC79A7", "#0072B2")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*", "<", ">", "h")  # told apart without colours
ACCEPTED, BONUS, REJECTED = "#0072B2", "#E69F00", "#BBBBBB"
NO_BREAK = "\u00a0"
FEW = 10  # a share of fewer tokens is left out


def draw(result: Result, folder: Path) -> list[Path]:
    """Write every figure that the results hold; returns the paths."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = result["rows"]
    styles = {name: style(i) for i, name in enumerate(dict.fromkeys(r["method"] for r in rows))}
    lowest = min(row["concurrency"] for row in rows)
    first = [row for row in rows if row["concurrency"] == lowest]
    paths = []
    for name, figure in (
        ("throughput", throughput(rows, styles)),
        ("draft_lengths", draft_lengths([r for r in first if r["draft_lengths"]], styles)),
        ("acceptance", acceptance([r for r in first if r["drafted_per_position"]], styles)),
        ("reliability", reliability([r for r in first if r["reliability"]], styles)),
        ("trajectory", trajectory([r for r in first if r["trajectory"]])),
    ):
        if figure is None:
            continue
        where = "" if name == "throughput" else f"concurrency {lowest}; "
        text = where + caption(result["provenance"])
        width = int(figure.get_figwidth() * 17)  # characters of this size in an inch
        figure.supxlabel(
            textwrap.fill(text, width, break_on_hyphens=False), fontsize=7, color="#555555"
        )
        paths.append(folder / f"{name}.png")
        figure.savefig(paths[-1], dpi=150)
    return paths


def caption(facts: dict[str, Any]) -> str:
    """Where the figures come from, on one line."""
    models = dict.fromkeys(filter(None, (facts["target"], facts.get("drafter"))))
    parts = [
        " and ".join(models),  # one name for the shipped pair
        facts.get("dtype"),
        facts["device"],
        f"vLLM {facts['vllm']}",
        f"failfast {facts['failfast_vllm']} (git {facts['git']})",
        facts["date"],
    ]
    return "; ".join(part.replace(" ", NO_BREAK) for part in parts if part)


def style(i: int) -> dict[str, Any]:
    """Line style of the i-th method."""
    return {
        "color": COLORS[i % len(COLORS)],
        "marker": MARKERS[i % len(MARKERS)],
        "linestyle": ("-", "--", ":")[i // len(COLORS) % 3],
        "markersize": 5,
        "linewidth": 1.5,
    }


def throughput(rows: list[Row], styles: dict[str, dict[str, Any]]) -> Figure:
    """Tokens per second of the server against those of one request; up and right is better."""
    figure, axes = _canvas("Throughput against interactivity", (7.5, 5))
    first = next(iter(styles))
    for name, look in styles.items():
        points = [row for row in rows if row["method"] == name]
        x = [row["tokens_per_second_per_request"] for row in points]
        y = [row["tokens_per_second"] for row in points]
        axes.plot(x, y, label=name, **look)
        for row in points if name == first else ():
            axes.annotate(
                str(row["concurrency"]),
                (row["tokens_per_second_per_request"], row["tokens_per_second"]),
                xytext=(-6, -6),
                textcoords="offset points",
                ha="right",
                fontsize=7,
            )
    axes.set_xlabel(f"tokens/s of a request (numbers beside {first}: concurrency)")
    axes.set_ylabel("tokens/s of all requests")
    axes.set_xlim(left=0)
    axes.set_ylim(bottom=0)
    _legend(axes)
    return figure


def draft_lengths(rows: list[Row], styles: dict[str, dict[str, Any]]) -> Figure | None:
    """Share of the drafts by length, a panel per method."""
    if not rows:
        return None
    longest = max(int(length) for row in rows for length in row["draft_lengths"])

    def panel(axes: Axes, row: Row) -> None:
        lengths = {int(length): count for length, count in row["draft_lengths"].items()}
        shares = [count / row["drafts"] for count in lengths.values()]
        axes.bar(list(lengths), shares, width=0.9, color=styles[row["method"]]["color"])
        mean = row["drafted_tokens"] / row["drafts"]
        axes.set_title(f"{row['method']} (mean {mean:.1f})", loc="left", fontsize=9)
        axes.set_xlim(0, longest + 1)

    return _panels(rows, panel, "Draft lengths", "tokens in the draft", "share of the drafts")


def acceptance(rows: list[Row], styles: dict[str, dict[str, Any]]) -> Figure | None:
    """Accepted share of the tokens drafted at each position."""
    if not rows:
        return None
    figure, axes = _canvas("Accepted share of the drafted tokens by position", (7.5, 4.5))
    for row in rows:
        drafted, accepted = row["drafted_per_position"], row["accepted_per_position"]
        accepted = accepted + [0] * (len(drafted) - len(accepted))
        points = [
            (position, right / all_)
            for position, (right, all_) in enumerate(zip(accepted, drafted, strict=True), 1)
            if all_ >= FEW
        ]
        x, y = [p[0] for p in points], [p[1] for p in points]
        axes.plot(x, y, label=row["method"], **{**styles[row["method"]], "markersize": 3})
    axes.set_xlabel(f"position in the draft (those with at least {FEW} drafted tokens)")
    axes.set_ylabel("accepted / drafted")
    axes.set_ylim(0, 1.03)
    _legend(axes)
    return figure


def reliability(rows: list[Row], styles: dict[str, dict[str, Any]]) -> Figure | None:
    """Whether a token of confidence p is accepted with probability p, once all before it were."""
    if not rows:
        return None
    figure, axes = _canvas("Reliability of the drafter's confidence", (5.5, 5.5))
    axes.plot([0, 1], [0, 1], color="#999999", linewidth=1, label="calibrated")
    most = max(each["count"] for row in rows for each in row["reliability"])
    for row in rows:
        look = styles[row["method"]]
        bins = [each for each in row["reliability"] if each["count"] >= FEW]
        x = [each["mean_confidence"] for each in bins]
        y = [each["accepted"] / each["count"] for each in bins]
        axes.plot(x, y, label=row["method"], **{**look, "markersize": 3})
        sizes = [10 + 140 * each["count"] / most for each in bins]
        axes.scatter(x, y, sizes, color=look["color"], marker=look["marker"], alpha=0.8)
    axes.set_xlabel(f"confidence (mean of a bin; area: tokens in it, at least {FEW})")
    axes.set_ylabel("accepted share of the judged tokens")
    axes.set_xlim(-0.03, 1.05)
    axes.set_ylim(-0.03, 1.05)
    _legend(axes)
    return figure


def trajectory(rows: list[Row]) -> Figure | None:
    """One answer, round by round, a panel per method."""
    if not rows:
        return None
    num_rounds = max(len(row["trajectory"]) for row in rows)

    def panel(axes: Axes, row: Row) -> None:
        rounds = row["trajectory"]
        x = range(len(rounds))
        accepted, bonus = [r["accepted"] for r in rounds], [r["bonus"] for r in rounds]
        axes.bar(x, accepted, color=ACCEPTED, label="accepted")
        axes.bar(x, bonus, bottom=accepted, color=BONUS, label="bonus")
        axes.bar(x, [-r["rejected"] for r in rounds], color=REJECTED, label="rejected")
        axes.axhline(0, color="black", linewidth=0.6)
        num_tokens = sum(accepted) + sum(bonus)
        title = f"{row['method']}: {num_tokens} tokens in {len(rounds)} rounds"
        axes.set_title(title, loc="left", fontsize=9)
        axes.set_xlim(-0.7, num_rounds - 0.3)
        axes.yaxis.set_major_formatter(lambda value, _: f"{abs(value):.0f}")

    title = "The first answer, round by round (up: emitted, down: rejected)"
    figure = _panels(rows, panel, title, "round", "tokens", columns=1)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.axes[0].legend(handles, labels, fontsize=8, ncols=3, frameon=False, loc="upper right")
    return figure


def _canvas(title: str, size: tuple[float, float]) -> tuple[Figure, Axes]:
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.add_subplot()
    axes.set_title(title, loc="left", fontsize=11)
    _clean(axes)
    return figure, axes


def _panels(
    rows: list[Row],
    panel: Callable[[Axes, Row], None],
    title: str,
    xlabel: str,
    ylabel: str,
    columns: int = 2,
) -> Figure:
    """A panel per row, all with the same axes."""
    columns = min(columns, len(rows))
    lines = -(-len(rows) // columns)
    figure = Figure(figsize=(7.5, 1.2 + 1.7 * lines), layout="constrained")
    figure.suptitle(title, x=0.02, ha="left", fontsize=11)
    grid = figure.subplots(lines, columns, squeeze=False, sharex=True, sharey=True)
    for i, axes in enumerate(grid.flat):
        if i >= len(rows):
            axes.set_visible(False)
            continue
        _clean(axes)
        panel(axes, rows[i])
        if i + columns >= len(rows):
            axes.set_xlabel(xlabel, fontsize=9)
            axes.tick_params(labelbottom=True)
        if i % columns == 0:
            axes.set_ylabel(ylabel, fontsize=9)
    return figure


def _clean(axes: Axes) -> None:
    axes.grid(color="#E5E5E5", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _legend(axes: Axes) -> None:
    axes.legend(fontsize=8, frameon=False)
