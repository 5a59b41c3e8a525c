"""Rounds on disk, one JSON object per line: a header for each run, then its rounds."""

import itertools
import json
import logging
import os
import threading
from collections import defaultdict, deque
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import failfast_vllm
from failfast_vllm.drafting.records import Round

logger = logging.getLogger("vllm.failfast")

FORMAT = "failfast_trace"  # the header's first key; its value is the version of the format
VERSION = 1
FLUSH_SECONDS = 0.5
MAX_PENDING = 32768  # lines that wait for a slow disk, some 50 MB


class TraceWriter:
    """Appends rounds to a file from a thread of its own; the engine never waits for the disk.

    The prompt is never in it; an answer may end inside the last round that its request emitted.
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

    def observe(self, rounds: Sequence[Round]) -> None:
        """Take down verified rounds."""
        if self._stopped.is_set():
            return
        self._pending.extend(self._line(verified) for verified in rounds)
        if len(self._pending) > MAX_PENDING:
            self._stop(f"{MAX_PENDING} rounds wait for the disk")

    def _line(self, verified: Round) -> dict[str, Any]:
        confidences = verified.confidences[: verified.num_verified].tolist()
        line = {
            "step": verified.step,  # of the engine, from 1: the one that verified the round
            "seqs": verified.num_seqs,  # sequences in that step
            "request": self._numbers[verified.req_id],  # 0, 1, ... by their first rounds
            "known": verified.known_len,  # tokens of prompt and answer before the round
            "drafted": verified.num_verified,  # tokens that the target verified; 0: a plain step
            "passes": verified.num_passes,  # draft passes that the draft took
            "rows": verified.num_rows,  # rows of this sequence in them, commits included
            "accepted": verified.num_accepted,  # of these, kept; the target adds one
            # of the drafted tokens, as far as a pass drafted them
            "confidences": [round(p, 3) for p in confidences],
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


def is_trace(path: Path) -> bool:
    """Whether a file is empty or starts like a trace."""
    start = f'{{"{FORMAT}":'.encode()
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(len(start)) in (b"", start)
