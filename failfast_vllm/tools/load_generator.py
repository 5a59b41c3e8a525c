"""Closed loops: a number of requests in flight, each replaced at once when it ends."""

import contextlib
import multiprocessing
import os
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from itertools import cycle, islice
from typing import Any, NamedTuple

from failfast_vllm.drafting.records import Round
from failfast_vllm.tools.offline import Prompt, adapter, encode, engine

TURN_SECONDS = 0.25

# name -> what was added up: "steps" of the engine, "drafts", "drafted" and "accepted" (tokens),
# "passes"; of failfast also its milliseconds on a CPU (a GPU's calls return before their work is
# done): "draft_ms", of them "own_ms" outside the draft model, "verify_ms" and "other_ms"
Sums = defaultdict[str, float]


class TracedRound(NamedTuple):
    """One verified draft, in token ids."""

    accepted: list[int]
    rejected: list[int]
    bonus: list[int]  # the target's own token; empty if the answer ended inside the draft
    num_copied: int = 0  # of the accepted ones, the last; the others are the drafter's


class Served(NamedTuple):
    """One answered request."""

    token_ids: list[int]
    step_ms: list[float]  # of each engine step that brought tokens, since the request was added
    rounds: list[TracedRound]  # one per step, where the drafter reports its rounds

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

    @property
    def ttft_ms(self) -> float:
        """To the first token."""
        return self.step_ms[0]

    @property
    def latency_ms(self) -> float:
        return self.step_ms[-1]


class Run(NamedTuple):
    """One closed loop of one method."""

    seconds: float
    served: list[Served]  # in the order of the prompts
    sums: Sums

    @property
    def tokens_per_second(self) -> float:
        return sum(s.num_tokens for s in self.served) / self.seconds


class Watch:
    """Counts an engine's verified drafts; must be in the engine's process."""

    def __init__(self, llm: Any, speculative_config: dict[str, Any] | None) -> None:
        config = speculative_config or {"method": None}
        self.sums = Sums(float)
        self.rounds: dict[int, list[Round]] | None = None  # by request; None: not reported
        self._adapter = adapter(llm) if config["method"] == "failfast" else None
        if self._adapter is not None:
            stats = self._adapter.stats
            stats.on_round, stats.drafts_only = self._on_round, True
        else:
            passes = config["num_speculative_tokens"] if config["method"] == "draft_model" else 0
            self._count_in(llm.llm_engine.engine_core.engine_core.scheduler, passes)

    def begin(self) -> None:
        """Start from zero."""
        self.sums.clear()
        if self._adapter is not None:
            self.rounds = defaultdict(list)
            self._adapter.stats.reset()

    def end(self, seconds: float) -> Sums:
        """What was added up since `begin`, `seconds` ago."""
        from vllm.platforms import current_platform

        sums = Sums(float, self.sums)
        if self._adapter is not None and current_platform.device_type == "cpu":
            stats = self._adapter.stats
            sums |= {"draft_ms": stats.total_ms, "own_ms": stats.total_ms - stats.forward_ms}
            other_ms = 1e3 * seconds - stats.total_ms - stats.verify_ms
            sums |= {"verify_ms": stats.verify_ms, "other_ms": other_ms}
        return sums

    def stood_still(self, seconds: float) -> None:
        """The engine was not asked for that long: not a time for the planner to learn."""
        if self._adapter is not None:
            self._adapter.drafter.planner.stood_still(seconds)
            self._adapter.stats.stood_still(seconds)

    def _count(self, num_drafted: int, num_accepted: int, num_passes: int) -> None:
        self.sums["drafts"] += num_drafted > 0
        self.sums["drafted"] += num_drafted
        self.sums["accepted"] += num_accepted
        self.sums["passes"] += num_passes if num_drafted else 0
        self.sums["longest"] = max(self.sums["longest"], num_accepted)

    def _on_round(self, round_: Round) -> None:
        if self.rounds is not None:
            self.rounds[int(round_.req_id.split("-")[0])].append(round_)
        self._count(len(round_.drafted), len(round_.emitted) - 1, round_.num_passes)
        self.sums["copied"] += round_.num_copied
        self.sums["copied_accepted"] += round_.num_copied_accepted

    def _count_in(self, scheduler: Any, num_passes: int) -> None:
        observe = scheduler.make_spec_decoding_stats

        def counting(stats: Any, **told: Any) -> Any:
            self._count(told["num_draft_tokens"], told["num_accepted_tokens"], num_passes)
            return observe(stats, **told)

        scheduler.make_spec_decoding_stats = counting


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
    began, finished = dict[int, float](), dict[int, Any]()
    step_ms = defaultdict[int, list[float]](list)
    watch.begin()
    start = turn = time.perf_counter()
    stood_still = 0.0
    while len(finished) < num_requests:
        for i, prompt in islice(waiting, concurrency - len(began) + len(finished)):
            began[i] = time.perf_counter() - stood_still
            llm.llm_engine.add_request(str(i), prompt, params)
        watch.sums["steps"] += 1
        for output in llm.llm_engine.step():
            i, now = int(output.request_id.split("-")[0]), time.perf_counter() - stood_still
            step_ms[i].append(1e3 * (now - began[i]))
            if output.finished:
                finished[i] = output
        paused = time.perf_counter()
        if paused - turn >= TURN_SECONDS and len(finished) < num_requests:
            yield None
            turn = time.perf_counter()
            stood_still += turn - paused
            watch.stood_still(turn - paused)
    seconds, served = time.perf_counter() - stood_still - start, []
    for i, output in sorted(finished.items()):
        ids, prompt_len = list(output.outputs[0].token_ids), len(output.prompt_token_ids)
        found = watch.rounds
        rounds = [] if found is None else whole_trajectory(found[i], prompt_len, ids)
        served.append(Served(ids, step_ms[i], rounds))
    yield Run(seconds, served, watch.end(seconds))


def whole_trajectory(
    rounds: Sequence[Round], prompt_len: int, answer: list[int]
) -> list[TracedRound]:
    """The rounds of an answer, of which those without a draft were not reported.

    The engine drops what a round emits after the answer's end.
    """
    found, begin = list[TracedRound](), 0
    for round_ in rounds:
        first = round_.known_len - prompt_len
        found += [TracedRound([], [], [token]) for token in answer[begin:first]]
        begin = first + len(round_.emitted)
        kept = answer[first:begin]
        num_accepted = min(round_.num_accepted, len(kept))
        num_copied = max(0, num_accepted - len(round_.confidences))
        parts = kept[:num_accepted], round_.drafted[num_accepted:], kept[num_accepted:]
        found.append(TracedRound(*parts, num_copied))
    return found + [TracedRound([], [], [token]) for token in answer[begin:]]


class EngineProcess:
    """An engine in a process of its own: ngram imports numba, after which no second one starts."""

    def __init__(self, name: str, *job: Any) -> None:
        """`job` is what `_work` takes after its pipe."""
        self.name = name
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_work, args=(theirs, *job), daemon=True)
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

    def close(self) -> None:
        """End it, which takes seconds."""
        self._pipe.close()
        self._process.join(30)


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
