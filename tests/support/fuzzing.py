"""Short random lives of a running engine, and what must hold during and after each.

A life is data, made from a seed alone: the rules by which it drafts, and events (arrivals, steps,
aborts, preemptions, resets, other weights). Many lives share one engine, and find the pages and the
prefix cache as those before have left them.
"""

import collections
import contextlib
import random
from typing import NamedTuple

import numpy as np
import torch
from vllm import SamplingParams

from engine import chat_ids, core, generate, policy, proposer, shipped_prompts
from failfast_vllm.drafting.copying import OwnText
from failfast_vllm.drafting.interfaces import Planner
from live_weights import reload

ANSWER_LEN = 40  # tokens of the longest answer
LENGTHS = [1, 2, 5, 31, 32, 33, 63, 64, 65, 66, 95, 96, 97, 127, 128, 129, 160, 191, 193, 256, 300]
NUM_TEXTS = 4
POLICIES = (
    "failfast",
    "fixed",
)
EVENTS = (*["step"] * 9, "abort", "abort", "abort late", "abort late", "preempt", "reset")
MAX_SEQS = 4
ENGINE = {
    "enable_prefix_caching": True,
    "max_model_len": 384,
    "max_num_seqs": MAX_SEQS,
    "max_num_batched_tokens": 128,  # longer prompts come in parts
    "scheduling_policy": "priority",
}
MAX_STEPS = 600


