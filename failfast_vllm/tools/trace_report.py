"""`failfast trace`: a summary of recorded rounds, one request round by round, or a recording."""

import argparse
import json
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from failfast_vllm.observe.counters import NUM_BINS
from failfast_vllm.observe.trace import Round, Trace, read
from failfast_vllm.tools import demo

LONG_DRAFT = 30  # tokens
HISTOGRAM_EDGES = (1, 5, 10, 11, 20, 21, 30, 31, 40, 41, 50, 51, 60, 61)  # a bin starts at each
HEADER_KEYS = ("dtype", "policy", "confidence_threshold", "draft_increment", "load_aware", "date")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `failfast trace`."""
    parser.add_argument("file", metavar="FILE.jsonl", type=Path)
    parser.add_argument("--request", type=int, metavar="I", help="its rounds, one line each")
    parser.add_argument(
        "--record", action="store_true", help="answer held-out prompts into FILE.jsonl first"
    )
    parser.add_argument("--ids", action="store_true", help="record token ids, too")
    demo.add_answer_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Record rounds if asked to, and print what the file holds."""
    if args.record:
        demo.record(args.file, args.num_prompts, args.max_tokens, args.ids)
    found = read(args.file)
    if args.request is None:
        print(json.dumps(summarize(found), indent=2) if args.json else render(found))
        return 0
    rounds = found.of_request(args.request)
    print(json.dumps({"rounds": [r._asdict() for r in rounds]}) if args.json else drawn(rounds))
    return 0


def summarize(trace: Trace) -> dict[str, Any]:
    """The figures of a trace; `drafts` are its rounds that verified a draft.

    The acceptance length counts the bonus, as vLLM does; a position or a confidence is judged if
    all tokens before it in the draft were accepted. Means of nothing are 0.
    """
    drafts = [r for r in trace.rounds if r.drafted]
    longest = max((r.drafted for r in drafts), default=0)
    return {
        "runs": trace.headers,
        "requests": len({r.request for r in trace.rounds}),
        "steps": len(trace.rounds) - len(drafts),  # without a draft
        "rounds": len(drafts),
        "emitted": sum(r.accepted + 1 for r in trace.rounds),
        "drafted": sum(r.drafted for r in drafts),
        "accepted": sum(r.accepted for r in drafts),
        "acceptance_length": _mean([r.accepted + 1 for r in drafts]),
        "passes_per_round": _mean([r.passes for r in drafts]),
        "rows_per_pass": sum(r.rows for r in drafts) / max(1, sum(r.passes for r in drafts)),
        "sequences_per_step": _mean([r.seqs for r in drafts]),
        "share_of_long_drafts": _mean([r.drafted >= LONG_DRAFT for r in drafts]),
        "draft_lens": _histogram([r.drafted for r in drafts], longest),
        "acceptance_by_position": [
            {
                "judged": sum(r.drafted > i and r.accepted >= i for r in drafts),
                "accepted": sum(r.accepted > i for r in drafts),
            }
            for i in range(longest)
        ],
        "reliability": _reliability(drafts),
    }


def _reliability(drafts: Sequence[Round]) -> list[dict[str, Any]]:
    bins = defaultdict[int, list[tuple[float, bool]]](list)  # confidence, and whether accepted
    for r in drafts:
        for position, confidence in enumerate(r.confidences[: r.accepted + 1]):
            where = min(int(confidence * NUM_BINS), NUM_BINS - 1)
            bins[where].append((confidence, position < r.accepted))
    return [
        {
            "low": where / NUM_BINS,
            "judged": len(judged),
            "confidence": _mean([confidence for confidence, _ in judged]),
            "acceptance": _mean([accepted for _, accepted in judged]),
        }
        for where, judged in sorted(bins.items())
    ]


def _histogram(lens: Sequence[int], longest: int) -> list[dict[str, int]]:
    """Shortest and longest draft of each bin, and how many; from 1 token on."""
    found = []
    for low, after in zip(HISTOGRAM_EDGES, (*HISTOGRAM_EDGES[1:], 1 << 30), strict=True):
        if low <= longest:
            count = sum(low <= length < after for length in lens)
            found.append({"from": low, "to": min(after - 1, max(longest, low)), "count": count})
    return found


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
    by_position = figures["acceptance_by_position"]
    judged, accepted = Counter[str](), Counter[str]()
    for i, each in enumerate(by_position):  # the first ten (from 1) each, the others by tens
        low = i // 10 * 10
        name = f"{i + 1}" if i < 10 else f"{low + 1}-{min(low + 10, len(by_position))}"
        judged[name] += each["judged"]
        accepted[name] += each["accepted"]
    for name in filter(judged.get, judged):
        text.append(f"{name:>12}{judged[name]:>9}  {accepted[name] / judged[name]:>8.1%}")
    text += ["", "confidence     judged   mean  accepted"]
    for low, count, confidence, share in (each.values() for each in figures["reliability"]):
        name = f"{low:.1f}-{low + 1 / NUM_BINS:.1f}"
        text.append(f"{name:>12}{count:>9}{confidence:>7.3f}{share:>10.1%}")
    return text


def drawn(rounds: Sequence[Round]) -> str:
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
