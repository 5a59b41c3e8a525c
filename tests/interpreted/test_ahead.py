"""Engines of the V2 runner that schedule ahead while the planner rests."""

import pytest
from vllm.v1.worker.gpu import structured_outputs

from engine import count_preemptions, generate
from failfast_vllm.config import METHOD, MODELS_DIR
from in_flight import ALONE, MaskWithoutTriton, come_and_go, grammars, rows, taking_turns  # noqa: F401
from runners import few_plain  # noqa: F401 - a fixture
from turns import CopyingTurns


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
    llm, watch = turns
    watch.steps.clear()
    come_and_go(llm, *few_plain)
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


def test_grammars(grammars, monkeypatch):
    """A grammar waits for the token before: vLLM then samples a step that is in flight later."""
    monkeypatch.setattr(structured_outputs, "_apply_grammar_bitmask_kernel", MaskWithoutTriton())
    prompts, params, expected = grammars
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
