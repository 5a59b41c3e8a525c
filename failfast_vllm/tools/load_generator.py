"""Closed loops: a number of requests in flight, each replaced at once when it ends.

`EngineProcess` answers prompts in such a loop and yields a `Run`: what was answered, how fast, and
what became of the drafts. Engines take turns within a run, each on its own clock: a
machine's speed may drift by half within a minute, and ratios of whole runs show little else.
"""

import contextlib
import json
import multiprocessing
import os
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields
from itertools import cycle, islice
from pathlib import Path
from typing import Any, NamedTuple

from failfast_vllm.config import MODELS_DIR
from failfast_vllm.tools.offline import TracedRound, adapter, encode, engine, traced

NUM_BINS = 10  # of the confidence
TURN_SECONDS = 0.25

Prompt = dict[str, Any]  # {"messages": [...]} or {"prompt": text}


@dataclass
class Tally:
    """What verification found of some drafts.

    A token was judged if all before it in its draft were accepted.
    """

    num_drafts: int = 0
    num_drafted: int = 0  # tokens
    num_accepted: int = 0
    num_passes: int = 0  # of the drafter
    lengths: Counter[int] = field(default_factory=Counter)  # draft length -> drafts
    drafted: Counter[int] = field(default_factory=Counter)  # position -> tokens
    accepted: Counter[int] = field(default_factory=Counter)
    judged: Counter[int] = field(default_factory=Counter)  # confidence bin -> tokens
    right: Counter[int] = field(default_factory=Counter)  # of them accepted
    confidence: Counter[int] = field(default_factory=Counter)  # of them the sum

    def add(
        self, num_drafted: int, num_accepted: int, num_passes: int, confidences: Sequence[float]
    ) -> None:
        """Count one verified draft, which is not empty; `confidences` may be fewer than tokens."""
        self.num_drafts += 1
        self.num_drafted += num_drafted
        self.num_accepted += num_accepted
        self.num_passes += num_passes
        self.lengths[num_drafted] += 1
        self.drafted.update(range(num_drafted))
        self.accepted.update(range(num_accepted))
        for position, confidence in enumerate(confidences[: num_accepted + 1]):
            where = min(int(confidence * NUM_BINS), NUM_BINS - 1)
            self.judged[where] += 1
            self.right[where] += position < num_accepted
            self.confidence[where] += confidence  # type: ignore[assignment]

    def update(self, other: "Tally") -> None:
        for part in fields(self):
            mine, theirs = getattr(self, part.name), getattr(other, part.name)
            if isinstance(mine, Counter):
                mine.update(theirs)
            else:
                setattr(self, part.name, mine + theirs)

    def to_dict(self) -> dict[str, Any]:
        rounds = max(1, self.num_drafts)
        return {
            "acceptance_length": round(1 + self.num_accepted / rounds, 3),
            "passes_per_round": round(self.num_passes / rounds, 3),
            "drafts": self.num_drafts,
            "drafted_tokens": self.num_drafted,
            "accepted_tokens": self.num_accepted,
            "draft_lengths": {str(n): self.lengths[n] for n in sorted(self.lengths)},
            "drafted_per_position": _by_position(self.drafted),
            "accepted_per_position": _by_position(self.accepted),
            "reliability": [
                {
                    "bin": f"{i / NUM_BINS:.1f}-{(i + 1) / NUM_BINS:.1f}",
                    "count": self.judged[i],
                    "accepted": self.right[i],
                    "mean_confidence": round(self.confidence[i] / self.judged[i], 4),
                }
                for i in sorted(self.judged)
            ],
        }


def _by_position(counts: Counter[int]) -> list[int]:
    return [counts[i] for i in range(max(counts, default=-1) + 1)]


class Served(NamedTuple):
    """One answered request."""

    num_tokens: int
    ttft_ms: float  # to the first token
    latency_ms: float

    @property
    def tpot_ms(self) -> float:
        """Time per output token after the first."""
        return (self.latency_ms - self.ttft_ms) / max(1, self.num_tokens - 1)


@dataclass
class Run:
    """One closed loop of one method."""

    seconds: float
    answers: list[list[int]]  # token ids, in the order of the prompts
    served: list[Served]
    tally: Tally
    trajectory: list[TracedRound]  # of the first answer, where the drafter reports its rounds

    @property
    def tokens_per_second(self) -> float:
        return sum(s.num_tokens for s in self.served) / self.seconds


