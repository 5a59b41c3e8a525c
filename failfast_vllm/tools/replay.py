"""Measured answers beside each other, streamed at the times of their engine steps.

Nothing is drawn while an engine works, so drawing takes no measured time.
"""

import re
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from io import StringIO
from itertools import pairwise
from typing import Any, NamedTuple

from rich.box import HORIZONTALS
from rich.console import Console, Group
from rich.live import Live
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from failfast_vllm.tools.load_generator import Run, TracedRound

# told apart without colours, too
ACCEPTED, COPIED, OWN, REJECTED = "bold green", "bold cyan underline", "yellow", "red strike"
LEGEND = (("accepted", ACCEPTED), ("copied", COPIED), ("target's own", OWN), ("rejected", REJECTED))
ROWS_BELOW = 13  # of the terminal, for the figures and the table that follows
NUM_FRAMES, HOLD_MS = 30, 4000  # of a recording, and how long its end stays
SVG_SCREEN = (
    '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
    'font-family="monospace" font-size="{char_height}">{chrome}'
)
SVG_FRAME = '<g transform="translate({terminal_x},{terminal_y})"><style>{styles}</style>{matrix}'


class Step(NamedTuple):
    """What one engine step added; a question adds no tokens."""

    ms: float  # since the run's start
    text: Text
    rejected: Text
    round: TracedRound


class Replay:
    """Runs of one request at a time, by title."""

    def __init__(
        self, runs: dict[str, Run], questions: Sequence[str], tokenizer: Any, caption: str
    ) -> None:
        self.caption = caption
        self.steps = {k: list(_steps(run, questions, tokenizer)) for k, run in runs.items()}
        self.end_ms = max(steps[-1].ms for steps in self.steps.values())

    def frame(self, ms: float, console: Console) -> Group:
        """All runs after `ms` milliseconds, to fill the console."""
        width, rows = console.width // 2 - 4, max(1, console.height - ROWS_BELOW - 2)
        grid, panels, figures = Table.grid(expand=True), list[Panel](), list[str]()
        for title, steps in self.steps.items():
            grid.add_column(ratio=1)
            found = [step for step in steps if step.ms <= ms]
            goes_on = len(found) < len(steps)
            parts = [step.text for step in found] + [found[-1].rejected] * goes_on
            lines = Text("\n").join(Text().join(parts).wrap(console, width)[-rows:])
            style = "" if goes_on else "green"
            look: dict[str, Any] = {"height": rows + 2, "border_style": style}
            panels.append(Panel(lines, HORIZONTALS, title=title, **look))
            figures.append(_figures(found, ms if goes_on else steps[-1].ms))
        grid.add_row(*panels)
        grid.add_row(*figures)
        legend = [Text(), *(Text(*each) for each in LEGEND), Text(self.caption)]
        return Group(grid, Text(" ").join(legend))

    def play(self, console: Console) -> None:
        """Show it at the speed that was measured; Ctrl-C jumps to the end."""
        began = time.monotonic()
        with Live(console=console, auto_refresh=False) as live:
            with suppress(KeyboardInterrupt):
                while (ms := (time.monotonic() - began) * 1e3) < self.end_ms:
                    live.update(self.frame(ms, console), refresh=True)
                    time.sleep(0.05)
            live.update(self.frame(self.end_ms, console), refresh=True)

    def record(self) -> str:
        """An SVG that plays it over and over; where SVGs stand still, it shows the end."""
        size: dict[str, Any] = {"width": 100, "height": 30, "force_terminal": True}
        console = Console(file=StringIO(), record=True, _environ={}, **size)
        times = [self.end_ms * i / NUM_FRAMES for i in range(NUM_FRAMES + 1)]
        times.append(total := self.end_ms + HOLD_MS)
        parts = list[str]()
        for begin, end in pairwise(times):
            console.print(self.frame(begin, console))
            look: dict[str, Any] = {"title": "failfast demo", "code_format": SVG_SCREEN}
            parts += [] if parts else [console.export_svg(clear=False, **look)]
            text = console.export_svg(code_format=SVG_FRAME, unique_id=f"f{len(parts)}")
            parts.append(
                f'<g visibility="{"hidden" if end < total else "visible"}">'
                '<animate attributeName="visibility" values="hidden;visible;hidden" '
                f'keyTimes="0;{begin / total:.4f};{end / total:.4f}" dur="{total:.0f}ms" '
                'calcMode="discrete" repeatCount="indefinite"/>'
                + re.sub(' clip-path="[^"]*"', "", text)
                + "</g></g>"
            )
        return "\n".join([*parts, "</svg>\n"])


def _steps(run: Run, questions: Sequence[str], tokenizer: Any) -> Iterator[Step]:
    """Tokens of rounds that were not reported are the target's own."""

    def decode(token_ids: list[int]) -> str:
        """A character that is not complete yet is left out."""
        text = tokenizer.decode(token_ids, skip_special_tokens=True).rstrip("\ufffd")
        return re.sub(r"[\x00-\x09\x0b-\x1f\x7f-\x9f]", " ", text)

    start = 0.0
    for question, served in zip(questions, run.served, strict=True):
        title = Text("\n\n" * (start > 0) + question + "\n", "dim italic")
        yield Step(start, title, Text(), TracedRound([], [], []))
        seen, shown = list[int](), ""
        rounds = served.rounds or [TracedRound([], [], [token]) for token in served.token_ids]
        for ms, r in zip(served.step_ms, rounds, strict=False):
            text, num_drafted = Text(), len(r.accepted) - r.num_copied
            drafted, copied = r.accepted[:num_drafted], r.accepted[num_drafted:]
            for token_ids, style in ((drafted, ACCEPTED), (copied, COPIED), (r.bonus, OWN)):
                seen += token_ids
                before, shown = shown, decode(seen)
                text.append(shown[len(before) :], style)
            yield Step(start + ms, text, Text(decode(r.rejected), REJECTED), r)
        start += served.latency_ms


def _figures(steps: Sequence[Step], ms: float) -> str:
    """Of a run so far; a round verified a draft, as in the demo's table."""
    rounds = [step.round for step in steps]
    num_tokens = sum(len(r.accepted) + len(r.bonus) for r in rounds)
    num_rounds = sum(bool(r.accepted or r.rejected) for r in rounds)
    length = 1 + sum(len(r.accepted) for r in rounds) / max(1, num_rounds)
    return (
        f" [bold]{num_tokens / max(ms, 1) * 1e3:.1f} tokens/s[/]: {num_tokens} in {ms / 1e3:.2f} s"
        f"\n {length:.2f} tokens per round, {sum(len(r.rejected) for r in rounds)} rejected"
    )
