"""Weights of the target that are replaced while the engine runs, as in reinforcement learning."""

from unittest import mock

import pytest
import torch

from engine import TARGET, engine, generate, greedy_params, mixed_prompts, proposer, watch
from failfast_vllm.config import MODELS_DIR
from failfast_vllm.planning.costs import Costs, CostTable
from independent import IndependentDrafter
from live_weights import drifted, other_weights, reload
from state_check import TOLERANCE, largest_error

LOAD_AWARE = {"method": "failfast", "load_aware": True}
NUM_TOKENS = 64  # of each answer
STEPS = 5  # between two changes
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


class Serving:
    """Requests of a running engine: their tokens so far, and how many they had at each change."""

    def __init__(self, llm, prompts):
        self.engine, self.prompts = llm.llm_engine, prompts
        self.answers, self.starts = {}, {}  # by index of the prompt; starts: {change: tokens}
        self.running = set()

    def add(self, indices, change=0):
        for i in indices:
            params = long_params(NUM_TOKENS)
            self.engine.add_request(str(i), {"prompt_token_ids": list(self.prompts[i])}, params)
            self.answers[i], self.starts[i] = [], {change: 0}
            self.running.add(i)

    def changed(self, change):
        """Weights number `change` count from here."""
        for i in self.running:
            self.starts[i][change] = len(self.answers[i])

    def step(self):
        for output in self.engine.step():
            i = int(output.request_id)
            self.answers[i] = list(output.outputs[0].token_ids)
            if output.finished:
                self.running.remove(i)

    def finish(self):
        while self.running:
            self.step()

    def segments(self, change):
        """[(index, first token, end)] of what was generated with weights number `change`."""
        found = []
        for i, starts in self.starts.items():
            if change in starts:
                later = [start for number, start in starts.items() if number > change]
                found.append((i, starts[change], min([*later, len(self.answers[i])])))
        return [(i, start, end) for i, start, end in found if end > start]


def long_params(num_tokens):
    from vllm import SamplingParams

    return SamplingParams(temperature=0.0, max_tokens=num_tokens)


def train(llm, prompts, steps_of_training):
    """Serve three new prompts before each change of the weights, the others go on."""
    serving = Serving(llm, prompts)
    serving.add(range(3))
    for change, weights in enumerate(steps_of_training, 1):
        for _ in range(STEPS):
            serving.step()
        assert serving.running, "nothing is in flight"
        reload(llm, weights_iterator=weights)
        serving.changed(change)
        serving.add(range(3 * change, 3 * change + 3), change)
    serving.finish()
    return serving


def keep_in_flight(llm, prompts, weights):
    """Change weights below requests that keep their KV; nothing is computed anew."""
    serving = Serving(llm, prompts)
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

    serving = Serving(llm, prompts)
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
            found["served"] = train(llm, prompts, steps_of_training)

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
        for change in range(len(DRIFT) + 1):
            if change:
                reload(llm, weights_iterator=steps_of_training[change - 1])
            parts = served.segments(change)
            so_far = [[*prompts[i], *served.answers[i][:start]] for i, start, _ in parts]
            answers = generate(llm, so_far, [long_params(end - start) for _, start, end in parts])
            assert answers == [served.answers[i][start:end] for i, start, end in parts], change
        for i in kept.answers:
            reload(llm, weights_iterator=steps_of_training[-1])
            alone = Serving(llm, prompts)
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
