"""Load-aware drafting in the engine: commits that wait, rests, and the start-up measurement."""

import contextlib
import random
import subprocess
import sys

import numpy as np
import pytest

from engine import core, engine, generate, greedy_params, mixed_prompts, proposer, watch
from failfast_vllm.config import MODELS_DIR
from failfast_vllm.drafting.interfaces import Planner
from failfast_vllm.planning.costs import Costs, CostTable
from independent import IndependentDrafter
from state_check import TOLERANCE, largest_error

ASKED = {"method": "failfast", "load_aware": True}


@pytest.fixture(scope="module")
def expected():
    """Prompts, twice for prefix hits, and vLLM's own answers."""
    with engine(None) as llm:
        prompts = [p for p in mixed_prompts(llm.get_tokenizer(), 40) if len(p) < 700]
        prompts = prompts + prompts[:16]
        params = greedy_params(prompts)
        return prompts, params, generate(llm, prompts, params)


@pytest.mark.parametrize(
    "overrides",
    [
        pytest.param({"enable_prefix_caching": True}, id="prefix hits"),
        pytest.param(
            {"enable_prefix_caching": True, "num_gpu_blocks_override": 36, "block_size": 64},
            id="preemption",
        ),
    ],
)
def test_drafting_that_comes_and_goes(expected, overrides):
    """Catches KV that is read where a commit was left out, and commits that are never made up."""
    prompts, params, answers = expected
    rng = random.Random(4)
    with engine(ASKED, **overrides) as llm, watch(llm) as record:
        planner = proposer(llm).drafter.planner
        planner.learns = False  # times of this machine would make every run another
        planner.costs = Costs(CostTable([1, 256], [1.0, 9.0]), CostTable([1, 256], [9.0, 18.0]))
        first = planner.first
        late = []  # commits of blocks that an earlier step had completed

        def moody_first(asked):
            late.append(int((asked.commit_rows >= 64).sum()))
            wanted, (increments, copied) = asked.wanted, first(asked)
            planner.guard.steps_to_rest = rng.choice((0, 0, 3, 7))
            asks = rng.choice((0.0, 0.5, 1.0))  # of the sequences
            chosen = np.array([rng.random() < asks for _ in wanted])
            if rng.random() < 0.8:
                increments = np.where(chosen, np.minimum(wanted, 10), 0)
            return increments, np.where(increments > 0, 0, copied)

        planner.first = moody_first
        independent = IndependentDrafter(MODELS_DIR / "drafter", num_draftable_tokens=1)
        found = []
        error, num_checked = largest_error(
            llm, independent, lambda: found.extend(generate(llm, prompts, params)), every=3
        )
        record.assert_not_vacuous()
    assert found == answers
    assert error < TOLERANCE
    assert num_checked > 30
    assert sum(late) > 5


def test_nobody_asks_for_drafts_while_the_planner_rests(expected):
    """Catches an engine that asks in every step, and one that does not ask when the load falls."""
    prompts, params, answers = expected
    with engine(ASKED) as llm:
        adapter, scheduler, running = proposer(llm), core(llm).scheduler, []
        take, planner = adapter.take_drafts, adapter.drafter.planner

        def watching_take():
            running.append(len(scheduler.running))
            return take()

        adapter.take_drafts = watching_take
        planner.learns = False
        planner.costs = Costs(CostTable([1, 256], [1e6, 9e6]), CostTable([1, 256], [9.0, 18.0]))
        assert generate(llm, prompts, params) == answers
    num_steps = adapter.session.stats.num_steps
    assert num_steps > 100
    assert len(running) < num_steps / 6
    # the answers end one by one, and whenever a fifth of those that rest have ended, it looks
    assert set(range(1, 4)) & set(running)


def test_where_drafting_does_not_pay_nothing_is_drafted(expected):
    """And drafting comes back when it pays again, over prompts that were never committed."""
    prompts, params, answers = expected
    with engine({**ASKED, "copies": False}) as llm:
        planner = proposer(llm).drafter.planner
        assert len(planner.costs.verify.sizes) >= 6
        assert (planner.costs.verify.ms > 0).all()
        planner.learns = False
        verify = CostTable([1, 256], [9.0, 18.0])
        planner.costs = Costs(CostTable([1, 256], [1e6, 9e6]), verify)
        with watch(llm) as record:
            assert generate(llm, prompts, params) == answers
        assert record.num_drafted == 0
        # steps that are not looked at are reported all the same
        assert sum(len(r.emitted) for r in record.rounds) == sum(map(len, answers))
        assert proposer(llm).stats.num_forwards == 0
        planner.costs = Costs(CostTable([1, 256], [1e-3, 9e-3]), verify)
        planner.guard.steps_to_rest = 0
        with watch(llm) as record:
            assert generate(llm, prompts, params) == answers
        record.assert_not_vacuous()


def test_kv_from_a_connector_is_not_trusted(expected):
    """Catches a drafter that reads pages which something else has filled."""
    prompts, params, answers = expected
    with engine(ASKED, enable_prefix_caching=True) as llm:
        drafter = proposer(llm).drafter
        propose, found = drafter.propose, []

        def watching(step):
            found.extend(step.committed_lens[step.known_lens > 0].tolist())
            return propose(step)

        drafter.propose = watching
        drafter.planner = Planner(drafter.planner.draft_increment)
        longest = max(range(len(prompts)), key=lambda i: len(prompts[i]))
        for trusted in (True, False):
            proposer(llm).foreign_kv = not trusted
            for again in (False, True):
                found.clear()
                assert generate(llm, [prompts[longest]], params[longest : longest + 1]) == [
                    answers[longest]
                ]
                assert (found[0] > 0) == (again and trusted), "the second run is a prefix hit"
                assert found[1] > 0
            llm.reset_prefix_cache()


@contextlib.contextmanager
def busy_loops(count):
    loops = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for loop in loops:
            loop.kill()
            loop.wait()


@pytest.mark.slow
def test_a_server_on_a_busy_machine_drafts(expected):
    """Catches a start or a moment beside other processes that ends drafting for good."""
    prompts, params, answers = expected
    few = [i for i, answer in enumerate(answers) if len(answer) >= 40][:2]
    chosen = [prompts[i] for i in few], [params[i] for i in few]
    with busy_loops(4), engine(ASKED, max_num_seqs=1) as llm:
        for _ in range(2):
            with watch(llm) as record:
                assert generate(llm, *chosen) == [answers[i] for i in few]
            drafted = [r for r in record.rounds if r.num_passes]
            print(f"{len(drafted)} of {len(record.rounds)} rounds with passes")
            assert sum(len(r.emitted) for r in drafted) > 0