def pad_vocabulary(source: Path, vocab_size: int, destination: Path) -> Path:
    """Copy a checkpoint with its embedding padded: vLLM's draft_model wants equal sizes."""
    import torch
    from safetensors.torch import load_file, save_file

    destination.mkdir()
    for path in source.iterdir():
        if path.suffix != ".safetensors":
            (destination / path.name).write_bytes(path.read_bytes())
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    missing = vocab_size - config["vocab_size"]
    weights = load_file(source / "model.safetensors")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        if name in weights:  # the padding repeats row 0: equal logits, and the lower id wins a tie
            rows = weights[name]
            weights[name] = torch.cat([rows, rows[:1].expand(missing, -1)]).contiguous()
    save_file(weights, destination / "model.safetensors", metadata={"format": "pt"})
    config["vocab_size"] = vocab_size
    (destination / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return destination


def padded_ar_drafter(folder: Path) -> Path:
    """The shipped autoregressive drafter with the shipped target's vocabulary, in `folder`."""
    config = json.loads((MODELS_DIR / "target" / "config.json").read_text(encoding="utf-8"))
    return pad_vocabulary(MODELS_DIR / "ar-drafter", config["vocab_size"], folder / "ar-drafter")


class Watch:
    """Tallies the verified drafts of an engine, in whose process it must be."""

    def __init__(self, llm: Any, speculative_config: dict[str, Any] | None) -> None:
        from failfast_vllm.integration.session import DraftStats

        self.tally, self.first_rounds = Tally(), list[Any]()
        core = llm.llm_engine.engine_core.engine_core
        found = adapter(llm)
        stats = getattr(found, "stats", None)
        self.reports_rounds = isinstance(stats, DraftStats)
        self._adapter = found if self.reports_rounds else None
        if isinstance(stats, DraftStats):
            stats.on_round, stats.drafts_only = self._on_round, True
        elif speculative_config:
            is_draft_model = speculative_config["method"] == "draft_model"
            passes = speculative_config["num_speculative_tokens"] if is_draft_model else 0
            self._count_in(core.scheduler, passes)

    def begin(self) -> None:
        self.tally, self.first_rounds = Tally(), []

    def stood_still(self, seconds: float) -> None:
        """The engine was not asked for that long: not a time for the planner to learn."""
        if self._adapter is not None and self._adapter.drafter.planner is not None:
            self._adapter.drafter.planner.stood_still(seconds)

    def _on_round(self, round_: Any) -> None:
        if round_.req_id.split("-")[0] == "0":
            self.first_rounds.append(round_)
        if round_.drafted:
            num_accepted = len(round_.emitted) - 1
            self.tally.add(len(round_.drafted), num_accepted, round_.num_passes, round_.confidences)

    def _count_in(self, scheduler: Any, num_passes: int) -> None:
        observe = scheduler.make_spec_decoding_stats

        def counting(
            stats: Any, num_draft_tokens: int, num_accepted_tokens: int, *rest: Any, **more: Any
        ) -> Any:
            if num_draft_tokens:
                self.tally.add(num_draft_tokens, num_accepted_tokens, num_passes, ())
            return observe(stats, num_draft_tokens, num_accepted_tokens, *rest, **more)

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
    began, first = dict[int, float](), dict[int, float]()
    answers, served = dict[int, list[int]](), dict[int, Served]()
    watch.begin()
    prompt_len = 0  # of the first
    start = turn = time.perf_counter()
    stood_still = 0.0
    while len(answers) < num_requests:
        for i, prompt in islice(waiting, concurrency - (len(began) - len(answers))):
            began[i] = time.perf_counter() - stood_still
            llm.llm_engine.add_request(str(i), prompt, params)
        for output in llm.llm_engine.step():
            now, i = time.perf_counter() - stood_still, int(output.request_id.split("-")[0])
            first.setdefault(i, now)
            if i == 0:
                prompt_len = len(output.prompt_token_ids)
            if output.finished:
                answers[i] = list(output.outputs[0].token_ids)
                ttft_ms, latency_ms = (first[i] - began[i]) * 1e3, (now - began[i]) * 1e3
                served[i] = Served(len(answers[i]), ttft_ms, latency_ms)
        paused = time.perf_counter()
        if paused - turn >= TURN_SECONDS and len(answers) < num_requests:
            yield None
            turn = time.perf_counter()
            stood_still += turn - paused
            watch.stood_still(turn - paused)
    seconds = time.perf_counter() - stood_still - start
    order = range(num_requests)
    trajectory = []
    if watch.reports_rounds:
        trajectory = whole_trajectory(watch.first_rounds, prompt_len, answers[0])
    yield Run(
        seconds, [answers[i] for i in order], [served[i] for i in order], watch.tally, trajectory
    )


def whole_trajectory(
    rounds: Sequence[Any], prompt_len: int, answer: list[int]
) -> list[TracedRound]:
    """The rounds of an answer, of which those without a draft were not reported."""
    found, begin = list[Any](), 0
    for round_ in rounds:
        end = round_.known_len - prompt_len
        found += [("", [], [token], 0) for token in answer[begin:end]]
        found.append(round_)
        begin = end + len(round_.emitted)
    found += [("", [], [token], 0) for token in answer[begin:]]
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
