"""Engines of the V2 runner that schedule ahead, and what they schedule."""

import contextlib
import random

import numpy as np
import pytest
import torch
from vllm.sampling_params import StructuredOutputsParams
from vllm.v1.core.sched.async_scheduler import AsyncScheduler

from engine import core, generate, proposer
from failfast_vllm.config import METHOD
from runners import MIXED, v1_engine, v2_engine
from turns import Turns

BY_LOAD = {"method": METHOD, "load_aware": True}
ALONE = {**BY_LOAD, "model": None}


class Watch:
    """How many steps were in flight when one was scheduled, and the draft tokens that it got."""

    def __init__(self, llm, planner):
        self.steps, self.planner = [], planner
        engine, self.drafter = core(llm), proposer(llm).drafter
        self.drafter.planner = planner
        schedule = engine.scheduler.schedule

        def watched(*args):
            in_flight = len(engine.batch_queue)
            output = schedule(*args)
            if output.total_num_scheduled_tokens:
                drafted = sum(map(len, output.scheduled_spec_decode_tokens.values()))
                self.steps.append((in_flight, drafted))
            return output

        engine.scheduler.schedule = watched

    def assert_both_kinds(self, least=5):
        """Steps with drafts with nothing in flight, and steps that were scheduled ahead."""
        assert sum(drafted > 0 for _, drafted in self.steps) >= least
        assert sum(in_flight > 0 for in_flight, _ in self.steps) >= least
        assert not [step for step in self.steps if all(step)]
        assert self.planner.num_rested >= least


@contextlib.contextmanager
def taking_turns(speculative=BY_LOAD, planner=Turns, **overrides):
    with v2_engine(speculative, **overrides) as llm:
        assert isinstance(core(llm).scheduler, AsyncScheduler)
        watch = Watch(llm, planner(10))
        yield llm, watch
        assert core(llm).scheduler.kv_cache_manager.usage == 0.0


@pytest.fixture(scope="module")
def rows(few_plain):
    """Requests that ask for different things, and what vLLM alone answers."""
    from vllm import SamplingParams

    asked = [more for more in MIXED if "thinking_token_budget" not in more]
    asked += [{"extra_args": {"failfast_max_len": 0}}, {"extra_args": {"failfast_max_len": 3}}]
    prompts = few_plain[0][0 : 2 * len(asked) : 2]
    params = [SamplingParams(**{"temperature": 0.0, "max_tokens": 30, **more}) for more in asked]
    with v1_engine() as llm:
        return prompts, params, generate(llm, prompts, params)


def come_and_go(llm, prompts, params, expected):
    """Requests arrive and are aborted in between; those that end have the expected answers."""
    engine, rng, finished, aborted = llm.llm_engine, random.Random(3), {}, set()
    waiting = [f"{n}-{i}" for n in range(2) for i in range(len(prompts))]
    for _ in range(5000):
        if not waiting and not engine.has_unfinished_requests():
            break
        if waiting and rng.random() < 0.3:
            name = waiting.pop()
            i = int(name.partition("-")[2])
            engine.add_request(name, {"prompt_token_ids": list(prompts[i])}, params[i])
        if rng.random() < 0.05:
            running = [r.request_id for r in core(llm).scheduler.running]
            for name in rng.sample(running, min(1, len(running))):
                outer = name.rpartition("-")[0] if name.count("-") > 1 else name
                aborted.add(outer)
                engine.abort_request([name], internal=True)
        for output in engine.step():
            if output.finished and output.outputs[0].finish_reason != "abort":
                finished[output.request_id] = list(output.outputs[0].token_ids)
    assert aborted
    assert len(finished) >= 16
    for name, answer in finished.items():
        assert answer == expected[int(name.partition("-")[2])], name


class MaskWithoutTriton:
    """vLLM's kernel for grammars, which Triton's interpreter does not run."""

    def __getitem__(self, grid):
        return self.launch

    def launch(self, logits, _, places, cu_num_logits, bitmask, *unused, **constants):
        bits = np.unpackbits(bitmask.numpy().view(np.uint8), axis=1, bitorder="little")
        allowed = torch.from_numpy(bits[:, : logits.shape[1]].astype(bool))
        for row, place in enumerate(places.tolist()):
            req, position = divmod(place, constants["MASK_STRIDE"])
            begin, end = cu_num_logits[req : req + 2].tolist()
            if position < end - begin:
                logits[begin + position].masked_fill_(~allowed[row], -torch.inf)


@pytest.fixture(scope="module")
def grammars(few_plain):
    """Requests of which some have a grammar, and what vLLM alone answers."""
    from vllm import SamplingParams

    prompts = few_plain[0][0:12:2]
    kinds = [
        {"regex": r"(Yes|No), [a-z ]{20,30}\."},
        {},
        {"choice": ["one two three four five six", "seven eight nine ten eleven"]},
        {"regex": r"[0-9]{10,30}"},
        {},
        {"regex": r"(The [a-z]+ ){4,8}\."},
    ]
    params = [
        SamplingParams(
            temperature=0.0,
            max_tokens=60,
            structured_outputs=StructuredOutputsParams(**kind) if kind else None,
        )
        for kind in kinds
    ]
    with v1_engine() as llm:
        return prompts, params, generate(llm, prompts, params)
