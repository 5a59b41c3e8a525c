"""`failfast trace`: what a server has recorded, in a few figures."""

import argparse
import json
from pathlib import Path
from statistics import mean
from typing import Any

from failfast_vllm.observe.trace import Trace, read


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `failfast trace`."""
    parser.add_argument("file", metavar="FILE.jsonl", type=Path)


def run(args: argparse.Namespace) -> int:
    """Print what the file holds."""
    figures = summarize(read(args.file))
    lines = [f"{name:<24}{json.dumps(value)}" for name, value in figures.items()]
    print(json.dumps(figures, indent=2) if args.json else "\n".join(lines))
    return 0


def summarize(trace: Trace) -> dict[str, Any]:
    """The figures of a trace; `rounds` are those that verified a draft.

    The acceptance length counts the bonus, as vLLM does; of a position: the share accepted of the
    tokens there whose draft was right up to them. Means of nothing are 0.
    """
    drafts = [r for r in trace.rounds if r.drafted]
    longest = max((r.accepted for r in drafts), default=0)
    judged = [[r for r in drafts if r.drafted > i and r.accepted >= i] for i in range(longest)]
    return {
        "run": trace.headers[-1],  # the last of those in the file
        "requests": len({r.request for r in trace.rounds}),
        "steps_without_draft": len(trace.rounds) - len(drafts),
        "rounds": len(drafts),
        "emitted": sum(r.accepted + 1 for r in trace.rounds),
        "drafted": sum(r.drafted for r in drafts),
        "accepted": sum(r.accepted for r in drafts),
        "copied": sum(r.drafted - len(r.confidences) for r in drafts),
        "copied_accepted": sum(max(0, r.accepted - len(r.confidences)) for r in drafts),
        "acceptance_length": round(mean([r.accepted + 1 for r in drafts] or [0]), 3),
        "passes_per_round": round(mean([r.passes for r in drafts] or [0]), 3),
        "sequences_per_step": round(mean([r.seqs for r in drafts] or [0]), 3),
        "acceptance_by_position": [
            round(mean(r.accepted > i for r in found), 3) for i, found in enumerate(judged)
        ],
    }