def small(page):
    """Settings of an engine whose pages hold hardly more than one long request."""
    return {**ENGINE, "block_size": page, "num_gpu_blocks_override": 512 // page + 1}


class Life(NamedTuple):
    """One scenario."""

    seed: int
    policy: str
    planner: str  # "paper", "moody" or "resting"
    copies: bool
    weights: int
    events: tuple  # (name, argument...)


class Known(NamedTuple):
    """Prompts, and what vLLM alone answers; the same in every life."""

    prompts: list
    streams: list  # by weights: [prompt] -> ANSWER_LEN tokens, also behind the end of the answer
    eos: frozenset
    paths: list  # checkpoints of the target, by weights


def learn(llm, paths):
    """Ask an engine without speculation."""
    tokenizer = llm.get_tokenizer()
    questions = [chat_ids(tokenizer, prompt) for prompt in shipped_prompts()]
    texts = [[t for ids in questions[i::NUM_TEXTS] for t in ids] for i in range(NUM_TEXTS)]
    prompts = [text[:length] for text in texts for length in LENGTHS] + questions[:20]
    params = SamplingParams(temperature=0.0, max_tokens=ANSWER_LEN, ignore_eos=True)
    streams = []
    for path in paths:
        reload(llm, weights_path=path)
        streams.append(generate(llm, prompts, params))
    return Known(prompts, streams, frozenset([tokenizer.eos_token_id]), paths)


def make(seed, num_prompts, *, drafter=True, reloads=True, longest=ANSWER_LEN):
    """The life of a seed."""
    rng = random.Random(seed)
    near = seed // 6 * 37 % num_prompts  # most prompts begin alike, also in the lives around
    events = []
    for _ in range(rng.choice((1, 2, 3, 3, 4, 6))):
        number = near + rng.randrange(-4, 5) if rng.random() < 0.7 else rng.randrange(num_prompts)
        asked = {
            "max_tokens": rng.choice((1, 2, 7, 20, 33, longest)),
            "ignore_eos": rng.random() < 0.5,
            "max_len": rng.choice((None, None, None, 0, 0, 1, 5)),
            "threshold": rng.choice((None, None, None, 0.9, 1.0)),
            "stops_at": rng.choice((None, None, None, 3, 12)),  # a token of the answer
            "temperature": rng.choice((0.0, 0.0, 0.0, 0.0, 1.0)),
        }
        events.append(("add", number % num_prompts, asked, rng.randrange(3)))
        for _ in range(rng.randrange(3)):
            name = rng.choice(EVENTS)
            events.append((name, rng.randrange(1, 6)))
    if rng.random() < 0.1:
        events.append(("no drafts", 1))
    return Life(
        seed,
        rng.choice(POLICIES) if drafter else "failfast",
        rng.choice(("paper", "paper", "moody", "resting")) if drafter else "moody",
        rng.random() < 0.4,
        int(reloads and seed % 40 >= 30),  # the weights change twice in 40 lives
        tuple(events),
    )


class Moody(Planner):
    """Drafts, copies, cuts and rests as it pleases."""

    def __init__(self, seed, rests, drafts):
        super().__init__(10)
        self.rng, self.rests, self.drafts = np.random.default_rng(seed), rests, drafts
        self.postpones_commits = True

    def step_began(self, req_ids, num_tokens):
        return self.rng.random() >= self.rests

    def first(self, asked):
        wanted, match_lens = asked.wanted, asked.match_lens
        lens = np.minimum(wanted, self.rng.integers(0, 20, len(wanted)))
        copies = (match_lens > 0) & (self.rng.random(len(wanted)) < 0.5) | (not self.drafts)
        lens[self.rng.random(len(wanted)) < self.rng.random()] = 0
        return np.where(copies, 0, lens), np.where(copies & (match_lens > 0), lens, 0)

    def following(self, wanted, *unused):
        return np.minimum(wanted, self.rng.integers(0, 12, len(wanted)))

    def keep(self, draft_lens, *unused):
        return np.minimum(draft_lens, self.rng.integers(0, 60, len(draft_lens)))


def planner_of(life, drafts):
    if life.planner == "paper" and drafts:
        return Planner(10)
    return Moody(life.seed, 0.5 if life.planner == "resting" else 0.0, drafts)


class World:
    """An engine with failfast, through which lives go; `model` is None without a drafter."""

    def __init__(self, llm, known, model=None):
        self.llm, self.known, self.model, self.weights = llm, known, model, 0
        self.engine, self.core = llm.llm_engine, core(llm)
        self.counts = collections.Counter()
        self.rounds = collections.defaultdict(list)

    def live(self, life):
        """Returns what went wrong, one line each."""
        if life.weights != self.weights:
            reload(self.llm, weights_path=self.known.paths[life.weights])
            self.weights = life.weights
            self.counts["reload"] += 1
        if self.model is not None:
            self.model.wrong = []
        adapter = proposer(self.llm)
        self.rounds.clear()
        adapter.stats.on_round = lambda r: self.rounds[r.req_id].extend(r.emitted)
        if life.seed % 2:  # then steps in which the planner rests are not read
            adapter.stats.on_round = None
        drafter, drafts = adapter.drafter, self.model is not None
        with policy(self.llm, life.policy) if drafts else contextlib.nullcontext():
            planner, copies = drafter.planner, drafter.copies
            drafter.planner = planner_of(life, drafts)
            if life.copies:
                drafter.copies = OwnText(1000, torch.device("cpu"))
            try:
                wrong = _Going(self, life).run()
                wrong += self.left_over(adapter)
            finally:
                drafter.planner, drafter.copies = planner, copies
        self.counts["lives"] += 1
        return wrong + (self.model.wrong if self.model is not None else [])

    def left_over(self, adapter):
        """State of requests that have ended, anywhere."""
        scheduler, runner = self.core.scheduler, getattr(adapter, "runner", None)
        states = getattr(adapter, "req_states", None)
        found = {
            "running": scheduler.running,
            "waiting": list(scheduler.waiting),
            "scheduled": scheduler.requests,
            "answered": self.engine.output_processor.request_states,
            "runner": getattr(runner, "requests", {}),
            "ledger": adapter.session.ledger,
            "embedded": getattr(adapter, "embedded", {}),
            "slots of V2": getattr(states, "req_id_to_index", {}),
        }
        wrong = [f"left over: {name}, {len(held)}" for name, held in found.items() if len(held)]
        usage = scheduler.kv_cache_manager.usage
        return wrong + ([f"left over: KV pages, {usage:.1%}"] if usage else [])


class _Going:
    """One life in its world."""

    def __init__(self, world, life):
        self.world, self.life, self.engine = world, life, world.engine
        self.complete = life.planner == "paper"  # which commits in every step
        self.ids, self.asked, self.answers, self.aborted = [], {}, {}, set()

    def run(self):
        for name, *arguments in self.life.events:
            self.world.counts[name] += 1
            getattr(self, name.replace(" ", "_"))(*arguments)
        steps = 0
        while self.world.core.scheduler.has_requests():
            self.step(1)
            if (steps := steps + 1) > MAX_STEPS:
                self.engine.abort_request(self.ids)
                self.step(2)
                return ["it does not end"]
        return [line for req_id in self.ids for line in self.judge(req_id)]

    def add(self, number, asked, priority):
        known, extra = self.world.known, {}
        stream = known.streams[self.life.weights][number]
        if asked["max_len"] is not None:
            extra["failfast_max_len"] = asked["max_len"]
        if asked["threshold"] is not None:
            extra["failfast_confidence_threshold"] = asked["threshold"]
        stops = [] if asked["stops_at"] is None else [stream[asked["stops_at"]]]
        params = SamplingParams(
            temperature=asked["temperature"],
            max_tokens=asked["max_tokens"],
            ignore_eos=asked["ignore_eos"],
            stop_token_ids=stops,
            extra_args=extra or None,
        )
        req_id = f"{self.life.seed}-{len(self.ids)}"
        self.ids.append(req_id)
        ends = {*stops, *(() if asked["ignore_eos"] else known.eos)}
        expected = stream[: asked["max_tokens"]]
        end = next((i + 1 for i, token in enumerate(expected) if token in ends), len(expected))
        self.asked[req_id] = None if asked["temperature"] else expected[:end]
        prompt = {"prompt_token_ids": list(known.prompts[number])}
        self.engine.add_request(req_id, prompt, params, priority=priority)

    def step(self, count):
        for _ in range(count):
            for output in self.engine.step():
                self.answers[output.request_id] = list(output.outputs[0].token_ids)
            if self.world.model is not None:
                self.world.model.stepped(self.complete)

    def abort(self, number):
        if going := self._going():
            req_id = going[number % len(going)]
            self.aborted.add(req_id)
            self.engine.abort_request([req_id])

    def abort_late(self, number):
        """While the step is under way: vLLM's engine reads these before it books the step."""
        if going := self._going():
            req_id = going[number % len(going)]
            self.aborted.add(req_id)
            internal = self.engine.output_processor.abort_requests([req_id], False)
            if self.world.model is not None:
                self.world.model.aborted.update(internal)
            self.world.core.aborts_queue.put_nowait(internal)
            self.step(1)

    def preempt(self, number):
        """All that run go back to the queue, and every page is forgotten."""
        self.engine.reset_prefix_cache(reset_running_requests=True)

    def reset(self, number):
        self.engine.reset_prefix_cache()

    def no_drafts(self, number):
        """A step whose drafts nobody asks for."""
        post_step = self.world.core.post_step
        self.world.core.post_step = lambda model_executed: None
        self.complete = False  # from here on a block may be missing until the next step
        self.step(1)
        self.world.core.post_step = post_step

    def _going(self):
        return [i for i in self.ids if i not in self.aborted and self._is_open(i)]

    def _is_open(self, req_id):
        return req_id in self.engine.output_processor.external_req_ids

    def judge(self, req_id):
        found, expected = self.answers.get(req_id, []), self.asked[req_id]
        if expected is not None:
            if req_id in self.aborted:
                expected = expected[: len(found)]
            if found != expected:
                yield f"another answer: {req_id}, {found}, not {expected}"


def shrink(life, fails):
    """The same life with as few events as still fail."""
    i = 0
    while i < len(life.events):
        fewer = life._replace(events=life.events[:i] + life.events[i + 1 :])
        if fails(fewer):
            life = fewer
        else:
            i += 1
    return life
