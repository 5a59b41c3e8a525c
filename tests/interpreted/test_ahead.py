"""Engines of the V2 runner that schedule ahead while the planner rests."""

import contextlib
import random

import numpy as np
import pytest
import torch
from vllm.sampling_params import StructuredOutputsParams
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.worker.gpu import structured_outputs

from engine import core, count_preemptions, generate, proposer
from failfast_vllm.config import METHOD, MODELS_DIR
from runners import MIXED, few_plain, v1_engine, v2_engine  # noqa: F401 - a fixture
from turns import CopyingTurns, Turns

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


@pytest.fixture(scope="module")
def turns(few_plain, rows):
    """Prefix hits, and prompts in several parts."""
    overrides = {"enable_prefix_caching": True, "max_num_batched_tokens": 256}
    with taking_turns(**overrides) as found:
        yield found


def test_answers_stay(few_plain, turns):
    prompts, params, expected = few_plain
    llm, watch = turns
    for _ in range(2):  # with prefix hits the second time
        assert generate(llm, prompts, params) == expected
    watch.assert_both_kinds()


def test_rows_in_mixed_batches(rows, turns):
    """Catches what a request needs that is lost between a step in flight and the next."""
    prompts, params, expected = rows
    llm, watch = turns
    watch.steps.clear()
    for _ in range(2):  # the second time in slots that others have left
        assert generate(llm, prompts, params) == expected
        prompts, params, expected = prompts[::-1], params[::-1], expected[::-1]
    watch.assert_both_kinds()


def test_requests_come_and_go_in_flight(few_plain, turns):
    """Others arrive and are aborted at each point of the turns; the answers of the rest stay."""
    prompts, params, expected = few_plain
    llm, watch = turns
    watch.steps.clear()
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
    watch.assert_both_kinds()


def test_preemption(few_plain):
    prompts, params, expected = few_plain
    few = [i for i, prompt in enumerate(prompts) if len(prompt) < 440][:8] * 2
    overrides = {"num_gpu_blocks_override": 9, "block_size": 64, "max_model_len": 512}
    with taking_turns(**overrides) as (llm, watch):
        preempted = count_preemptions(llm)
        answers = generate(llm, [prompts[i] for i in few], [params[i] for i in few])
        assert answers == [expected[i] for i in few]
    assert preempted
    watch.assert_both_kinds()


def test_without_a_drafter(few_plain):
    prompts, params, expected = few_plain
    with taking_turns(ALONE, CopyingTurns) as (llm, watch):
        assert generate(llm, prompts, params) == expected
    watch.assert_both_kinds()


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


def test_grammars(few_plain, monkeypatch):
    """A grammar waits for the token before: vLLM then samples a step that is in flight later."""
    from vllm import SamplingParams

    monkeypatch.setattr(structured_outputs, "_apply_grammar_bitmask_kernel", MaskWithoutTriton())
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
        expected = generate(llm, prompts, params)
    with taking_turns() as (llm, watch):
        for _ in range(2):
            assert generate(llm, prompts, params) == expected
    watch.assert_both_kinds(least=3)


def test_who_does_not_schedule_ahead(monkeypatch):
    from vllm.engine.arg_utils import EngineArgs

    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "1")
    target = str(MODELS_DIR / "target")

    def build(speculative, **given):
        args = EngineArgs(model=target, speculative_config=speculative, **given)
        config = args.create_engine_config()
        assert args.async_scheduling == given.get("async_scheduling")
        return config.scheduler_config.async_scheduling

    assert build("failfast")
    assert build("failfast", async_scheduling=True)
    assert not build("failfast", async_scheduling=False)
    assert not build({"method": METHOD, "load_aware": False})
    with pytest.raises(ValueError, match="--async-scheduling needs the V2 model runner"):
        build({"method": METHOD, "load_aware": False}, async_scheduling=True)
