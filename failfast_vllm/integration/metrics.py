"""Prometheus metrics: counted in the worker, added up by the scheduler, shown by the API server.

    worker        `Counts`, one list of integers per step, on the drafts that vLLM fetches
    scheduler     the list travels behind the positions of `SpecDecodingStats`, which no reader of
                  vLLM looks at, so that vLLM's own messages need no new field
    API server    `FailFastStatLogger`, one of vLLM's stat loggers

vLLM would load a stat logger by entry point, too, but then in every server, and that switches
statistics on where `--disable-log-stats` has switched them off. So the logger is handed to engines
that were asked for failfast only. docs/metrics.md lists the series.
"""

from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from vllm.v1.metrics.loggers import AggregateStatLoggerBase

from failfast_vllm.drafting.records import STOP_REASONS
from failfast_vllm.observe.counters import CONFIDENCE_SCALE, NUM_BINS, NUM_COUNTS, SCALARS

if TYPE_CHECKING:
    from prometheus_client import Counter

LENGTH_BUCKETS = (0, 1, 2, 4, 6, 8, 10, 12, 16, 20, 30, 40, 60, 128)


class FailFastStatLogger(AggregateStatLoggerBase):
    """Shows what arrives in the scheduler's statistics, with vLLM's labels."""

    def __init__(self, vllm_config: Any, engine_indexes: list[int]) -> None:
        from prometheus_client import REGISTRY, Counter, Gauge, Histogram

        for collector in list(getattr(REGISTRY, "_collector_to_names", ())):  # as vLLM does
            if getattr(collector, "_name", "").startswith("failfast:"):
                REGISTRY.unregister(collector)
        self.labels = {
            engine: (vllm_config.model_config.served_model_name, str(engine))
            for engine in engine_indexes
        }
        self.totals = {engine: np.zeros((3, NUM_BINS)) for engine in engine_indexes}
        names = ["model_name", "engine"]

        def counter(name: str, text: str, *extra: str) -> "Counter":
            return Counter(f"failfast:{name}", text, [*names, *extra])

        self.scalars: dict[str, Counter] = {
            "draft_passes": counter("draft_passes", "Forward passes of the drafter."),
            "draft_rows": counter("draft_rows", "Rows of these passes."),
            "draft_us": counter("draft_seconds", "Time spent on drafts."),
            "verify_us": counter("verify_seconds", "Time of steps that verified drafts."),
            "steps": counter("draft_steps", "Engine steps that looked at drafting."),
        }
        self.tokens: tuple[Counter, Counter] = (
            counter("drafted_tokens", "Draft tokens that were verified."),
            counter("accepted_tokens", "Draft tokens that were accepted."),
        )
        self.stops: Counter = counter("draft_stops", "Drafts made, by what ended them.", "reason")
        self.bins: tuple[Counter, ...] = (
            counter("confidence_tokens", "Judged draft tokens, by confidence.", "bin"),
            counter("confidence_accepted_tokens", "Accepted ones of these.", "bin"),
            counter("confidence_sum", "Sum of their confidences.", "bin"),
        )
        self.lengths: tuple[Histogram, Histogram] = (
            Histogram("failfast:draft_length", "Tokens per draft.", names, buckets=LENGTH_BUCKETS),
            Histogram(
                "failfast:accepted_length", "Of them accepted.", names, buckets=LENGTH_BUCKETS
            ),
        )
        self.calibration_error: Gauge = Gauge(
            "failfast:calibration_error",
            "Expected calibration error of the drafter's confidences since the start.",
            names,
            multiprocess_mode="mostrecent",
        )

    def record(
        self,
        scheduler_stats: Any,
        iteration_stats: Any,
        mm_cache_stats: Any = None,
        engine_idx: int = 0,
    ) -> None:
        """Called by vLLM with the statistics of one engine step."""
        stats = scheduler_stats.spec_decoding_stats if scheduler_stats is not None else None
        if stats is None:
            return
        labels, num_positions = self.labels[engine_idx], stats.num_spec_tokens
        drafted, accepted = stats.num_draft_tokens_per_pos, stats.num_accepted_tokens_per_pos
        for histogram, per_position in zip(
            self.lengths, (drafted[:num_positions], accepted[:num_positions]), strict=True
        ):
            child = histogram.labels(*labels)
            longer = [stats.num_drafts, *per_position, 0]  # drafts of at least i tokens
            for length in range(num_positions + 1):
                for _ in range(longer[length] - longer[length + 1]):
                    child.observe(length)
                if not longer[length + 1]:
                    break
        for counter, total in zip(
            self.tokens, (stats.num_draft_tokens, stats.num_accepted_tokens), strict=True
        ):
            counter.labels(*labels).inc(total)
        self._show(drafted[num_positions:], labels, self.totals[engine_idx])

    def _show(
        self, counts: list[int], labels: tuple[str, str], totals: npt.NDArray[np.float64]
    ) -> None:
        for begin in range(0, len(counts), NUM_COUNTS):  # one list per step that has ended
            scalars, stops, bins = np.split(
                np.array(counts[begin : begin + NUM_COUNTS]),
                [len(SCALARS), len(SCALARS) + len(STOP_REASONS)],
            )
            for name, value in zip(SCALARS, scalars.tolist(), strict=True):
                self.scalars[name].labels(*labels).inc(value / 1e6 if "_us" in name else value)
            for reason, value in zip(STOP_REASONS, stops.tolist(), strict=True):
                self.stops.labels(*labels, reason).inc(value)
            table = bins.reshape(3, NUM_BINS) / np.array([[1], [1], [CONFIDENCE_SCALE]])
            totals += table
            for counter, row in zip(self.bins, table.tolist(), strict=True):
                for i, value in enumerate(row):
                    counter.labels(*labels, f"{(i + 0.5) / NUM_BINS:.2f}").inc(value)
        if counts and totals[0].any():
            error = np.abs(totals[1] - totals[2]).sum() / totals[0].sum()
            self.calibration_error.labels(*labels).set(float(error))

    def log_engine_initialized(self) -> None:
        """Nothing to say."""
