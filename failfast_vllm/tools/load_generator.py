"""Closed loops: a number of requests in flight, each replaced at once when it ends.

`EngineProcess` answers prompts in such a loop and yields a `Run`: what was answered, how fast, and
what became of the drafts. Engines take turns within a run, each on its own clock: a
machine's speed may drift by half within a minute, and ratios of whole runs show little else.
"""

import contextlib
import multiprocessing
import os
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import cycle, islice
from typing import Any, NamedTuple

from failfast_vllm.drafting.records import Round
from failfast_vllm.tools.offline import (
    Prompt,
    TracedRound,
    adapter,
    encode,
    engine,
    model_runner,
    traced,
)
from failfast_vllm.tools.tally import Tally

TURN_SECONDS = 0.25


class Served(NamedTuple):
    """One answered request."""

    num_tokens: int
    ttft_ms: float  # to the first token
    latency_ms: float

    @property
    def tpot_ms(self) -> float:
        """Time per output token after the first."""
        return (self.latency_ms - self.ttft_ms) / max(1, self.num_tokens - 1)


class StepTimes(NamedTuple):
    """Milliseconds, added up over engine steps."""

    num_steps: int
    draft_ms: float
    own_ms: float  # of it outside the draft model; 0 for the methods of vLLM
    verify_ms: float  # the target's pass and sampling
    other_ms: float  # scheduling, detokenising, bookkeeping


@dataclass
class Run:
    """One closed loop of one method."""

    seconds: float
    answers: list[list[int]]  # token ids, in the order of the prompts
    served: list[Served]
    tally: Tally
    trajectory: list[TracedRound]  # of the first answer, where the drafter reports its rounds
    step_times: StepTimes | None = None  # None on a GPU

    @property
    def tokens_per_second(self) -> float:
        return sum(s.num_tokens for s in self.served) / self.seconds


class CallTimes:
    """Adds up the milliseconds inside calls of an engine."""

    def __init__(self) -> None:
        self.ms, self.calls = Counter[str](), Counter[str]()

    def wrap(self, owner: Any, name: str, key: str) -> None:
        """Time `owner.name` under `key` from now on, if there is such a method."""
        original = getattr(owner, name, None)
        if original is None:
            return

        def timed(*args: Any, **more: Any) -> Any:
            began = time.perf_counter()
            try:
                return original(*args, **more)
            finally:
                self.ms[key] += (time.perf_counter() - began) * 1e3  # type: ignore[assignment]
                self.calls[key] += 1

        setattr(owner, name, timed)


