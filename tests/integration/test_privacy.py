"""What a request leaves behind reaches no other: ids under embedded prompts, state by request."""

import pytest

from embedded import (
    EMBEDS,
    answers,
    as_requests,
    assert_ids_stay_with_their_request,
    checked_views,
)
from engine import core, engine, greedy_params, mixed_prompts, policy, proposer, watch
from failfast_vllm.policies.table import POLICIES

TIGHT = {"num_gpu_blocks_override": 36, "block_size": 64}  # preempts


@pytest.fixture(scope="module")
def expected():
    """Requests, their sampling parameters, and what vLLM alone answers."""
    with engine(**EMBEDS) as llm:
        prompts = [p for p in mixed_prompts(llm.get_tokenizer(), 66) if 8 < len(p) < 700]
        requests, params = as_requests(prompts), greedy_params(prompts)
        return requests, params, answers(llm, requests, params)


def test_ids_stay_with_their_request():
    """Catches a drafter that reads the prompt of the request before in its slot."""
    from vllm import SamplingParams

    with engine("failfast", **EMBEDS) as llm:
        params = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)
        assert_ids_stay_with_their_request(llm, params)


@pytest.mark.parametrize(
    "overrides", [pytest.param({}, id="all at once"), pytest.param(TIGHT, id="preemption")]
)
def test_embedded_positions_are_masked(expected, overrides):
    """Catches ids where there are none, in whole and mixed prompts, also of resumed requests."""
    requests, params, answered = expected
    with engine("failfast", **EMBEDS, **overrides) as llm:
        preempted, preempt = [], core(llm).scheduler._preempt_request

        def counting_preempt(request, *args, **kwargs):
            preempted.append(request.prompt_embeds is not None)
            return preempt(request, *args, **kwargs)

        core(llm).scheduler._preempt_request = counting_preempt
        with watch(llm) as record, checked_views(llm) as hidden:
            assert answers(llm, requests, params) == answered
        record.assert_not_vacuous()
        assert sum(n > 0 for n in hidden) > 100
        assert any(preempted) == bool(overrides)


def test_a_salt_separates_prefix_hits():
    """Catches pages, and with them the drafter's KV, that a request with another salt finds."""
    from vllm import SamplingParams

    with engine("failfast", enable_prefix_caching=True) as llm, watch(llm) as record:
        prompt = next(p for p in mixed_prompts(llm.get_tokenizer(), 60) if len(p) > 600)
        params, cached = SamplingParams(temperature=0.0, max_tokens=24), []
        for salt in ("one", "other", "one"):
            request = {"prompt_token_ids": prompt, "cache_salt": salt}
            (output,) = llm.generate([request], params, use_tqdm=False)
            cached.append(output.num_cached_tokens)
    assert cached[:2] == [0, 0]
    assert cached[2] >= 512
    assert record.num_drafted > 0


@pytest.fixture(scope="module")
def traced(tmp_path_factory):
    path = tmp_path_factory.mktemp("trace") / "rounds.jsonl"
    with engine({"method": "failfast", "trace": str(path)}, max_num_seqs=4) as llm:
        yield llm


@pytest.mark.parametrize("name", POLICIES)
def test_nothing_by_request_outlives_it(traced, name):
    """Catches state of a request that was aborted, which one with the same id would find."""
    from vllm import SamplingParams

    llm = traced
    params = SamplingParams(temperature=0.0, max_tokens=60, ignore_eos=True)
    prompts = [p for p in mixed_prompts(llm.get_tokenizer(), 60) if 30 < len(p) < 300][:4]
    with policy(llm, name):
        for i, ids in enumerate(prompts):
            llm.llm_engine.add_request(str(i), {"prompt_token_ids": ids}, params)
        names, outputs = set(core(llm).scheduler.requests), {}
        for _ in range(4):
            outputs |= {o.request_id: o.outputs[0].token_ids for o in llm.llm_engine.step()}
        own = proposer(llm)
        state = [own.stats, own.session, own.drafter]
        assert names <= strings(state), "the search finds what is there"
        llm.llm_engine.abort_request(list(outputs))
        answers(llm, [{"prompt_token_ids": [5] * 40}], params)
        assert not names & strings(state)


def strings(roots):
    """All that this package's objects and their containers lead to from `roots`."""
    seen, waiting, found_strings = set(), list(roots), set()
    while waiting:
        found = waiting.pop()
        if id(found) in seen:
            continue
        seen.add(id(found))
        if isinstance(found, str):
            found_strings.add(found)
        elif isinstance(found, dict):
            waiting += [*found.keys(), *found.values()]
        elif isinstance(found, list | tuple | set | frozenset):
            waiting += found
        elif type(found).__module__.startswith("failfast_vllm"):
            waiting += vars(found).values() if hasattr(found, "__dict__") else ()
    return found_strings
