"""`failfast simulate`: a recorded trace under a stated latency model. Modelled, never measured.

The drafts and what was accepted of them are the trace's; only times are modelled. Two models:

- `a6000-2x`, the authors' own (arXiv 2512.20573; their code): 6.1 ms per draft pass, 13.5, 24.7 or
  52.6 ms per target step for Qwen2.5-7B, 14B and 32B, and nothing else costs anything. Batch 1.
- `h200`, the roofline of `plan`: a pass takes max(bytes / bandwidth, flops / compute), so it
  depends on rows, tokens and contexts of all sequences in it. An upper bound.

Prompts cost nothing here, with or without drafts; what the drafter does for a prompt is counted,
since it commits its blocks in the pass of the first draft.
"""

import math
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple, Protocol, TypeVar

import numpy as np

from failfast_vllm.observe.trace import Round, Trace, describe
from failfast_vllm.planning.costs import Costs, CostTable
from failfast_vllm.tools import sizing as plan

Item = TypeVar("Item")

TARGETS = {
    "7B": "Qwen/Qwen2.5-7B-Instruct",
    "14B": "Qwen/Qwen2.5-14B-Instruct",
    "32B": "Qwen/Qwen2.5-32B-Instruct",
}
DRAFTER = "Efficient-Large-Model/Fast_dLLM_v2_1.5B"
HARDWARE = ("a6000-2x", "h200")
POLICIES = {
    "recorded": "drafts as recorded",
    "hindsight": "drafts cut, in hindsight, behind their last accepted token; no policy knows it",
}
AUTHORS_DRAFT_PASS_MS = 6.1
AUTHORS_STEP_MS = {"7B": 13.5, "14B": 24.7, "32B": 52.6}
TABLE_SIZES = [2**i for i in range(14)]  # rows or tokens of a pass


class Latency(Protocol):
    """Times of one pass, in ms; `plan.CostModel` does."""

    def draft_ms(self, rows: Sequence[float], contexts: Sequence[float]) -> float:
        """One draft pass: [num_seqs] rows and known tokens."""
        ...

    def verify_ms(self, tokens: Sequence[float], contexts: Sequence[float]) -> float:
        """One target step: [num_seqs] tokens (1 = no draft) and known tokens."""
        ...


class FixedLatency(NamedTuple):
    """Passes that take the same whatever is in them: the authors' model."""

    draft_pass_ms: float
    step_ms: float

    def draft_ms(self, rows: Sequence[float], contexts: Sequence[float]) -> float:
        return self.draft_pass_ms

    def verify_ms(self, tokens: Sequence[float], contexts: Sequence[float]) -> float:
        return self.step_ms


def latency_of(hardware: str, target: str) -> Latency:
    """The latency model of a machine and a target with the 1.5B drafter; raises ValueError."""
    for option, value, known in (("hardware", hardware, HARDWARE), ("target", target, TARGETS)):
        if value not in known:
            raise ValueError(f"--{option} must be one of {', '.join(known)}; got {value!r}.")
    if hardware == "a6000-2x":
        return FixedLatency(AUTHORS_DRAFT_PASS_MS, AUTHORS_STEP_MS[target])
    name = TARGETS[target]
    return plan.CostModel(
        plan.GPUS[hardware.upper()],
        plan.shape_of(name, plan.PUBLISHED_TARGETS[name]),
        plan.shape_of(DRAFTER, plan.PUBLISHED_DRAFTERS[DRAFTER]),
    )


def cost_tables(hardware: str, target: str) -> Costs:
    """What the load planner would know of such a machine: times by rows and by tokens.

    Without contexts, which its tables do not know either; raises ValueError as `latency_of`.
    """
    latency = latency_of(hardware, target)
    return Costs(
        draft=CostTable(TABLE_SIZES, [latency.draft_ms([size], [0]) for size in TABLE_SIZES]),
        verify=CostTable(TABLE_SIZES, [latency.verify_ms([size], [0]) for size in TABLE_SIZES]),
    )


