"""Rounds on disk, one JSON object per line: a header for each run, and a `Round` for each round."""

import itertools
import json
import logging
import os
import threading
from collections import defaultdict, deque
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, NamedTuple

import failfast_vllm
from failfast_vllm.drafting.records import MAX_SPECULATIVE_TOKENS
from failfast_vllm.drafting.records import Round as Verified
from failfast_vllm.errors import echo

logger = logging.getLogger("vllm.failfast")

FORMAT = "failfast_trace"  # the header's first key; its value is the version of the format
VERSION = 1
FLUSH_SECONDS = 0.5
MAX_PENDING = 32768  # lines that wait for a slow disk, some 50 MB


class TraceWriter:
    """Appends rounds to a file from a thread of its own; the engine never waits for the disk.

    What fails (a full disk, say) ends the trace with one warning. `header` goes after the format,
    this package's version and the date; `with_ids` adds the ids to the lines.
    """

    def __init__(self, path: str | Path, header: Mapping[str, Any], with_ids: bool = False) -> None:
        self.path = Path(path)
        self.with_ids = with_ids
        self._numbers = defaultdict[str, int](itertools.count().__next__)  # of requests
        date = datetime.now(timezone.utc).isoformat(timespec="seconds")
        about = {FORMAT: VERSION, "version": failfast_vllm.__version__, "date": date}
        self._pending = deque([{**about, **header}])
        self._stopped = threading.Event()
        self._lock = threading.Lock()  # one flush at a time
        threading.Thread(target=self._run, name="failfast-trace", daemon=True).start()

    def observe(self, rounds: Sequence[Verified]) -> None:
        """Take down verified rounds."""
        if self._stopped.is_set():
            return
        self._pending.extend(self._line(verified) for verified in rounds)
        if len(self._pending) > MAX_PENDING:
            self._stop(f"{MAX_PENDING} rounds wait for the disk")

    def _line(self, verified: Verified) -> dict[str, Any]:
        line = {
            "step": verified.step,
            "seqs": verified.num_seqs,
            "request": self._numbers[verified.req_id],
            "known": verified.known_len,
            "drafted": verified.num_verified,
            "passes": verified.num_passes,
            "rows": verified.num_rows,
            "accepted": verified.num_accepted,
            "confidences": [round(p, 3) for p in verified.verified_confidences.tolist()],
        }
        if self.with_ids:
            ids = {"draft_ids": verified.drafted, "emitted_ids": list(verified.emitted)}
            line |= {"id": verified.req_id, **ids}
        return line

    def forget(self, req_ids: Iterable[str]) -> None:
        """The requests have ended; another with such an id is another."""
        for req_id in req_ids:
            self._numbers.pop(req_id, None)

    def flush(self) -> None:
        """Write what waits."""
        with self._lock:
            pending = self._pending
            lines = [pending.popleft() for _ in range(len(pending))]
            if self._stopped.is_set() or not lines:
                return
            text = "".join(json.dumps(line, separators=(",", ":")) + "\n" for line in lines)
            try:
                with self.path.open("a+b") as file:
                    if FORMAT in lines[0] and file.tell():
                        file.seek(-1, os.SEEK_END)
                        text = text if file.read() == b"\n" else "\n" + text  # a run was killed
                    file.write(text.encode())
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


class Round(NamedTuple):
    """One line of a trace; with `"trace_ids": true` also `id`, `draft_ids` and `emitted_ids`.

    Never the prompt. An answer may end inside the last round that its request emitted.
    """

    step: int  # of the engine, from 1: the one that verified the round
    seqs: int  # sequences in that step
    request: int  # 0, 1, ... in the order of their first rounds; read back: over all runs
    known: int  # tokens of prompt and answer before the round
    drafted: int  # tokens that the target verified; 0 = a plain step
    passes: int  # draft passes that the draft took
    rows: int  # rows of this sequence in them, blocks that they committed included
    accepted: int  # drafted tokens that the target kept; it adds one of its own
    confidences: tuple[float, ...]  # of the drafted tokens, as far as a pass drafted them


class Trace(NamedTuple):
    """A file's rounds, in its order."""

    headers: Sequence[Mapping[str, Any]]  # one per run
    rounds: Sequence[Round]


def read(path: str | Path) -> Trace:
    """Read a trace, also while it grows; a line cut at its end or before another run is left out.

    Raises:
        ValueError: no trace, or a damaged line, with its number.
    """
    try:
        text = Path(path).read_bytes().decode("utf-8", errors="replace")
    except OSError as error:
        raise ValueError(
            f"cannot read {path} ({error.strerror}); give a file that a server has written."
        ) from None
    lines = text.split("\n")[:-1]  # after the last newline: nothing, or a line that is cut
    headers: list[dict[str, Any]] = []
    rounds: list[Round] = []
    first_request = 0  # of this run
    pairs = itertools.zip_longest(lines, lines[1:], fillvalue="")
    for number, (line, after) in enumerate(pairs, 1):
        where, fields = f"{path}, line {number}:", _object(line)
        if FORMAT in fields:
            if fields[FORMAT] != VERSION:
                raise ValueError(
                    f"{where} must be of trace format {VERSION}; got {echo(fields[FORMAT])}. "
                    "Read it with the version that wrote it."
                )
            headers.append(fields)
            first_request = max((r.request + 1 for r in rounds), default=0)
        elif not headers:
            raise ValueError(f"{where} must be a trace's header; got {line[:40]!r}.")
        elif found := _round(fields):
            rounds.append(found._replace(request=found.request + first_request))
        elif FORMAT not in _object(after):
            raise ValueError(f"{where} must be a round; got {line[:40]!r}. Remove the line.")
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


def _object(line: str) -> dict[str, Any]:
    """The JSON object that a line holds; empty if it holds none."""
    try:
        found = json.loads(line)
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _round(fields: Mapping[str, Any]) -> Round | None:
    counts = [fields.get(name) for name in Round._fields[:-1]]
    confidences = fields.get("confidences")
    in_range = all(type(n) is int and 0 <= n < 2**63 for n in counts)
    if not isinstance(confidences, list) or not in_range:
        return None
    found = Round._make([*counts, tuple(confidences)])
    fits = max(len(confidences), found.accepted) <= found.drafted <= MAX_SPECULATIVE_TOKENS
    sound = all(isinstance(p, int | float) and 0 <= p <= 1 for p in confidences)
    return found if fits and sound else None
