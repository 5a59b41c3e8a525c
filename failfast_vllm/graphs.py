"""Draft passes of fixed shapes, so that a captured CUDA graph can be replayed for many batches.

A pass is padded to the smallest bucket of (sequences, rows) that holds it, in buffers that never
move. Padding sequences have no rows; padding rows belong to no sequence, commit nothing, and what
they compute is dropped. Beyond the largest bucket, and wherever capturing failed, passes run as
they are. **No GPU has run the capture**; the padding is tested on a CPU.
"""

import logging
from bisect import bisect_left
from collections.abc import Callable
from typing import NamedTuple

import torch

from failfast_vllm.drafter import DraftBatch

logger = logging.getLogger("vllm.failfast")

SEQ_BUCKETS = (1, 2, 4, 8, 16, 32, 64)
ROWS_PER_SEQ = (16, 32, 48)  # a live block has at most 31 known tokens, and 10 masks behind it

Run = Callable[[DraftBatch], torch.Tensor]
Replay = Callable[[], torch.Tensor]
Capture = Callable[[Callable[[], torch.Tensor]], Replay]


class Bucket(NamedTuple):
    """The shape of one captured pass."""

    num_seqs: int
    num_rows: int


def make_buckets(max_num_seqs: int, max_num_rows: int) -> list[Bucket]:
    """All buckets up to the limits, sequences first, then rows, rising."""
    return [
        Bucket(num_seqs, num_seqs * rows)
        for num_seqs in SEQ_BUCKETS
        for rows in ROWS_PER_SEQ
        if num_seqs <= max_num_seqs and num_seqs * rows <= max_num_rows
    ]


def choose_bucket(buckets: list[Bucket], num_seqs: int, num_rows: int) -> Bucket | None:
    """The bucket with the fewest rows that holds the pass (then the fewest sequences), or None."""
    first = bisect_left(buckets, (num_seqs, 0))
    fitting = [bucket for bucket in buckets[first:] if bucket.num_rows >= num_rows]
    return min(fitting, key=lambda bucket: (bucket.num_rows, bucket.num_seqs), default=None)


class BucketedPasses:
    """Runs passes through the captured bucket that fits, else through `run`.

    Args:
        run: a pass as it is: hidden states [num_rows, hidden_size] of a `DraftBatch`.
        buckets: see `make_buckets`.
        table_width: columns of every block table.
    """

    def __init__(
        self,
        run: Run,
        buckets: list[Bucket],
        table_width: int,
        device: torch.device,
    ) -> None:
        self.run = run
        self.buckets = buckets
        self.replays: dict[Bucket, Replay] = {}
        num_seqs = max((bucket.num_seqs for bucket in buckets), default=0)
        num_rows = max((bucket.num_rows for bucket in buckets), default=0)
        self.rows = torch.zeros(3, num_rows, dtype=torch.int64, device=device)
        self.query_start_loc = torch.zeros(num_seqs + 1, dtype=torch.int64, device=device)
        self.committed_lens = torch.zeros(num_seqs, dtype=torch.int64, device=device)
        self.block_table = torch.zeros(num_seqs, table_width, dtype=torch.int32, device=device)

    def capture(self, capture: Capture) -> None:
        """Capture every bucket, the largest first; a failure leaves passes as they are."""
        self.replays.clear()
        try:
            for bucket in sorted(self.buckets, key=lambda bucket: -bucket.num_rows):
                batch = self._view(bucket)
                self._fill(bucket, None)
                self.replays[bucket] = capture(lambda batch=batch: self.run(batch))  # type: ignore[misc]
        except Exception as error:  # whatever it is, drafting works without graphs
            self.replays.clear()
            logger.warning("failfast: draft passes run eagerly; capturing failed: %s", error)

    def __call__(self, batch: DraftBatch) -> torch.Tensor:
        num_seqs, num_rows = batch.committed_lens.numel(), batch.input_ids.numel()
        bucket = choose_bucket(self.buckets, num_seqs, num_rows) if self.replays else None
        if bucket is None:
            return self.run(batch)
        self._fill(bucket, batch)
        return self.replays[bucket]()[:num_rows]

    def _view(self, bucket: Bucket) -> DraftBatch:
        """The buffers in a bucket's shape."""
        num_seqs, num_rows = bucket
        return DraftBatch(
            input_ids=self.rows[0, :num_rows],
            positions=self.rows[1, :num_rows],
            query_start_loc=self.query_start_loc[: num_seqs + 1],
            committed_lens=self.committed_lens[:num_seqs],
            slot_mapping=self.rows[2, :num_rows],
            block_table=self.block_table[:num_seqs],
        )

    def _fill(self, bucket: Bucket, batch: DraftBatch | None) -> None:
        """Copy a pass into the bucket's buffers. Padding keeps what an earlier pass left there."""
        view = self._view(bucket)
        num_seqs = num_rows = 0
        if batch is not None:
            num_seqs, num_rows = batch.committed_lens.numel(), batch.input_ids.numel()
            view.input_ids[:num_rows] = batch.input_ids
            view.positions[:num_rows] = batch.positions
            view.query_start_loc[: num_seqs + 1] = batch.query_start_loc
            view.committed_lens[:num_seqs] = batch.committed_lens
            view.block_table[:num_seqs] = batch.block_table
            assert view.slot_mapping is not None
            view.slot_mapping[:num_rows] = -1 if batch.slot_mapping is None else batch.slot_mapping
        assert view.slot_mapping is not None
        view.slot_mapping[num_rows:] = -1
        view.query_start_loc[num_seqs:] = num_rows


def cuda_graph(run: Callable[[], torch.Tensor]) -> Replay:
    """Capture `run` after one warm-up on a side stream (PyTorch's own recipe)."""
    side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = run()

    def replay() -> torch.Tensor:
        graph.replay()
        return output

    return replay