@dataclass(frozen=True)
class Replay:
    """Modelled times of all rounds of a trace, and of the same tokens without drafts."""

    requests: int
    rounds: int  # plain steps included
    passes: int
    tokens: int
    draft_ms: float
    verify_ms: float
    plain_ms: float

    @property
    def speedup(self) -> float:
        return self.plain_ms / (self.draft_ms + self.verify_ms)


class Work(NamedTuple):
    """What a round makes the machine do for one sequence."""

    known: int  # tokens before the round
    verified: int  # tokens of the target's step: the draft's, and one
    pass_rows: list[int]  # of each draft pass
    emitted: int


def replay(
    trace: Trace, latency: Latency, concurrency: int = 1, policy: str = "recorded"
) -> Replay:
    """Run a trace's requests, `concurrency` at a time, the next when one ends.

    Raises:
        ValueError: the trace has no decoding in it.
    """
    block_size = trace.header.get("diffusion_block_size", 32)
    increment = trace.header.get("draft_increment", 10)
    requests = []
    for rounds in trace.by_request():
        work = [work_of(r, block_size, increment) for r in decoding(rounds)]
        if policy == "hindsight":
            work = [in_hindsight(w, increment) for w in work]
        if work:
            requests.append(work)
    if not requests:
        raise ValueError("the trace must hold rounds behind a prompt; got none. Record more.")
    draft_ms = verify_ms = plain_ms = 0.0
    for step in batches(requests, concurrency):
        for i in range(max(len(w.pass_rows) for w in step)):
            drafting = [w for w in step if i < len(w.pass_rows)]
            rows = [w.pass_rows[i] for w in drafting]
            draft_ms += latency.draft_ms(rows, [w.known for w in drafting])
        verify_ms += latency.verify_ms([w.verified for w in step], [w.known for w in step])
    for contexts in batches([_plain(work) for work in requests], concurrency):
        plain_ms += latency.verify_ms([1] * len(contexts), contexts)
    return Replay(
        requests=len(requests),
        rounds=sum(len(work) for work in requests),
        passes=sum(len(w.pass_rows) for work in requests for w in work),
        tokens=sum(w.emitted for work in requests for w in work),
        draft_ms=draft_ms,
        verify_ms=verify_ms,
        plain_ms=plain_ms,
    )


def decoding(rounds: Sequence[Round]) -> list[Round]:
    """A request's rounds behind its prompt; steps that the trace lacks were plain ones.

    The first round without a draft is the prompt's. An engine that rests (see `load`) reports none.
    """
    rounds = rounds[1:] if rounds and not rounds[0].drafted else rounds
    found: list[Round] = []
    for r in rounds:
        if found:
            known = found[-1].known + found[-1].accepted + 1
            plain = r._replace(drafted=0, passes=0, rows=0, accepted=0, confidences=())
            found += [plain._replace(known=i) for i in range(known, r.known)]
        found.append(r)
    return found


def _plain(work: Sequence[Work]) -> range:
    """Known tokens in each step of the same answer without drafts."""
    return range(work[0].known, work[0].known + sum(w.emitted for w in work))


def work_of(r: Round, block_size: int, increment: int) -> Work:
    """A recorded round's work; the first pass has the rows that the later ones did not.

    A later pass encodes the live block and the draft so far again; increments are as configured.
    """
    live = r.known - (r.known - 1) // block_size * block_size
    later = [live + min(i * increment, r.drafted) for i in range(2, r.passes + 1)]
    rows = [max(r.rows - sum(later), 1), *later] if r.passes else []
    return Work(r.known, r.drafted + 1, rows, r.accepted + 1)


def in_hindsight(work: Work, increment: int) -> Work:
    """If the draft had ended behind its last accepted token: the same tokens for less."""
    passes = math.ceil((work.emitted - 1) / increment)
    return work._replace(verified=work.emitted, pass_rows=work.pass_rows[:passes])


