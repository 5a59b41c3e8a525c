"""`failfast trace`: a summary of recorded rounds, one request round by round, or a recording."""

import argparse
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from failfast_vllm.config import MODELS_DIR
from failfast_vllm.observe.counters import NUM_BINS
from failfast_vllm.observe.trace import Round, Trace, read
from failfast_vllm.tools import demo
from failfast_vllm.tools.arguments import add_answer_arguments, refusals
from failfast_vllm.tools.offline import engine_environment
from failfast_vllm.tools.shipped import held_out_prompts
from failfast_vllm.tools.tally import Tally

LONG_DRAFT = 30  # tokens
HISTOGRAM_EDGES = (1, 5, 10, 11, 20, 21, 30, 31, 40, 41, 50, 51, 60, 61)  # a bin starts at each


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `failfast trace`."""
    parser.add_argument("file", metavar="FILE.jsonl", type=Path)
    parser.add_argument("--request", type=int, metavar="I", help="its rounds, one line each")
    parser.add_argument(
        "--record", action="store_true", help="answer held-out prompts into FILE.jsonl first"
    )
    parser.add_argument("--ids", action="store_true", help="record token ids, too")
    add_answer_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Record rounds if asked to, and print what the file holds."""
    if args.record:
        _record(args)
    with refusals():
        found = read(args.file)
        rounds = None if args.request is None else found.of_request(args.request)
    if rounds is None:
        print(json.dumps(summarize(found), indent=2) if args.json else render(found))
    elif args.json:
        print(json.dumps({"rounds": [r._asdict() for r in rounds]}))
    else:
        print(trajectory(rounds))
    return 0


def _record(args: argparse.Namespace) -> None:
    prompts = held_out_prompts(["target", "drafter"])
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # as for the demo
    with engine_environment(), refusals():
        chosen = demo.choose_prompts(prompts, args.num_prompts)
        demo.record(str(MODELS_DIR / "target"), chosen, args.max_tokens, args.file, args.ids)


def summarize(trace: Trace) -> dict[str, Any]:
    """The figures of a trace; `drafts` are its rounds that verified a draft.

    The acceptance length counts the bonus, as vLLM does; a position or a confidence is judged if
    all tokens before it in the draft were accepted. Means of nothing are 0.
    """
    drafts = [r for r in trace.rounds if r.drafted]
    tally = Tally()
    for r in drafts:
        tally.add(r.drafted, r.accepted, r.passes, r.confidences)
    num_rows = sum(r.rows for r in drafts)
    return {
        "runs": trace.headers,
        "requests": len({r.request for r in trace.rounds}),
        "steps": len(trace.rounds) - len(drafts),  # without a draft
        "rounds": tally.num_drafts,
        "emitted": sum(r.accepted + 1 for r in trace.rounds),
        "drafted": tally.num_drafted,
        "accepted": tally.num_accepted,
        "acceptance_length": _mean([r.accepted + 1 for r in drafts]),
        "passes_per_round": _mean([r.passes for r in drafts]),
        "rows_per_pass": num_rows / max(1, tally.num_passes),
        "sequences_per_step": _mean([r.seqs for r in drafts]),
        "share_of_long_drafts": _mean([r.drafted >= LONG_DRAFT for r in drafts]),
        "draft_lens": _histogram(tally),
        "acceptance_by_position": [
            {
                "judged": sum(r.drafted > i and r.accepted >= i for r in drafts),
                "accepted": tally.accepted[i],
            }
            for i in range(len(tally.drafted))
        ],
        "reliability": _reliability(tally),
    }


def _reliability(tally: Tally) -> list[dict[str, Any]]:
    return [
        {
            "low": i / NUM_BINS,
            "judged": judged,
            "confidence": tally.confidence[i] / judged,
            "acceptance": tally.right[i] / judged,
        }
        for i, judged in sorted(tally.judged.items())
    ]


