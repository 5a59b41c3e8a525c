"""Rounds on disk: what a server drafted and the target accepted, one JSON object per line.

The first rank writes it if the speculative config says `"trace": "FILE.jsonl"`; `failfast trace`
reads it. The first line of each run is a header, each other line a round:

    step         of the engine, from 1: the one that verified the round
    seqs         sequences in that step
    request      0, 1, ... in the order of their first rounds
    known        tokens of prompt and answer before the round
    drafted      tokens that the target verified; 0 = a plain step
    passes       draft passes that the draft took
    rows         rows of this sequence in them, blocks that they committed included
    accepted     drafted tokens that the target kept; it adds one of its own
    confidences  of the drafted tokens, as far as a pass drafted them

and with `"trace_ids": true` also `id`, `draft_ids` and `emitted_ids`. Never the prompt. An answer
may end inside the last round that its request emitted. No vLLM, no torch.
"""

import json
import logging
import math
import os
import threading
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import failfast_vllm

logger = logging.getLogger("vllm.failfast")

FORMAT = "failfast_trace"  # the header's first key; its value is the version of the format
VERSION = 1
FLUSH_SECONDS = 0.5
MAX_PENDING = 32768  # lines that wait for a slow disk, some 50 MB
LONG_DRAFT = 30  # tokens
HISTOGRAM_EDGES = (1, 5, 10, 11, 20, 21, 30, 31, 40, 41, 50, 51, 60, 61)  # a bin starts at each


class Verified(Protocol):
    """What a line says of a round; `session.Round` does."""

    @property
    def req_id(self) -> str: ...
    @property
    def drafted(self) -> list[int]: ...
    @property
    def emitted(self) -> list[int]: ...
    @property
    def num_passes(self) -> int: ...
    @property
    def confidences(self) -> list[float]: ...
    @property
    def known_len(self) -> int: ...
    @property
    def num_rows(self) -> int: ...
    @property
    def step(self) -> int: ...
    @property
    def num_seqs(self) -> int: ...


class TraceWriter:
    """Appends rounds to a file from a thread of its own; the engine never waits for the disk.

    What fails (a full disk, say) ends the trace with one warning, and nothing else.

    Args:
        header: of the run, in addition to the format, this package's version and the date.
        with_ids: whether lines hold the request's id and the round's token ids.
    """

    def __init__(self, path: str | Path, header: Mapping[str, Any], with_ids: bool = False) -> None:
        self.path = Path(path)
        self.with_ids = with_ids
        self._requests: dict[str, int] = {}
        self._num_requests = 0
        date = datetime.now(timezone.utc).isoformat(timespec="seconds")
        about = {FORMAT: VERSION, "version": failfast_vllm.__version__, "date": date}
        self._pending = deque([{**about, **header}])
        self._stopped = threading.Event()
        self._lock = threading.Lock()  # one flush at a time
        self._thread = threading.Thread(target=self._run, name="failfast-trace", daemon=True)
        self._thread.start()

    def __call__(self, verified: Verified) -> None:
        """Take down a round."""
        if self._stopped.is_set():
            return
        request = self._requests.get(verified.req_id)
        if request is None:
            request = self._requests[verified.req_id] = self._num_requests
            self._num_requests += 1
        line = {
            "step": verified.step,
            "seqs": verified.num_seqs,
            "request": request,
            "known": verified.known_len,
            "drafted": len(verified.drafted),
            "passes": verified.num_passes,
            "rows": verified.num_rows,
            "accepted": len(verified.emitted) - 1,
            "confidences": [round(confidence, 3) for confidence in verified.confidences],
        }
        if self.with_ids:
            line |= {
                "id": verified.req_id,
                "draft_ids": verified.drafted,
                "emitted_ids": verified.emitted,
            }
        self._pending.append(line)
        if len(self._pending) > MAX_PENDING:
            self._stop(f"{MAX_PENDING} rounds wait for the disk")

    def forget(self, req_ids: Iterable[str]) -> None:
        """The requests have ended; another with such an id is another."""
        for req_id in req_ids:
            self._requests.pop(req_id, None)

    def flush(self) -> None:
        """Write what waits."""
        with self._lock:
            pending = self._pending
            lines = [pending.popleft() for _ in range(len(pending))]
            if self._stopped.is_set() or not lines:
                return
            text = "".join(json.dumps(line, separators=(",", ":")) + "\n" for line in lines)
            try:
                if FORMAT in lines[0] and _ends_inside_a_line(self.path):
                    text = "\n" + text  # of a run that was killed
                with self.path.open("a", encoding="utf-8") as file:
                    file.write(text)
            except OSError as error:
                self._stop(str(error))

    def close(self) -> None:
        """Write the rest and end."""
        self.flush()
        self._stopped.set()

    def _run(self) -> None:
        while not self._stopped.wait(FLUSH_SECONDS):
            self.flush()

    def _stop(self, reason: str) -> None:
        self._stopped.set()
        self._pending = deque()  # not cleared: the other thread may be at it
        logger.warning("failfast: the trace %s ends here (%s).", self.path, reason)


