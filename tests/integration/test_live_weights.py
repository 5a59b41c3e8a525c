"""Weights of the target that are replaced while the engine runs, as in reinforcement learning."""

from unittest import mock

import pytest
import torch

from engine import TARGET, engine, generate, greedy_params, mixed_prompts, proposer, watch
from failfast_vllm.config import MODELS_DIR
from failfast_vllm.planning.costs import Costs, CostTable
from independent import IndependentDrafter
from live_weights import Serving, assert_served, drifted, long_params, other_weights, reload, train
from state_check import TOLERANCE, largest_error

LOAD_AWARE = {"method": "failfast", "load_aware": True}
NUM_TOKENS = 64  # of each answer
DRIFT = [0.02, 0.03, 0.04, 0.06, 0.08, 0.1, 0.15, 0.3, 0.05, 0.0]  # of the weights; 0: as at start


def test_answers_after_reloading_are_vllms(tmp_path):
    """Catches drafts, or KV of the drafter, that tie answers to the weights of the start.

    Compared with vLLM's own reloading, which on a CPU leaves a tied output head as it was.
    """
    path = other_weights(tmp_path / "trained")
    with engine(enable_prefix_caching=True) as llm:
        prompts = mixed_prompts(llm.get_tokenizer(), 12)
        params = greedy_params(prompts)
        before = generate(llm, prompts, params)
        reload(llm, weights_path=path)
        expected = generate(llm, prompts, params)
    assert before != expected
    with engine("failfast", enable_prefix_caching=True) as llm, watch(llm) as record:
        assert generate(llm, prompts, params) == before
        reload(llm, weights_path=path)
        num_before = record.num_accepted
        assert generate(llm, prompts, params) == expected
    assert record.num_accepted > num_before > 0


def keep_in_flight(llm, prompts, weights):
    """Change weights below requests that keep their KV; nothing is computed anew."""
    serving = Serving(llm, prompts, NUM_TOKENS)
    serving.add(range(3))
    while not all(serving.answers.values()) or max(map(len, serving.answers.values())) < 12:
        serving.step()
    llm.collective_rpc("reload_weights", kwargs={"weights_iterator": weights})
    serving.changed(1)
    assert len(serving.running) == 3
    serving.finish()
    return serving


def fixed_times(llm):
    """Times at which drafting pays, so that a run does not depend on this machine's."""
    planner = proposer(llm).drafter.planner
    planner.learns = False
    planner.costs = Costs(CostTable([1, 256], [1.0, 2.0]), CostTable([1, 256], [9.0, 12.0]))


def drafting(llm, record, prompts):
    """Accepted tokens per verified draft, and the answers."""
    first = len(record.rounds)
    answers = generate(llm, prompts, long_params(NUM_TOKENS))
    drafts = [r for r in record.rounds[first:] if r.drafted]
    return sum(len(r.emitted) - 1 for r in drafts) / len(drafts), answers


def sleep_and_wake(llm, prompts):
    """Answers of requests that were in flight; what vLLM said."""
    from vllm.v1.worker import cpu_worker

    serving = Serving(llm, prompts, NUM_TOKENS)
    serving.add(range(3))
    while not all(serving.answers.values()):
        serving.step()
    with mock.patch.object(cpu_worker.logger, "warning") as warning:
        llm.sleep(level=1, mode="keep")
        assert llm.wake_up()
    assert len(serving.running) == 3
    serving.finish()
    return list(serving.answers.values()), {call.args[0] for call in warning.call_args_list}


def parameters(llm):
    """Copies of the drafter's."""
    model = proposer(llm).drafter.model.model
    return {name: weight.clone() for name, weight in model.named_parameters()}


@pytest.fixture(scope="module")
def trained():
    """Failfast's side: what it served while the target changed ten times, and what came after."""
    steps_of_training = [drifted(scale) for scale in DRIFT]
    dense = IndependentDrafter(MODELS_DIR / "drafter", num_draftable_tokens=1)
    found = {}
    with engine(LOAD_AWARE, enable_prefix_caching=True) as llm, watch(llm) as record:
        fixed_times(llm)
        prompts = [p for p in mixed_prompts(llm.get_tokenizer(), 90) if 10 < len(p) < 300]
        prompts = prompts[: 3 * len(DRIFT) + 3]
        weights = parameters(llm)
        found["before"] = [drafting(llm, record, prompts[:12]) for _ in range(4)][-1]

        def run():
            found["served"] = train(llm, prompts, steps_of_training, NUM_TOKENS)

        found["error"], found["passes"] = largest_error(llm, dense, run)
        found["after"] = [drafting(llm, record, prompts[:12]) for _ in range(4)]
        found["slept"] = sleep_and_wake(llm, prompts)
        found["kept"] = keep_in_flight(llm, prompts, steps_of_training[0])
        reload(llm, weights_iterator=steps_of_training[7])
        found["far"] = drafting(llm, record, prompts[:12])
        found["unchanged"] = {n: torch.equal(w, weights[n]) for n, w in parameters(llm).items()}
    return found, prompts, steps_of_training


def test_ten_changes_under_load(trained):
    """Catches tokens, of requests in flight or new ones, that come from weights of before a change.

    A plain engine whose weights change likewise goes on from the same tokens.
    """
    found, prompts, steps_of_training = trained
    served, kept = found["served"], found["kept"]
    with engine(enable_prefix_caching=True) as llm:
        assert_served(llm, served, steps_of_training)
        for i in kept.answers:
            reload(llm, weights_iterator=steps_of_training[-1])
            alone = Serving(llm, prompts, NUM_TOKENS)
            alone.add([i])
            while len(alone.answers[i]) < kept.starts[i][1]:
                alone.step()
            llm.collective_rpc("reload_weights", kwargs={"weights_iterator": steps_of_training[0]})
            alone.finish()
            assert alone.answers[i] == kept.answers[i]


def test_drafter_and_acceptance_after_the_changes(trained):
    """Catches KV of the drafter that a change has spoilt, and a planner that stays discouraged."""
    found, _, _ = trained
    assert found["passes"] > 50
    assert found["error"] < TOLERANCE
    assert found["unchanged"]
    assert all(found["unchanged"].values())
    (before, answers), (far, _) = found["before"], found["far"]
    print("accepted per draft", before, [share for share, _ in found["after"]], far)
    assert [after for _, after in found["after"]] == [answers] * 4
    assert far < 0.9 * before
    assert found["after"][-1][0] > 0.9 * before


def test_sleep_on_a_cpu(trained):
    """Catches requests that a sleep has spoilt, and a vLLM that no longer ignores it on CPUs."""
    from vllm.engine.arg_utils import EngineArgs

    found, _, _ = trained
    answers, said = found["slept"]
    assert answers == found["before"][1][:3]
    assert said == {"sleep mode is not supported on CPU, ignore it."}
    with pytest.raises(ValueError, match="Sleep mode is not supported on current platform"):
        EngineArgs(TARGET, enable_sleep_mode=True).create_engine_config()
