"""`failfast trace`: what a server has recorded, in a few figures."""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from failfast_vllm.observe.trace import Trace, read

LONG_DRAFT = 30  # tokens
HEADER_KEYS = ("dtype", "policy", "confidence_threshold", "draft_increment", "load_aware", "date")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `failfast trace`."""
    parser.add_argument("file", metavar="FILE.jsonl", type=Path)


def run(args: argparse.Namespace) -> int:
    """Print what the file holds."""
    found = read(args.file)
    print(json.dumps(summarize(found), indent=2) if args.json else render(found))
    return 0


def summarize(trace: Trace) -> dict[str, Any]:
    """The figures of a trace; `rounds` are those that verified a draft.

    The acceptance length counts the bonus, as vLLM does; a position is judged if all tokens before
    it in the draft were accepted. Means of nothing are 0.
    """
    drafts = [r for r in trace.rounds if r.drafted]
    return {
        "runs": trace.headers,
        "requests": len({r.request for r in trace.rounds}),
        "steps": len(trace.rounds) - len(drafts),  # without a draft
        "rounds": len(drafts),
        "emitted": sum(r.accepted + 1 for r in trace.rounds),
        "drafted": sum(r.drafted for r in drafts),
        "accepted": sum(r.accepted for r in drafts),
        "copied": sum(r.drafted - len(r.confidences) for r in drafts),
        "copied_accepted": sum(max(0, r.accepted - len(r.confidences)) for r in drafts),
        "acceptance_length": _mean([r.accepted + 1 for r in drafts]),
        "passes_per_round": _mean([r.passes for r in drafts]),
        "rows_per_pass": sum(r.rows for r in drafts) / max(1, sum(r.passes for r in drafts)),
        "sequences_per_step": _mean([r.seqs for r in drafts]),
        "share_of_long_drafts": _mean([r.drafted >= LONG_DRAFT for r in drafts]),
        "acceptance_by_position": [
            {
                "judged": sum(r.drafted > i and r.accepted >= i for r in drafts),
                "accepted": sum(r.accepted > i for r in drafts),
            }
            for i in range(max((r.drafted for r in drafts), default=0))
        ],
    }


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0


def render(trace: Trace) -> str:
    """The report for a reader."""
    figures, header = summarize(trace), trace.headers[-1]
    drafter = f" with {header['drafter']}" if "drafter" in header else ""
    about = [f"{key} {header[key]}" for key in HEADER_KEYS if header.get(key)]
    text = [", ".join((f"{header.get('target', 'no target')}{drafter}", *about))]
    if len(trace.headers) > 1:
        text.append(f"the last of {len(trace.headers)} runs in this file")
    for label, value in (
        ("requests", figures["requests"]),
        ("rounds", f"{figures['rounds']}, and {figures['steps']} without a draft"),
        ("tokens", figures["emitted"]),
        ("acceptance length", f"{figures['acceptance_length']:.2f} tokens per round"),
        ("copied", f"{figures['copied']} tokens, {figures['copied_accepted']} accepted"),
        ("draft passes", f"{figures['passes_per_round']:.2f} per round"),
        ("rows", f"{figures['rows_per_pass']:.1f} per sequence and pass"),
        ("sequences", f"{figures['sequences_per_step']:.1f} per step"),
        (f"drafts of {LONG_DRAFT} or more", f"{figures['share_of_long_drafts']:.1%}"),
    ):
        text.append(f"  {label:<24}{value}")
    text += ["", "position       judged  accepted"]
    positions = figures["acceptance_by_position"]
    for low in (*range(10), *range(10, len(positions), 10)):  # the first ten each, then by tens
        group = positions[low : low + (1 if low < 10 else 10)]
        if judged := sum(each["judged"] for each in group):
            name = f"{low + 1}" if low < 10 else f"{low + 1}-{low + len(group)}"
            share = sum(each["accepted"] for each in group) / judged
            text.append(f"{name:>12}{judged:>9}  {share:>8.1%}")
    return "\n".join(text)