def _ends_inside_a_line(path: Path) -> bool:
    if not path.is_file() or not path.stat().st_size:
        return False
    with path.open("rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read() != b"\n"


class Round(NamedTuple):
    """One line of a trace; see the module's docstring."""

    step: int
    seqs: int
    request: int  # over all runs of the file
    known: int
    drafted: int
    passes: int
    rows: int
    accepted: int
    confidences: tuple[float, ...]

    @property
    def judged(self) -> int:
        """Tokens with a confidence that the target judged: up to the first that it rejected."""
        return min(self.accepted + 1, self.drafted, len(self.confidences))


@dataclass(frozen=True)
class Trace:
    """A file's rounds, in its order."""

    headers: Sequence[Mapping[str, Any]]  # one per run
    rounds: Sequence[Round]

    @property
    def header(self) -> Mapping[str, Any]:
        """Of the last run."""
        return self.headers[-1]

    def of_request(self, request: int) -> list[Round]:
        """The rounds of one request; raises ValueError on an unknown one."""
        rounds = [r for r in self.rounds if r.request == request]
        if not rounds:
            num = len({r.request for r in self.rounds})
            raise ValueError(f"--request must be one of the trace's {num}, from 0; got {request}.")
        return rounds

    def by_request(self) -> list[list[Round]]:
        """The rounds of each request, in order."""
        requests: dict[int, list[Round]] = {}
        for r in self.rounds:
            requests.setdefault(r.request, []).append(r)
        return list(requests.values())


def read(path: str | Path) -> Trace:
    """Read a trace, also while it grows.

    A line that is cut at the end of the file, or before the next run, is left out.

    Raises:
        ValueError: no trace, or a damaged line, with its number.
    """
    try:
        text = Path(path).read_bytes().decode("utf-8", errors="replace")
    except OSError as error:
        raise ValueError(
            f"cannot read {path} ({error.strerror}); give a file that a server has written, "
            "see --record."
        ) from None
    lines = text.split("\n")[:-1]  # behind the last newline: nothing, or a line that is cut
    headers: list[dict[str, Any]] = []
    rounds: list[Round] = []
    first_request = 0  # of this run
    for number, line in enumerate(lines, 1):
        fields = _object(line)
        if fields is not None and FORMAT in fields:
            if fields[FORMAT] != VERSION:
                raise ValueError(
                    f"{path}, line {number}: must be of trace format {VERSION}; "
                    f"got {fields[FORMAT]!r}. Read it with the version that wrote it."
                )
            headers.append(fields)
            first_request = max((r.request + 1 for r in rounds), default=0)
            continue
        if not headers:
            raise ValueError(f"{path}, line 1: must be a trace's header; got {line[:40]!r}.")
        found = fields and _round(fields)
        if found:
            rounds.append(found._replace(request=found.request + first_request))
        elif number == len(lines) or not _starts_run(lines[number]):
            raise ValueError(
                f"{path}, line {number}: must be a round; got {line[:40]!r}. Remove the line."
            )
    if not headers:
        raise ValueError(f"{path} is empty; wait until the server has run a step.")
    return Trace(headers, rounds)


def is_trace(path: Path) -> bool:
    """Whether a file is empty or starts like a trace."""
    start = f'{{"{FORMAT}":'.encode()
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(len(start)) in (b"", start)


def _starts_run(line: str) -> bool:
    return FORMAT in (_object(line) or ())


def _object(line: str) -> dict[str, Any] | None:
    try:
        found = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def _round(fields: Mapping[str, Any]) -> Round | None:
    """The round that a line holds, or None."""
    counts = [fields.get(name) for name in Round._fields[:-1]]
    confidences = fields.get("confidences")
    if not all(type(count) is int and count >= 0 for count in counts):
        return None
    if not isinstance(confidences, list) or not all(
        isinstance(p, int | float) and 0 <= p <= 1 for p in confidences
    ):
        return None
    found = Round._make([*counts, tuple(confidences)])
    fits = len(confidences) <= found.drafted and found.accepted <= found.drafted
    return found if fits else None


class Decile(NamedTuple):
    """Judged tokens of one tenth of confidences."""

    low: float
    judged: int
    confidence: float  # mean
    acceptance: float  # accepted share


@dataclass(frozen=True)
class Summary:
    """What `failfast trace` prints. `drafts` are the rounds that verified a draft."""

    trace: Trace

    @property
    def drafts(self) -> list[Round]:
        return [r for r in self.trace.rounds if r.drafted]

    @property
    def acceptance_length(self) -> float:
        """Tokens per draft with the bonus, vLLM's definition; 0 without any."""
        return _mean([r.accepted + 1 for r in self.drafts])

    @property
    def acceptance_by_position(self) -> list[tuple[int, int]]:
        """Per position in a draft, of the tokens behind accepted ones: how many, how many kept."""
        longest = max((r.drafted for r in self.drafts), default=0)
        return [
            (
                sum(r.drafted > i and r.accepted >= i for r in self.drafts),
                sum(r.accepted > i for r in self.drafts),
            )
            for i in range(longest)
        ]

    @property
    def reliability(self) -> list[Decile]:
        """By tenths of the confidence, empty ones left out; tokens behind a rejection unseen."""
        tenths: dict[int, list[tuple[float, bool]]] = {}
        for r in self.drafts:
            for i, confidence in enumerate(r.confidences[: r.judged]):
                tenth = min(math.floor(confidence * 10 + 1e-9), 9)
                tenths.setdefault(tenth, []).append((confidence, i < r.accepted))
        return [
            Decile(
                tenth / 10,
                len(seen),
                _mean([confidence for confidence, _ in seen]),
                _mean([kept for _, kept in seen]),
            )
            for tenth, seen in sorted(tenths.items())
        ]

    @property
    def draft_lens(self) -> list[tuple[int, int, int]]:
        """The histogram: shortest, longest, and how many; from 1 token on."""
        longest = max((r.drafted for r in self.drafts), default=0)
        found = []
        for low, after in zip(HISTOGRAM_EDGES, (*HISTOGRAM_EDGES[1:], 1 << 30), strict=True):
            if low <= longest:
                count = sum(low <= r.drafted < after for r in self.drafts)
                found.append((low, min(after - 1, max(longest, low)), count))
        return found

    def to_dict(self) -> dict[str, Any]:
        drafts = self.drafts
        return {
            "runs": self.trace.headers,
            "requests": len({r.request for r in self.trace.rounds}),
            "steps": len(self.trace.rounds) - len(drafts),  # without a draft
            "rounds": len(drafts),
            "emitted": sum(r.accepted + 1 for r in self.trace.rounds),
            "drafted": sum(r.drafted for r in drafts),
            "accepted": sum(r.accepted for r in drafts),
            "acceptance_length": self.acceptance_length,
            "passes_per_round": _mean([r.passes for r in drafts]),
            "rows_per_pass": sum(r.rows for r in drafts) / max(1, sum(r.passes for r in drafts)),
            "sequences_per_step": _mean([r.seqs for r in drafts]),
            "share_of_long_drafts": _mean([r.drafted >= LONG_DRAFT for r in drafts]),
            "draft_lens": [
                {"from": low, "to": high, "count": count} for low, high, count in self.draft_lens
            ],
            "acceptance_by_position": [
                {"judged": judged, "accepted": accepted}
                for judged, accepted in self.acceptance_by_position
            ],
            "reliability": [decile._asdict() for decile in self.reliability],
        }


def render(summary: Summary) -> str:
    """The report for a reader."""
    figures, header = summary.to_dict(), summary.trace.header
    text = [describe(header)]
    if len(summary.trace.headers) > 1:
        text.append(f"the last of {len(summary.trace.headers)} runs in this file")
    text += [
        f"  {label:<24}{value}"
        for label, value in (
            ("requests", figures["requests"]),
            ("rounds", f"{figures['rounds']}, and {figures['steps']} without a draft"),
            ("tokens", figures["emitted"]),
            ("acceptance length", f"{figures['acceptance_length']:.2f} tokens per round"),
            ("draft passes", f"{figures['passes_per_round']:.2f} per round"),
            ("rows", f"{figures['rows_per_pass']:.1f} per sequence and pass"),
            ("sequences", f"{figures['sequences_per_step']:.1f} per step"),
            (f"drafts of {LONG_DRAFT} or more", f"{figures['share_of_long_drafts']:.1%}"),
        )
    ]
    text += ["", "draft length   rounds"]
    for low, high, count in summary.draft_lens:
        name = f"{low}" if low == high else f"{low}-{high}"
        share = count / len(summary.drafts)
        text.append(f"{name:>12}{count:>9}  {'#' * round(40 * share)}")
    text += ["", "position       judged  accepted"]
    for name, judged, accepted in _positions(summary.acceptance_by_position):
        text.append(f"{name:>12}{judged:>9}  {accepted / judged:>8.1%}")
    text += ["", "confidence     judged   mean  accepted"]
    for decile in summary.reliability:
        name = f"{decile.low:.1f}-{decile.low + 0.1:.1f}"
        text.append(
            f"{name:>12}{decile.judged:>9}{decile.confidence:>7.3f}{decile.acceptance:>10.1%}"
        )
    return "\n".join(text)


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


def _positions(by_position: list[tuple[int, int]]) -> list[tuple[str, int, int]]:
    """The first ten positions (from 1) each, the others by tens; unjudged ones left out."""
    groups = [(i, i + 1) for i in range(10)]
    groups += [(low, low + 10) for low in range(10, max(10, len(by_position)), 10)]
    found = []
    for low, high in groups:
        judged = sum(seen for seen, _ in by_position[low:high])
        accepted = sum(kept for _, kept in by_position[low:high])
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