def _histogram(tally: Tally) -> list[dict[str, int]]:
    """Shortest and longest draft of each bin, and how many; from 1 token on."""
    longest = max(tally.lengths, default=0)
    found = []
    for low, after in zip(HISTOGRAM_EDGES, (*HISTOGRAM_EDGES[1:], 1 << 30), strict=True):
        if low <= longest:
            count = sum(n for length, n in tally.lengths.items() if low <= length < after)
            found.append({"from": low, "to": min(after - 1, max(longest, low)), "count": count})
    return found


def render(trace: Trace) -> str:
    """The report for a reader."""
    figures = summarize(trace)
    text = [describe(trace.header)]
    if len(trace.headers) > 1:
        text.append(f"the last of {len(trace.headers)} runs in this file")
    for label, value in (
        ("requests", figures["requests"]),
        ("rounds", f"{figures['rounds']}, and {figures['steps']} without a draft"),
        ("tokens", figures["emitted"]),
        ("acceptance length", f"{figures['acceptance_length']:.2f} tokens per round"),
        ("draft passes", f"{figures['passes_per_round']:.2f} per round"),
        ("rows", f"{figures['rows_per_pass']:.1f} per sequence and pass"),
        ("sequences", f"{figures['sequences_per_step']:.1f} per step"),
        (f"drafts of {LONG_DRAFT} or more", f"{figures['share_of_long_drafts']:.1%}"),
    ):
        text.append(f"  {label:<24}{value}")
    return "\n".join((*text, *_tables(figures)))


def _tables(figures: dict[str, Any]) -> list[str]:
    text = ["", "draft length   rounds"]
    for low, high, count in (each.values() for each in figures["draft_lens"]):
        name = f"{low}" if low == high else f"{low}-{high}"
        text.append(f"{name:>12}{count:>9}  {'#' * round(40 * count / figures['rounds'])}")
    text += ["", "position       judged  accepted"]
    for name, judged, accepted in _positions(figures["acceptance_by_position"]):
        text.append(f"{name:>12}{judged:>9}  {accepted / judged:>8.1%}")
    text += ["", "confidence     judged   mean  accepted"]
    for low, judged, confidence, accepted in (each.values() for each in figures["reliability"]):
        name = f"{low:.1f}-{low + 1 / NUM_BINS:.1f}"
        text.append(f"{name:>12}{judged:>9}{confidence:>7.3f}{accepted:>10.1%}")
    return text


def describe(header: Mapping[str, Any]) -> str:
    """One line: which models, which policy."""
    drafter = f" with {header['drafter']}" if "drafter" in header else ""
    parts = [f"{header.get('target', 'no target')}{drafter}"]
    parts += [
        f"{name} {header[key]}" if name else str(header[key])
        for name, key in (
            ("", "dtype"),
            ("policy", "policy"),
            ("threshold", "confidence_threshold"),
            ("increment", "draft_increment"),
            ("cap", "num_speculative_tokens"),
            ("load aware:", "load_aware"),
            ("", "date"),
        )
        if header.get(key) not in (None, False)
    ]
    return ", ".join(parts)


def _positions(by_position: list[dict[str, int]]) -> list[tuple[str, int, int]]:
    """The first ten positions (from 1) each, the others by tens; unjudged ones left out."""
    groups = [(i, i + 1) for i in range(10)]
    groups += [(low, low + 10) for low in range(10, max(10, len(by_position)), 10)]
    found = []
    for low, high in groups:
        judged = sum(each["judged"] for each in by_position[low:high])
        accepted = sum(each["accepted"] for each in by_position[low:high])
        name = f"{high}" if high == low + 1 else f"{low + 1}-{min(high, len(by_position))}"
        if judged:
            found.append((name, judged, accepted))
    return found


def trajectory(rounds: Sequence[Round]) -> str:
    """One request, a line per round."""
    lines = [
        f"Request {rounds[0].request}, round by round: = accepted, + bonus, . rejected",
        "round  known  draft  passes  accepted",
    ]
    for i, r in enumerate(rounds):
        strip = "=" * r.accepted + "+" + "." * (r.drafted - r.accepted)
        lines.append(f"{i:>5}{r.known:>7}{r.drafted:>7}{r.passes:>8}{r.accepted:>10}  {strip}")
    return "\n".join(lines)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0
