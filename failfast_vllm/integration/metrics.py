"""Prometheus metrics: counted in the worker, added up by the scheduler, shown by the API server.

A worker's counts go with the drafts that vLLM fetches, a list of integers per step, and from the
scheduler on after the positions of `SpecDecodingStats`, where no reader of vLLM looks.
docs/metrics.md lists the series.
"""

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
from vllm.v1.metrics.loggers import AggregateStatLoggerBase

from failfast_vllm.drafting.records import STOP_REASONS
from failfast_vllm.observe.counters import CONFIDENCE_SCALE, NUM_BINS, NUM_COUNTS, NUM_SCALARS

LENGTH_BUCKETS = (0, 1, 2, 4, 6, 8, 10, 12, 16, 20, 30, 40, 60, 128)
LABELS = ("model_name", "engine")
COUNTERS = {  # name: text and further labels; first those of `DraftStats.take`, in their order
    "draft_passes": ("Forward passes of the drafter.",),
    "draft_rows": ("Rows of these passes.",),
    "draft_seconds": ("Time spent on drafts.",),
    "verify_seconds": ("Time of steps that verified drafts.",),
    "draft_steps": ("Engine steps that looked at drafting.",),
    "copied_tokens": ("Draft tokens that were verified and came from the copy lane.",),
    "copied_accepted_tokens": ("Accepted ones of these.",),
    "drafted_tokens": ("Draft tokens that were verified.",),
    "accepted_tokens": ("Draft tokens that were accepted.",),
    "draft_stops": ("Drafts made, by what ended them.", "reason"),
    "confidence_tokens": ("Judged draft tokens, by confidence.", "bin"),
    "confidence_accepted_tokens": ("Accepted ones of these.", "bin"),
    "confidence_sum": ("Sum of their confidences.", "bin"),
}


class FailFastStatLogger(AggregateStatLoggerBase):
    """Shows what arrives in the scheduler's statistics, with vLLM's labels."""

    def __init__(self, vllm_config: Any, engine_indexes: list[int]) -> None:
        from prometheus_client import REGISTRY, Counter, Gauge, Histogram

        for collector in list(getattr(REGISTRY, "_collector_to_names", ())):  # as vLLM does
            if getattr(collector, "_name", "").startswith("failfast:"):
                REGISTRY.unregister(collector)
        model = vllm_config.model_config.served_model_name
        self.labels = {engine: (model, str(engine)) for engine in engine_indexes}
        self.totals = {engine: np.zeros((3, NUM_BINS)) for engine in engine_indexes}
        self.counters = {
            name: Counter(f"failfast:{name}", text, (*LABELS, *extra))
            for name, (text, *extra) in COUNTERS.items()
        }
        self.lengths = [
            Histogram(f"failfast:{name}_length", text, LABELS, buckets=LENGTH_BUCKETS)
            for name, text in (("draft", "Tokens per draft."), ("accepted", "Of them accepted."))
        ]
        self.calibration_error = Gauge(
            "failfast:calibration_error",
            "Expected calibration error of the drafter's confidences since the start.",
            LABELS,
            multiprocess_mode="mostrecent",
        )

    def record(
        self, scheduler_stats: Any, *unused: Any, engine_idx: int = 0, **unused_too: Any
    ) -> None:
        """Called by vLLM with the statistics of one engine step."""
        stats = scheduler_stats.spec_decoding_stats if scheduler_stats is not None else None
        if stats is None:
            return
        num_positions = stats.num_spec_tokens
        drafted, accepted = stats.num_draft_tokens_per_pos, stats.num_accepted_tokens_per_pos
        for histogram, per_position in zip(self.lengths, (drafted, accepted), strict=True):
            child = histogram.labels(*self.labels[engine_idx])
            # drafts of at least i tokens
            longer = [stats.num_drafts, *per_position[:num_positions], 0]
            for length, (num, num_longer) in enumerate(itertools.pairwise(longer)):
                for _ in range(num - num_longer):
                    child.observe(length)
        self._add(engine_idx, "drafted_tokens", stats.num_draft_tokens)
        self._add(engine_idx, "accepted_tokens", stats.num_accepted_tokens)
        self._show(drafted[num_positions:], engine_idx)

    def _add(self, engine: int, name: str, value: float, *extra: str) -> None:
        self.counters[name].labels(*self.labels[engine], *extra).inc(value)

    def _show(self, counts: Sequence[int], engine: int) -> None:
        totals, names = self.totals[engine], list(COUNTERS)
        for begin in range(0, len(counts), NUM_COUNTS):  # one list per step that has ended
            scalars, stops, bins = np.split(
                np.array(counts[begin : begin + NUM_COUNTS]),
                [NUM_SCALARS, NUM_SCALARS + len(STOP_REASONS)],
            )
            for name, value in zip(names, scalars.tolist(), strict=False):
                self._add(engine, name, value / 1e6 if name.endswith("_seconds") else value)
            for reason, value in zip(STOP_REASONS, stops.tolist(), strict=True):
                self._add(engine, "draft_stops", value, reason)
            table = bins.reshape(3, NUM_BINS) / np.array([[1], [1], [CONFIDENCE_SCALE]])
            totals += table
            for name, row in zip(names[-3:], table.tolist(), strict=True):
                for i, value in enumerate(row):
                    self._add(engine, name, value, f"{(i + 0.5) / NUM_BINS:.2f}")
        if counts and totals[0].any():
            error = np.abs(totals[1] - totals[2]).sum() / totals[0].sum()
            self.calibration_error.labels(*self.labels[engine]).set(float(error))

    def log_engine_initialized(self) -> None:
        """Nothing to say."""
