"""The demo's replay: what it shows at a time, on which terminal, and its recording."""

import io
import re
import sys
from xml.etree import ElementTree

import pytest
from rich.console import Console

from failfast_vllm.tools import replay
from failfast_vllm.tools.load_generator import Run, Served, Sums, TracedRound

CAPTION = "replayed at the measured times; float32, cpu (threads: 1)"
SVG = "{http://www.w3.org/2000/svg}"


class Pieces:
    """Token id i is the i-th piece."""

    pieces = ("Hel", "lo", " world", "\x1b", "<script>", " [bold]")

    def decode(self, token_ids, skip_special_tokens):
        assert skip_special_tokens
        return "".join(self.pieces[i] for i in token_ids)


@pytest.fixture
def sides():
    """Two answers; without drafts in 6 s, with drafts in 3 s."""
    answers = [[0, 1, 2], [3, 4, 5]]
    rounds = [
        [TracedRound([], [], [0]), TracedRound([1, 2], [5, 5], [], num_copied=1)],
        [TracedRound([3], [], [4]), TracedRound([], [0], [5])],
    ]
    plain = [Served(ids, [1e3, 2e3, 3e3], []) for ids in answers]
    ours = [Served(ids, [1e3, 1.5e3], r) for ids, r in zip(answers, rounds, strict=True)]
    runs = {"without": Run(6.0, plain, Sums()), "with failfast": Run(3.0, ours, Sums())}
    return replay.Replay(runs, ["First?", "Second?"], Pieces(), CAPTION)


def screen(sides, ms, width=80, height=24, **environ):
    stream = io.StringIO()
    given = {"width": width, "height": height, "force_terminal": True, "color_system": "standard"}
    console = Console(file=stream, _environ=environ, legacy_windows=False, **given)
    console.print(sides.frame(ms, console))
    return stream.getvalue()


def plain(text):
    return re.sub(r"\x1b\[[0-9;]*m", "", text)


def test_steps_come_at_their_measured_times(sides):
    """Catches clocks that start again with each answer, and tokens under a wrong source."""
    assert [step.ms for step in sides.steps["without"]] == [0, 1e3, 2e3, 3e3, 3e3, 4e3, 5e3, 6e3]
    ours = sides.steps["with failfast"]
    assert [step.ms for step in ours] == [0, 1e3, 1.5e3, 1.5e3, 2.5e3, 3e3]
    spans = [(span.start, span.end, span.style) for span in ours[2].text.spans]
    assert ours[2].text.plain == "lo world"
    assert spans == [(0, 2, replay.ACCEPTED), (2, 8, replay.COPIED)]
    assert (ours[1].text.plain, str(ours[1].text.spans[0].style)) == ("Hel", replay.OWN)
    assert ours[2].rejected.plain == " [bold] [bold]"
    for steps in sides.steps.values():
        text = "".join(step.text.plain for step in steps)
        assert text == "First?\nHello world\n\nSecond?\n <script> [bold]"


def test_a_character_of_several_tokens():
    """Catches replacement characters where a token ends inside a character."""

    class Bytes:
        def decode(self, token_ids, skip_special_tokens):
            return bytes(token_ids).decode(errors="replace")

    ids = list("né😀!".encode())
    run = Run(1.0, [Served(ids, [float(i) for i in range(len(ids))], [])], Sums())
    (_question, *steps) = replay.Replay({"": run}, ["?"], Bytes(), "").steps[""]
    assert [step.text.plain for step in steps] == ["n", "", "é", "", "", "", "😀", "!"]


def test_figures_of_a_time(sides):
    """Catches a clock that goes on behind a side's end, or tokens that are not there yet."""
    early, late = (plain(screen(sides, ms)) for ms in (1.5e3, 6e3))
    assert "0.7 tokens/s: 1 in 1.50 s" in early
    assert "2.0 tokens/s: 3 in 1.50 s" in early
    assert "3.00 tokens per round, 2 rejected" in early
    assert "Second?" in early
    assert "<script>" not in early
    assert "1.0 tokens/s: 6 in 6.00 s" in late
    assert "2.0 tokens/s: 6 in 3.00 s" in late
    assert "2.00 tokens per round, 3 rejected" in late  # (2 + 1 + 0) / 3 drafts + 1
    assert late.count("<script> [bold]") == 2  # no markup of an answer is obeyed


