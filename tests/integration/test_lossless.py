"""Greedy output with failfast equals greedy output without it, token for token."""

import pytest

from engine import (
    around_the_drafters_end,
    assert_drafts_end_there,
    count_preemptions,
    engine,
    generate,
    greedy_params,
    lower_max_model_len,
    mixed_prompts,
    proposer,
    watch,
)
from wide_models import FEW_POSITIONS, few_positions, rewrite


@pytest.fixture(scope="module", params=[74, pytest.param(204, marks=pytest.mark.large)])
def plain(request):
    """Prompts, their sampling parameters, and what vLLM alone answers."""
    with engine() as llm:
        prompts = mixed_prompts(llm.get_tokenizer(), request.param)
        params = greedy_params(prompts, 64)
        return prompts, params, generate(llm, prompts, params)


@pytest.fixture(scope="module")
def drafting(plain):
    """After `plain`, so that one engine runs at a time."""
    with engine("failfast") as llm:
        yield llm


def assert_equal(found, expected):
    different = [i for i, (a, b) in enumerate(zip(found, expected, strict=True)) if a != b]
    assert not different, f"prompts {different} answer differently"


def test_batches_of_up_to_16(plain, drafting):
    prompts, params, expected = plain
    with watch(drafting) as record:
        assert_equal(generate(drafting, prompts, params), expected)
        record.assert_not_vacuous()
        sizes = {len(lens) for lens in record.draft_lens}
        assert sizes >= {1, 16}
        assert len(sizes) > 8


def test_one_and_three_at_a_time(plain, drafting):
    prompts, params, expected = plain
    with watch(drafting) as record:
        for i in range(0, 24, 3):
            part = slice(i, i + 3)
            assert_equal(generate(drafting, prompts[part], params[part]), expected[part])
        for i in range(24, 36):
            assert generate(drafting, [prompts[i]], params[i]) == [expected[i]]
        record.assert_not_vacuous()


def test_beside_sampled_requests(plain, drafting):
    """Both kinds are verified in the same batch; only the greedy ones have one right answer."""
    from vllm import SamplingParams

    prompts, params, expected = plain
    sampled = SamplingParams(temperature=0.7, top_k=20, top_p=0.9, max_tokens=40)
    with watch(drafting) as record:
        mixed = [p for prompt in prompts[:40] for p in (prompt, prompt)]
        answers = generate(drafting, mixed, [p for param in params[:40] for p in (param, sampled)])
        assert_equal(answers[::2], expected[:40])
        record.assert_not_vacuous()


def test_prefix_cache_hits(plain):
    """Blocks that another request committed are read; the same text also arrives within a step."""
    prompts, params, expected = plain
    with engine("failfast", enable_prefix_caching=True) as llm, watch(llm) as record:
        prompts, params, expected = prompts[:48], params[:48], expected[:48]
        doubled = [p for prompt in prompts for p in (prompt, prompt)]
        answers = generate(llm, doubled, [p for param in params for p in (param, param)])
        assert_equal(answers[::2], expected)
        assert_equal(answers[1::2], expected)
        assert_equal(generate(llm, prompts, params), expected)
        record.assert_not_vacuous()
        assert num_cached_tokens(llm, prompts) > 1000


def num_cached_tokens(llm, prompts):
    from vllm import SamplingParams

    requests = [{"prompt_token_ids": list(ids)} for ids in prompts[:60]]
    outputs = llm.generate(requests, SamplingParams(max_tokens=1), use_tqdm=False)
    return sum(output.num_cached_tokens or 0 for output in outputs)


def test_prompts_split_by_a_small_token_budget(plain):
    prompts, params, expected = plain
    with engine("failfast", max_num_batched_tokens=160) as llm, watch(llm) as record:
        assert max(len(prompt) for prompt in prompts) > 8 * 160
        assert_equal(generate(llm, prompts, params), expected)
        record.assert_not_vacuous()


def test_forced_preemption(plain):
    prompts, params, expected = plain
    with engine("failfast", num_gpu_blocks_override=36, block_size=64) as llm:
        preempted = count_preemptions(llm)
        few = [i for i, prompt in enumerate(prompts) if len(prompt) < 1600]
        with watch(llm) as record:
            answers = generate(llm, [prompts[i] for i in few], [params[i] for i in few])
            assert_equal(answers, [expected[i] for i in few])
            record.assert_not_vacuous()
        assert preempted


def test_the_longest_context(plain):
    """A request that reaches max_model_len stops there, beside others that go on."""
    from vllm import SamplingParams

    prompts, _, _ = plain
    long = [prompt for prompt in prompts if 100 <= len(prompt) <= 140][:2]
    short = [prompt for prompt in prompts if len(prompt) < 60][:4]
    params = SamplingParams(temperature=0.0, max_tokens=200, ignore_eos=True)
    with engine(max_model_len=160) as llm:
        expected = generate(llm, long + short, params)
    with engine("failfast", max_model_len=160) as llm, watch(llm) as record:
        assert_equal(generate(llm, long + short, params), expected)
        assert lower_max_model_len(llm, 100) == proposer(llm).position_limit
        record.assert_not_vacuous()
    assert all(
        len(prompt) + len(answer) == 160
        for prompt, answer in zip(long + short, expected, strict=True)
    )


def test_a_target_that_is_longer_than_its_drafter(plain, tmp_path):
    """Behind the drafter's last position nothing is drafted, and nobody else is stopped."""
    from vllm import SamplingParams

    prompts = around_the_drafters_end(plain[0], FEW_POSITIONS)
    params = SamplingParams(temperature=0.0, max_tokens=FEW_POSITIONS + 2, ignore_eos=True)
    given = {"method": "failfast", "model": rewrite("drafter", tmp_path / "short", few_positions)}
    with engine() as llm:
        expected = generate(llm, prompts, params)
    with engine(given) as llm, watch(llm) as record:
        assert llm.llm_engine.model_config.max_model_len == 2048
        assert proposer(llm).position_limit == FEW_POSITIONS
        assert generate(llm, prompts, params) == expected
    assert len(prompts) == 6
    assert all(len(p) + len(a) > FEW_POSITIONS for p, a in zip(prompts, expected, strict=True))
    assert_drafts_end_there(record, FEW_POSITIONS)
