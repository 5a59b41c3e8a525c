"""Measured answers beside each other, streamed at the times of their engine steps.

Nothing is drawn while an engine works, so drawing takes no measured time.
"""

import re
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from io import StringIO
from math import ceil
from typing import Any, NamedTuple

from rich.box import HORIZONTALS
from rich.console import Console, ConsoleOptions, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from failfast_vllm.tools.load_generator import Run, TracedRound

# told apart without colours, too
ACCEPTED, COPIED, OWN, REJECTED = "bold green", "bold cyan underline", "yellow", "red strike"
LEGEND = (("accepted", ACCEPTED), ("copied", COPIED), ("target's own", OWN), ("rejected", REJECTED))
ROWS_BELOW = 13  # of the terminal, for the figures, and the table that follows
MAX_FRAMES, HOLD_MS = 30, 4000  # of a recording, and how long its end stays
SVG_FRAME = (
    '<g transform="translate({terminal_x},{terminal_y})"><style>{styles}</style>{matrix}</g>'
)
SVG_SCREEN = (
    '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
    'font-family="monospace" font-size="{char_height}">{chrome}'
)


class Step(NamedTuple):
    """What one engine step added; a question adds no tokens."""

    ms: float  # since the side's start
    text: Text
    rejected: Text
    round: TracedRound


def steps_of(run: Run, questions: Sequence[str], tokenizer: Any) -> list[Step]:
    """A run of one request at a time, as text; tokens of unreported rounds are the target's own."""

    def decode(token_ids: list[int]) -> str:
        """The end of a character that has only begun is left out."""
        text = tokenizer.decode(token_ids, skip_special_tokens=True).rstrip("\ufffd")
        return re.sub(r"[\x00-\x09\x0b-\x1f\x7f-\x9f]", " ", text)

    steps, start = list[Step](), 0.0
    for question, served in zip(questions, run.served, strict=True):
        text = Text(f"\n\n{question}\n" if steps else f"{question}\n", "dim italic")
        steps.append(Step(start, text, Text(), TracedRound([], [], [])))
        rounds = served.rounds or [TracedRound([], [], [token]) for token in served.token_ids]
        seen, shown = list[int](), ""
        for ms, r in zip(served.step_ms, rounds, strict=False):
            text, num_drafted = Text(), len(r.accepted) - r.num_copied
            drafted, copied = r.accepted[:num_drafted], r.accepted[num_drafted:]
            for token_ids, style in ((drafted, ACCEPTED), (copied, COPIED), (r.bonus, OWN)):
                seen += token_ids
                before, shown = shown, decode(seen)
                text.append(shown[len(before) :], style)
            steps.append(Step(start + ms, text, Text(decode(r.rejected), REJECTED), r))
        start += served.latency_ms
    return steps


@dataclass
class Frame:
    """Both sides after `ms` milliseconds."""

    sides: dict[str, list[Step]]
    caption: str
    ms: float

    def __rich_console__(
        self, console: Console, options: ConsoleOptions
    ) -> Iterator[RenderableType]:
        width, rows = options.max_width // 2 - 4, max(1, console.height - ROWS_BELOW - 2)
        grid, panels, figures = Table.grid(expand=True), list[Panel](), list[str]()
        for title, steps in self.sides.items():
            grid.add_column(ratio=1)
            found = [step for step in steps if step.ms <= self.ms]
            ended = len(found) == len(steps)
            text = Text().join(step.text for step in found)
            if not ended:
                text.append_text(found[-1].rejected)
            lines = Text("\n").join(text.wrap(console, width)[-rows:])
            look: dict[str, Any] = {"box": HORIZONTALS, "border_style": "green" if ended else ""}
            panels.append(Panel(lines, title=title, height=rows + 2, **look))
            figures.append(_figures(found, steps[-1].ms if ended else self.ms))
        grid.add_row(*panels)
        grid.add_row(*figures)
        yield grid
        yield Text(" ").join([Text(), *(Text(*each) for each in LEGEND), Text(self.caption)])


def _figures(steps: list[Step], ms: float) -> str:
    """Of a side so far; a round verified a draft, as in the demo's table."""
    rounds = [step.round for step in steps]
    num_tokens = sum(len(r.accepted) + len(r.bonus) for r in rounds)
    drafts = [r for r in rounds if r.accepted or r.rejected]
    accepted, rejected = sum(len(r.accepted) for r in drafts), sum(len(r.rejected) for r in drafts)
    rate, length = num_tokens / max(ms, 1) * 1e3, 1 + accepted / max(1, len(drafts))
    return (
        f" [bold]{rate:.1f} tokens/s[/]: {num_tokens} in {ms / 1e3:.2f} s\n"
        f" {length:.2f} tokens per round, {rejected} rejected"
    )


def _end(sides: dict[str, list[Step]]) -> float:
    return max(steps[-1].ms for steps in sides.values())


def play(sides: dict[str, list[Step]], caption: str, console: Console) -> None:
    """Show it at the speed that was measured; Ctrl-C jumps to the end."""
    began, ms = time.monotonic(), 0.0
    with Live(console=console, auto_refresh=False) as live:
        with suppress(KeyboardInterrupt):
            while ms < _end(sides):
                live.update(Frame(sides, caption, ms), refresh=True)
                time.sleep(0.05)
                ms = (time.monotonic() - began) * 1e3
        live.update(Frame(sides, caption, _end(sides)), refresh=True)


def record(sides: dict[str, list[Step]], caption: str) -> str:
    """An SVG that plays it over and over; where SVGs stand still, it shows the end."""
    console = Console(
        file=StringIO(), record=True, width=100, height=30, force_terminal=True, _environ={}
    )
    end = _end(sides)
    num_frames = ceil(min(MAX_FRAMES, end / 50))
    total, parts = end + HOLD_MS, list[str]()
    for i in range(num_frames + 1):
        console.print(Frame(sides, caption, end * i / num_frames))
        if not parts:
            parts.append(
                console.export_svg(title="failfast demo", code_format=SVG_SCREEN, clear=False)
            )
        until = 1 if i == num_frames else end * (i + 1) / num_frames / total
        frame = console.export_svg(code_format=SVG_FRAME, unique_id=f"f{i}")
        parts.append(
            f'<g visibility="{"visible" if until == 1 else "hidden"}"><animate '
            'attributeName="visibility" values="hidden;visible;hidden" calcMode="discrete" '
            f'keyTimes="0;{end * i / num_frames / total:.4f};{until:.4f}" dur="{total:.0f}ms" '
            f'repeatCount="indefinite"/>{re.sub(r" clip-path=.[^ >]*", "", frame)}</g>'
        )
    return "\n".join([*parts, "</svg>\n"])