def test_rejected_tokens_are_gone_with_the_next_step(sides):
    """Catches rejected tokens that stay in the answer."""
    del sides.steps["with failfast"][3]  # the second question
    assert "Hello world [bold] [bold]" in plain(screen(sides, 2e3))
    assert "[bold] [bold]" not in plain(screen(sides, 2.5e3))


@pytest.mark.parametrize(("width", "height"), [(80, 24), (120, 40), (40, 10)])
def test_it_fits_above_the_table(sides, width, height):
    """Catches lines that wrap, and a top that has scrolled away when the table is there."""
    lines = plain(screen(sides, 6e3, width, height)).splitlines()
    assert max(map(len, lines)) <= width
    num_rows_of_table_and_prompt = 9
    assert len(lines) + num_rows_of_table_and_prompt <= max(height, 21)
    assert any("world" in line for line in lines) or height < 24


def test_sources_are_told_apart_without_colours(sides):
    """Catches a screen that NO_COLOR makes unreadable, or that has colours all the same."""
    text = screen(sides, 6e3, NO_COLOR="1")
    assert not re.search(r"\x1b\[[0-9;]*3[0-7]", text)
    assert "\x1b[1;4m world" in text  # copied: bold, underlined
    assert "\x1b[1mlo" in text
    assert "\x1b[9mrejected" in text
    assert "\x1b[1;32mlo" in screen(sides, 6e3)


def test_it_plays_at_the_measured_speed(sides, monkeypatch):
    """Catches a replay that drawing slows down, and one that stops before the end."""
    now, naps = [100.0], []

    def sleep(seconds):
        naps.append(seconds)
        now[0] += seconds + 0.5  # drawing is slow

    monkeypatch.setattr(replay.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(replay.time, "sleep", sleep)
    stream = io.StringIO()
    sides.play(Console(file=stream, force_terminal=True, width=80, height=24))
    assert 6.0 <= now[0] - 100 < 7.0
    assert "6 in 6.00 s" in plain(stream.getvalue())


def test_ctrl_c_jumps_to_the_end(sides, monkeypatch):
    """Catches a measurement that is lost because its replay was too long."""

    def interrupted(seconds):
        raise KeyboardInterrupt

    monkeypatch.setattr(replay.time, "sleep", interrupted)
    stream = io.StringIO()
    sides.play(Console(file=stream, force_terminal=True, width=80, height=24))
    assert "6 in 6.00 s" in plain(stream.getvalue())


def test_a_recording_is_whole_and_loads_nothing(sides):
    """Catches markup of an answer in the SVG, gaps between frames, and fonts from elsewhere."""
    text = sides.record()
    root = ElementTree.fromstring(text)
    assert re.findall(r"https?://[^\"]*", text) == ["http://www.w3.org/2000/svg"]
    assert "@font-face" not in text
    assert not list(root.iter("script"))
    frames = [g for g in root.findall(f"{SVG}g") if g.find(f"{SVG}animate") is not None]
    assert [g.get("visibility") for g in frames] == ["hidden"] * (len(frames) - 1) + ["visible"]
    times = [g.find(f"{SVG}animate").get("keyTimes").split(";")[1:] for g in frames]
    assert times[0][0] == "0.0000"
    assert [float(end) for _, end in times[:-1]] == [float(begin) for begin, _ in times[1:]]
    assert float(times[-1][0]) == pytest.approx(6 / 10, abs=1e-3)  # the end stays for 4 s
    assert float(times[-1][1]) == 1
    last = "".join(frames[-1].itertext()).replace("\N{NO-BREAK SPACE}", " ")
    assert "6 in 6.00 s" in last
    assert CAPTION in last
    assert "<script>" in last


@pytest.mark.parametrize("wants_json", [False, True])
def test_the_demo_replays_on_a_terminal_only(wants_json, sides, monkeypatch, capsys):
    """Catches a replay before JSON, and one that shows the rounds twice."""
    import argparse

    from failfast_vllm.tools import demo

    served = [Served([0, 1, 2], [1.0, 2.0, 3.0], [])]
    prompts = [{"task": "t", "messages": [{"role": "user", "content": "Why?"}]}]
    run = Run(1.0, served, Sums(float))
    played = []
    monkeypatch.setattr(replay.Replay, "play", lambda *given: played.append(given))
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    result = demo.Comparison(prompts, run, run, "cpu", Pieces())
    demo.show(result, argparse.Namespace(json=wants_json, record=None))
    out = capsys.readouterr().out
    assert len(played) == (not wants_json)
    assert out.startswith("{" if wants_json else "1 prompts, 3 tokens")
    assert "round by round" not in out