def batches(requests: Iterable[Iterable[Item]], concurrency: int) -> Iterator[list[Item]]:
    """One item of each running request per step; when one ends, the next takes its place."""
    waiting = deque(iter(request) for request in requests)
    running: list[Iterator[Item]] = []
    while running or waiting:
        step: list[Item] = []
        still_running = []
        while (running or waiting) and len(step) < concurrency:
            request = running.pop(0) if running else waiting.popleft()
            for item in request:
                step.append(item)
                still_running.append(request)
                break
        running = still_running
        if step:
            yield step


@dataclass(frozen=True)
class Simulation:
    """All that `failfast simulate` prints."""

    hardware: str
    target: str
    policy: str
    concurrency: int
    trace: Trace
    result: Replay

    @property
    def notes(self) -> list[str]:
        header = self.trace.header
        notes = ["times are modelled; " + POLICIES[self.policy] + "."]
        if self.hardware == "a6000-2x":
            notes.append(
                f"the authors' model: {AUTHORS_DRAFT_PASS_MS} ms per draft pass, "
                f"{AUTHORS_STEP_MS[self.target]} ms per target step whatever it verifies."
            )
        else:
            notes.append(
                "a roofline of Qwen2.5 with Fast-dLLM v2 1.5B in bf16: launches, sampling and "
                "scheduling are free, so this is an upper bound."
            )
        if header.get("synthetic"):
            notes.append("acceptance is drawn at random, not recorded.")
        else:
            notes.append("acceptance is the recorded pair's; another pair accepts otherwise.")
        if self.concurrency > 1 and self.result.requests < 8 * self.concurrency:
            notes.append(
                f"the last of only {self.result.requests} requests run with places left empty."
            )
        if header.get("load_aware"):
            notes.append("drafts followed the load of the recording; at another they would differ.")
        return notes

    def to_dict(self) -> dict[str, Any]:
        result = self.result
        return {
            "modelled": True,
            "hardware": self.hardware,
            "target": self.target,
            "policy": self.policy,
            "concurrency": self.concurrency,
            "recorded": self.trace.header,
            **asdict(result),
            "acceptance_length": result.tokens / result.rounds,
            "passes_per_round": result.passes / result.rounds,
            "tokens_per_second": 1e3 * result.tokens / (result.draft_ms + result.verify_ms),
            "speedup": result.speedup,
            "notes": self.notes,
        }


def simulate(
    trace: Trace, hardware: str, target: str, concurrency: int = 1, policy: str = "recorded"
) -> Simulation:
    """Replay a trace; raises ValueError, one line, on what cannot be modelled."""
    latency = latency_of(hardware, target)
    if policy not in POLICIES:
        raise ValueError(f"--policy must be one of {', '.join(POLICIES)}; got {policy!r}.")
    if concurrency > 1 and isinstance(latency, FixedLatency):
        raise ValueError(
            f"--concurrency must be 1 with --hardware {hardware}, whose model knows no batches; "
            f"got {concurrency}. Use --hardware h200."
        )
    result = replay(trace, latency, concurrency, policy)
    return Simulation(hardware, target, policy, concurrency, trace, result)


def render(simulation: Simulation) -> str:
    """The report for a reader."""
    result, figures = simulation.result, simulation.to_dict()
    text = [
        f"{simulation.target} on {simulation.hardware}, modelled, "
        f"{simulation.concurrency} at a time",
        describe(simulation.trace.header),
    ]
    per_request = f"ms per request{'':<6}"
    for label, value in (
        ("requests", f"{result.requests:>10}"),
        ("tokens", f"{result.tokens:>10}"),
        ("tokens per round", f"{figures['acceptance_length']:>10.2f}"),
        ("draft passes per round", f"{figures['passes_per_round']:>10.2f}"),
        ("drafting (modelled)", f"{result.draft_ms / result.requests:>10.1f}  {per_request}"),
        ("verifying (modelled)", f"{result.verify_ms / result.requests:>10.1f}  {per_request}"),
        ("without (modelled)", f"{result.plain_ms / result.requests:>10.1f}  {per_request}"),
        ("tokens/s (modelled)", f"{figures['tokens_per_second']:>10.1f}"),
        ("speed-up (modelled)", f"{result.speedup:>10.2f}  x"),
    ):
        text.append(f"  {label:<26}{value}".rstrip())
    return "\n".join((*text, "", *(f"- {note}" for note in simulation.notes)))


