"""Draft passes of fixed shapes, so that a captured CUDA graph can be replayed for many batches.

Padding sequences have no rows; padding rows belong to no sequence, commit nothing, and what they
compute is dropped. Beyond the largest bucket, and wherever capturing failed, passes run as they
are. The padding is tested on a CPU, a replay on a GPU.
"""

import functools
import logging
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch

from failfast_vllm.drafting.records import DraftBatch

logger = logging.getLogger("vllm.failfast")

SEQ_BUCKETS = (1, 2, 4, 8, 16, 32, 64)
TILE_ROWS = (16, 64, 128, 192, 256, 320)  # packed rows that whole tiles of the attention hold

Run = Callable[[DraftBatch], torch.Tensor]
Replay = Callable[[], None]
Capture = Callable[[Callable[[], None]], Replay]


class Bucket(NamedTuple):
    """The shape of one padded pass."""

    num_seqs: int
    num_rows: int


def rows_per_seq(group_size: int, diffusion_block_size: int, draft_increment: int) -> list[int]:
    """Rows per sequence that fill whole tiles of the attention kernel, rising.

    The last holds the first pass of a live block: all of its tokens but one, and the masks. A tile
    holds `group_size` query heads of each row: 64 packed rows are 10 rows of six heads.
    """
    longest = diffusion_block_size + draft_increment
    fitting = [rows for p in TILE_ROWS if (rows := p // group_size) >= draft_increment]
    num_shorter = sum(rows < longest for rows in fitting)
    return fitting[: num_shorter + 1] or [longest]


def make_buckets(max_num_seqs: int, max_num_rows: int, rows: list[int]) -> list[Bucket]:
    """All buckets up to the limits, sequences first, then rows, rising."""
    return [
        Bucket(num_seqs, num_seqs * rows_each)
        for num_seqs in SEQ_BUCKETS
        for rows_each in rows
        if num_seqs <= max_num_seqs and num_seqs * rows_each <= max_num_rows
    ]


def choose_bucket(buckets: list[Bucket], num_seqs: int, num_rows: int) -> Bucket | None:
    """The bucket with the fewest rows that holds the pass (then the fewest sequences), or None."""
    fitting = [b for b in buckets if b.num_seqs >= num_seqs and b.num_rows >= num_rows]
    return min(fitting, key=lambda bucket: (bucket.num_rows, bucket.num_seqs), default=None)


class PassGraphs:
    """Captured passes and their buffers, which never move; `table_width` is in pages.

    A bucket is captured with and without the kernels that commit blocks: most passes commit none.
    """

    def __init__(self, buckets: list[Bucket], table_width: int, device: torch.device) -> None:
        self.buckets = buckets
        self.replays: dict[tuple[Bucket, bool], Replay] = {}  # by bucket, and whether it commits
        num_seqs = max((bucket.num_seqs for bucket in buckets), default=0)
        num_rows = max((bucket.num_rows for bucket in buckets), default=0)
        self.rows = torch.zeros(3, num_rows, dtype=torch.int64, device=device)
        self.rows[2] = -1  # captured passes commit nothing
        self.query_start_loc = torch.zeros(num_seqs + 1, dtype=torch.int64, device=device)
        self.committed_lens = torch.zeros(num_seqs, dtype=torch.int64, device=device)
        self.block_table = torch.zeros(num_seqs, table_width, dtype=torch.int32, device=device)
        self.hidden_states: torch.Tensor | None = None  # [num_rows, hidden_size], of all replays

    def capture(self, capture: Capture, run: Run) -> None:
        """Capture every bucket, the largest first; after a failure there are no graphs.

        `run` is a pass as it is: hidden states [num_rows, hidden_size] of a `DraftBatch`.
        """
        self.replays.clear()
        try:
            for bucket in sorted(self.buckets, key=lambda bucket: -bucket.num_rows):
                for commits in (True, False):
                    keep = functools.partial(self._keep, run, self._view(bucket, commits))
                    self.replays[bucket, commits] = capture(keep)
        except Exception as error:  # whatever it is, drafting works without graphs
            self.replays.clear()
            logger.warning("failfast: draft passes run eagerly; capturing failed: %s", error)

    def _keep(self, run: Run, batch: DraftBatch) -> None:
        hidden_states = run(batch)
        if self.hidden_states is None:  # the largest bucket comes first
            self.hidden_states = torch.empty_like(hidden_states)
        self.hidden_states[: len(hidden_states)] = hidden_states

    def replay(self, batch: DraftBatch) -> torch.Tensor | None:
        """Hidden states [num_rows, hidden_size] of a pass, valid until the next; None: no graph."""
        num_seqs, num_rows = batch.committed_lens.numel(), batch.input_ids.numel()
        bucket = choose_bucket(self.buckets, num_seqs, num_rows) if self.replays else None
        if bucket is None:
            return None
        commits = batch.slot_mapping is not None
        view = self._view(bucket, commits)
        for ours, theirs in zip(view, batch, strict=True):
            if ours is not None and theirs is not None:
                ours[: len(theirs)] = theirs
        view.query_start_loc[num_seqs:] = num_rows
        if view.slot_mapping is not None:
            view.slot_mapping[num_rows:] = -1
        self.replays[bucket, commits]()
        assert self.hidden_states is not None
        return self.hidden_states[:num_rows]

    def _view(self, bucket: Bucket, commits: bool) -> DraftBatch:
        """The buffers in a bucket's shape."""
        num_seqs, num_rows = bucket
        return DraftBatch(
            input_ids=self.rows[0, :num_rows],
            positions=self.rows[1, :num_rows],
            query_start_loc=self.query_start_loc[: num_seqs + 1],
            committed_lens=self.committed_lens[:num_seqs],
            slot_mapping=self.rows[2, :num_rows] if commits else None,
            block_table=self.block_table[:num_seqs],
        )


def cuda_graph(run: Callable[[], None], pool: Callable[[], AbstractContextManager[Any]]) -> Replay:
    """Capture `run` on the current stream, which must not be the default one, after a warm-up.

    Args:
        pool: opens the memory pool that graphs share.
    """
    run()
    graph = torch.cuda.CUDAGraph()
    with pool() as handle, torch.cuda.graph(graph, handle, stream=torch.cuda.current_stream()):
        run()
    replay: Replay = graph.replay
    return replay