class Watch:
    """Tallies an engine's verified drafts and times its steps; must be in the engine's process."""

    def __init__(self, llm: Any, speculative_config: dict[str, Any] | None) -> None:
        from vllm.platforms import current_platform

        from failfast_vllm.observe.counters import DraftStats

        found = adapter(llm)
        stats = getattr(found, "stats", None)
        self._stats = stats if isinstance(stats, DraftStats) else None
        self._adapter = found if self._stats else None
        self._stopwatch = None
        if current_platform.device_type == "cpu":
            self._stopwatch = self._time_calls(llm.llm_engine, model_runner(llm))
        self.begin()
        if self._stats is not None:
            self._stats.on_round, self._stats.drafts_only = self._on_round, True
        elif speculative_config:
            is_draft_model = speculative_config["method"] == "draft_model"
            passes = speculative_config["num_speculative_tokens"] if is_draft_model else 0
            self._count_in(llm.llm_engine.engine_core.engine_core.scheduler, passes)

    @property
    def reports_rounds(self) -> bool:
        return self._stats is not None

    def begin(self) -> None:
        self.tally, self.first_rounds = Tally(), list[Any]()
        self._own_ms_before = self._own_ms()
        if self._stopwatch is not None:
            self._stopwatch.ms.clear()
            self._stopwatch.calls.clear()

    def stood_still(self, seconds: float) -> None:
        """The engine was not asked for that long: not a time for the planner to learn."""
        if self._adapter is not None:
            self._adapter.drafter.planner.stood_still(seconds)

    def step_times(self) -> StepTimes | None:
        """Since `begin`; None on a GPU, where calls return before their work is done."""
        if self._stopwatch is None:
            return None
        ms = self._stopwatch.ms
        in_target = ms["target"] - ms["draft in target"]
        draft_ms = ms["draft in target"] + ms["draft"]
        return StepTimes(
            self._stopwatch.calls["step"],
            draft_ms,
            self._own_ms() - self._own_ms_before,
            in_target,
            ms["step"] - in_target - draft_ms,
        )

    def _own_ms(self) -> float:
        return self._stats.total_ms - self._stats.forward_ms if self._stats else 0.0

    @staticmethod
    def _time_calls(llm_engine: Any, runner: Any) -> CallTimes:
        """failfast drafts when vLLM takes the drafts, other methods while the target samples."""
        stopwatch = CallTimes()
        stopwatch.wrap(llm_engine, "step", "step")
        stopwatch.wrap(runner, "execute_model", "target")
        stopwatch.wrap(runner, "sample_tokens", "target")
        stopwatch.wrap(runner, "propose_draft_token_ids", "draft in target")  # V1
        stopwatch.wrap(getattr(runner, "speculator", None), "propose", "draft in target")  # V2
        stopwatch.wrap(runner, "take_draft_token_ids", "draft")
        return stopwatch

    def _on_round(self, round_: Any) -> None:
        if round_.req_id.split("-")[0] == "0":
            self.first_rounds.append(round_)
        if round_.drafted:
            num_accepted = len(round_.emitted) - 1
            confidences = round_.verified_confidences.tolist()
            self.tally.add(len(round_.drafted), num_accepted, round_.num_passes, confidences)

    def _count_in(self, scheduler: Any, num_passes: int) -> None:
        observe = scheduler.make_spec_decoding_stats

        def counting(
            stats: Any, num_draft_tokens: int, num_accepted_tokens: int, *rest: Any, **more: Any
        ) -> Any:
            if num_draft_tokens:
                self.tally.add(num_draft_tokens, num_accepted_tokens, num_passes, ())
            return observe(stats, num_draft_tokens, num_accepted_tokens, *rest, **more)

        scheduler.make_spec_decoding_stats = counting


class _Answering:
    """Requests that are being answered, by number; seconds are those of the engine's own turns."""

    def __init__(self) -> None:
        self.answers, self.served = dict[int, list[int]](), dict[int, Served]()
        self.prompt_len = 0  # of the first
        self._began, self._first = dict[int, float](), dict[int, float]()

    @property
    def num_in_flight(self) -> int:
        return len(self._began) - len(self.answers)

    def begin(self, i: int, now: float) -> None:
        self._began[i] = now

    def note(self, output: Any, now: float) -> None:
        """Take down what a step has said of a request."""
        i = int(output.request_id.split("-")[0])
        self._first.setdefault(i, now)
        if i == 0:
            self.prompt_len = len(output.prompt_token_ids)
        if output.finished:
            self.answers[i] = list(output.outputs[0].token_ids)
            ttft_ms, latency_ms = ((then - self._began[i]) * 1e3 for then in (self._first[i], now))
            self.served[i] = Served(len(self.answers[i]), ttft_ms, latency_ms)

    def in_order(self, seconds: float, watch: Watch) -> Run:
        """What was answered, in the order of the prompts."""
        trajectory = []
        if watch.reports_rounds:
            trajectory = whole_trajectory(watch.first_rounds, self.prompt_len, self.answers[0])
        order = range(len(self.answers))
        answers, served = [self.answers[i] for i in order], [self.served[i] for i in order]
        return Run(seconds, answers, served, watch.tally, trajectory, watch.step_times())