def synthetic(
    acceptance_length: float,
    passes_per_round: float,
    *,
    tokens_per_pass: int = 10,
    num_requests: int = 100,
    rounds_per_request: int = 91,
    sureness: float = 8.0,
    seed: int = 0,
) -> Trace:
    """Rounds drawn with these means, calibrated: a token of confidence p is accepted with chance p.

    Passes are 1 + Poisson; a draft has `tokens_per_pass` tokens of each. Confidences are
    independent, from a beta distribution whose mean is chosen so that drafts of these lengths give
    the acceptance length asked for. Real drafts are sure for a while and then doubtful; these are
    not: the means hold, the order of rounds says nothing.

    Args:
        acceptance_length: mean tokens per round, with the bonus.
        rounds_per_request: each request has as many, after its prompt of 100 tokens.
        sureness: sum of the beta distribution's parameters; the larger, the more alike are tokens.

    Raises:
        ValueError: drafts of so many passes cannot hold so many tokens.
    """
    if passes_per_round < 1 or acceptance_length < 1:
        raise ValueError(
            "--acceptance-length and --passes-per-round must be at least 1; "
            f"got {acceptance_length:g} and {passes_per_round:g}."
        )
    rng = np.random.default_rng(seed)
    passes = 1 + rng.poisson(passes_per_round - 1, (num_requests, rounds_per_request))
    lens = passes * tokens_per_pass
    mean = _chance_for(acceptance_length - 1, lens.ravel())
    rounds = []
    for request in range(num_requests):
        known = 100
        rounds.append(Round(0, 1, request, known, 0, 0, 0, 0, ()))
        known += 1
        for i in range(rounds_per_request):
            drafted, num_passes = int(lens[request, i]), int(passes[request, i])
            confidences = rng.beta(mean * sureness, (1 - mean) * sureness, drafted)
            rejected = np.flatnonzero(rng.random(drafted) >= confidences)
            accepted = int(rejected[0]) if rejected.size else drafted
            live = known - (known - 1) // 32 * 32
            rows = num_passes * live + tokens_per_pass * num_passes * (num_passes + 1) // 2
            shown = tuple(confidences.round(3).tolist())
            rounds.append(
                Round(i + 1, 1, request, known, drafted, num_passes, rows, accepted, shown)
            )
            known += accepted + 1
    header = {
        "synthetic": True,
        "target": "synthetic",
        "draft_increment": tokens_per_pass,
        "diffusion_block_size": 32,
        "seed": seed,
    }
    return Trace([header], rounds)


def _chance_for(num_accepted: float, lens: "np.ndarray[Any, Any]") -> float:
    """The chance of each token at which drafts of `lens` have so many accepted on average."""
    found, counts = np.unique(lens, return_counts=True)
    if not 0 < num_accepted < float((found * counts).sum() / counts.sum()):
        raise ValueError(
            f"--acceptance-length must be above 1 and at most {lens.mean() + 1:.1f} with drafts of "
            f"{lens.mean():.1f} tokens; got {num_accepted + 1:g}."
        )
    low, high = 0.0, 1.0 - 1e-9
    for _ in range(60):  # bisection; sum of a^j for j = 1 .. length, averaged over the lengths
        chance = (low + high) / 2
        sums = chance * (1 - chance**found) / (1 - chance)
        if (sums * counts).sum() / counts.sum() < num_accepted:
            low = chance
        else:
            high = chance
    return (low + high) / 2