def closed_loop(
    llm: Any,
    watch: Watch,
    prompts: Sequence[Prompt],
    max_tokens: int,
    concurrency: int,
    num_requests: int,
) -> Iterator[Run | None]:
    """Answer `num_requests` encoded prompts, `concurrency` at a time.

    Yields None after each turn but the last, which brings the run; the time until it is asked to go
    on is not its own.
    """
    from vllm import SamplingParams

    params = SamplingParams(temperature=0.0, max_tokens=max_tokens)
    waiting = enumerate(islice(cycle(prompts), num_requests))
    requests = _Answering()
    watch.begin()
    start = turn = time.perf_counter()
    stood_still = 0.0
    while len(requests.answers) < num_requests:
        for i, prompt in islice(waiting, concurrency - requests.num_in_flight):
            requests.begin(i, time.perf_counter() - stood_still)
            llm.llm_engine.add_request(str(i), prompt, params)
        for output in llm.llm_engine.step():
            requests.note(output, time.perf_counter() - stood_still)
        paused = time.perf_counter()
        if paused - turn >= TURN_SECONDS and len(requests.answers) < num_requests:
            yield None
            turn = time.perf_counter()
            stood_still += turn - paused
            watch.stood_still(turn - paused)
    yield requests.in_order(time.perf_counter() - stood_still - start, watch)


def whole_trajectory(
    rounds: Sequence[Round], prompt_len: int, answer: list[int]
) -> list[TracedRound]:
    """The rounds of an answer, of which those without a draft were not reported."""
    found, begin = list[Round](), 0
    for round_ in rounds:
        end = round_.known_len - prompt_len
        found += [Round("", emitted=[token]) for token in answer[begin:end]]
        found.append(round_)
        begin = end + len(round_.emitted)
    found += [Round("", emitted=[token]) for token in answer[begin:]]
    return traced(found, len(answer))


class EngineProcess:
    """An engine in a process of its own, which sleeps until it is asked."""

    def __init__(
        self,
        name: str,
        speculative_config: dict[str, Any] | None,
        engine_args: dict[str, Any],
        prompts: list[Prompt],
        max_tokens: int,
    ) -> None:
        self.name = name
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        job = (theirs, speculative_config, engine_args, prompts, max_tokens)
        self._process = context.Process(target=_work, args=job, daemon=True)
        self._process.start()
        theirs.close()
        self._receive()  # it is ready

    def __call__(self, concurrency: int, num_requests: int) -> Iterator[Run | None]:
        """A closed loop, which goes on for a turn whenever it is asked; see `closed_loop`."""
        asked, run = (concurrency, num_requests), None
        while run is None:
            with contextlib.suppress(OSError):  # it died since: `_receive` says so
                self._pipe.send(asked)
            run = self._receive()
            yield run

    def _receive(self) -> Any:
        try:
            found = self._pipe.recv()
        except (EOFError, ConnectionError):
            raise ValueError(f"the engine of {self.name!r} died; its log is above.") from None
        if isinstance(found, str):
            raise ValueError(f"the engine of {self.name!r} failed: {found}")
        return found

    @staticmethod
    def close(engines: "Sequence[EngineProcess]") -> None:
        """End them side by side: each takes seconds."""
        for each in engines:
            each._pipe.close()
        for each in engines:
            each._process.join(30)


def _work(
    pipe: Any,
    speculative_config: dict[str, Any] | None,
    engine_args: dict[str, Any],
    prompts: list[Prompt],
    max_tokens: int,
) -> None:
    """The engine's process: sends None when it is ready, runs when asked, a text if it fails."""
    # ngram asks for one thread; numba's others would spin on cores that something else may need
    os.environ.setdefault("NUMBA_NUM_THREADS", "1")
    try:
        with engine(speculative_config, **engine_args) as llm:
            watch = Watch(llm, speculative_config)
            tokenizer = llm.get_tokenizer()
            encoded = [encode(tokenizer, prompt) for prompt in prompts]
            pipe.send(None)
            with contextlib.suppress(EOFError):  # the other end is closed: no more work
                while True:
                    for run in closed_loop(llm, watch, encoded, max_tokens, *pipe.recv()):
                        pipe.send(run)
                        if run is None:
                            pipe.recv()  # our next turn
    except Exception as error:
        pipe.send(" ".join(f"{type(error).__name__}: {error}".split()))
