"""The V2 model runner: V2 with failfast = V1 with failfast = no speculation."""

import pytest

from engine import (
    around_the_drafters_end,
    assert_drafts_end_there,
    core,
    count_preemptions,
    generate,
    lower_max_model_len,
    policy,
    proposer,
    watch,
)
from failfast_vllm.config import METHOD, MODELS_DIR
from independent import IndependentDrafter
from runners import plain, start_batch_invariant, v1_engine, v2_engine  # noqa: F401 - a fixture
from state_check import TOLERANCE, largest_error
from trace_lines import rounds_of
from wide_models import FEW_POSITIONS, few_positions, rewrite

NUM_ROUNDS = 50


def in_batches(llm, prompts, params):
    """Some alone, some by three, the others by eight."""
    answers = []
    for begin, end, size in ((0, 6, 1), (6, 18, 3), (18, len(prompts), 8)):
        for i in range(begin, end, size):
            part = slice(i, min(i + size, end))
            answers += generate(llm, prompts[part], params[part])
    return answers


@pytest.fixture(scope="module")
def v1_record(plain):
    prompts, params, expected = plain
    with v1_engine("failfast") as llm, watch(llm) as record:
        assert in_batches(llm, prompts, params) == expected
    return record


def test_v2_equals_v1_round_by_round(plain, v1_record, tmp_path):
    prompts, params, expected = plain
    path = tmp_path / "t.jsonl"
    asked = {"method": "failfast", "trace": str(path)}
    with v2_engine(asked) as llm, watch(llm) as record:
        assert in_batches(llm, prompts, params) == expected
    record.assert_not_vacuous()
    assert len(record.rounds) >= NUM_ROUNDS
    assert sorted(record.proposals) == sorted(v1_record.proposals)

    def comparable(rounds):
        return sorted((r.drafted, r.emitted, r.num_passes, r.known_len, r.num_rows) for r in rounds)

    assert comparable(record.rounds) == comparable(v1_record.rounds)
    assert [(r.known, r.drafted, r.passes, r.rows, r.accepted) for r in rounds_of(path)] == [
        (r.known_len, len(r.drafted), r.num_passes, r.num_rows, len(r.emitted) - 1)
        for r in record.rounds
    ]


@pytest.fixture(scope="module")
def dense():
    return IndependentDrafter(MODELS_DIR / "drafter", num_draftable_tokens=1)


@pytest.mark.parametrize(
    "overrides",
    [
        pytest.param({"enable_prefix_caching": True}, id="prefix hits"),
        pytest.param({"max_num_batched_tokens": 160}, id="split prompts"),
        pytest.param(
            {"num_gpu_blocks_override": 12, "block_size": 64, "max_model_len": 640},
            id="preemption",
        ),
    ],
)
def test_answers_and_drafter_state(plain, dense, overrides):
    """The same answers, and after every step the same hidden states as a full recompute."""
    prompts, params, expected = plain
    few = [i for i, prompt in enumerate(prompts) if len(prompt) < 700][12:24] * 2
    with v2_engine(**overrides) as llm, watch(llm) as record:
        preempted = count_preemptions(llm)
        answers = []

        def run():
            answers.extend(generate(llm, [prompts[i] for i in few], [params[i] for i in few]))

        error, num_checked = largest_error(llm, dense, run)
        assert answers == [expected[i] for i in few]
        record.assert_not_vacuous()
    assert num_checked > 50
    assert error < TOLERANCE
    assert bool(preempted) == ("num_gpu_blocks_override" in overrides)


def test_steps_without_drafts_commit(plain, dense):
    """vLLM may ask for no draft in a step; blocks completed there are written all the same."""
    prompts, params, expected = plain
    some = slice(0, 10)
    with v2_engine() as llm, watch(llm) as record:
        speculator = proposer(llm)
        propose, num_steps = speculator.propose, []

        def sparing_propose(*args, num_speculative_tokens, **kwargs):
            num_steps.append(None)
            wanted = 0 if len(num_steps) % 3 else num_speculative_tokens
            return propose(*args, num_speculative_tokens=wanted, **kwargs)

        speculator.propose = sparing_propose
        answers = []
        error, _ = largest_error(
            llm, dense, lambda: answers.extend(generate(llm, prompts[some], params[some]))
        )
    assert answers == expected[some]
    assert error < TOLERANCE
    assert sum(not any(lens) for lens in record.draft_lens) > len(record.draft_lens) / 2
    assert record.num_accepted > 0


def test_passes_in_buckets(plain):
    """Padded to fixed shapes as for captured graphs (here each replay runs the pass again)."""
    prompts, params, expected = plain
    some, num_replays = slice(0, 12), []
    with v2_engine() as llm:
        speculator = proposer(llm)

        def capture(run):
            run()  # the largest bucket, which comes first, makes the buffer of all

            def replay():
                num_replays.append(None)
                run()

            return replay

        speculator.drafter.model.capture(capture, 8)
        assert generate(llm, prompts[some], params[some]) == expected[some]
        stats = speculator.stats
    assert len(num_replays) > stats.num_forwards / 2


def test_an_answer_that_ends_inside_an_accepted_run(plain):
    from vllm import SamplingParams

    prompts = plain[0][0:12:2]  # questions with an answer that ends by itself
    params = SamplingParams(temperature=0.0, max_tokens=300)
    with v1_engine() as llm:
        expected = generate(llm, prompts, params)
        eos = llm.get_tokenizer().eos_token_id
    with v2_engine() as llm, watch(llm) as record:
        assert generate(llm, prompts, params) == expected
        assert core(llm).scheduler.kv_cache_manager.usage == 0.0
    assert any(eos in r.emitted[:-1] for r in record.rounds)


def test_the_longest_context(plain):
    from vllm import SamplingParams

    prompts = [p for p in plain[0] if 80 <= len(p) <= 140][:2]
    longer = [p for p in plain[0] if len(p) > 160]
    prompts += [longer[0][:110], longer[1][:150]]
    params = SamplingParams(temperature=0.0, max_tokens=200, ignore_eos=True)
    with v1_engine(max_model_len=160) as llm:
        expected = generate(llm, prompts, params)
    with v2_engine(max_model_len=160) as llm, watch(llm) as record:
        assert generate(llm, prompts, params) == expected
        assert lower_max_model_len(llm, 100) == proposer(llm).position_limit
    assert record.num_accepted > 0
    assert {len(p) + len(a) for p, a in zip(prompts, expected, strict=True)} == {160}


def test_a_target_that_is_longer_than_its_drafter(plain, tmp_path):
    """vLLM 0.33 would cut the target to the drafter's length; ours keeps it, as on V1."""
    from vllm import SamplingParams

    prompts = around_the_drafters_end(plain[0], FEW_POSITIONS)
    params = SamplingParams(temperature=0.0, max_tokens=FEW_POSITIONS + 2, ignore_eos=True)
    given = {"method": "failfast", "model": rewrite("drafter", tmp_path / "short", few_positions)}
    with v1_engine() as llm:
        expected = generate(llm, prompts, params)
    with v2_engine(given) as llm, watch(llm) as record:
        assert llm.llm_engine.model_config.max_model_len == 2048
        assert proposer(llm).position_limit == FEW_POSITIONS
        assert generate(llm, prompts, params) == expected
    assert len(prompts) == 6
    assert all(len(p) + len(a) > FEW_POSITIONS for p, a in zip(prompts, expected, strict=True))
    assert_drafts_end_there(record, FEW_POSITIONS)


def test_aborted_requests_leave_the_others_alone(plain):
    from vllm import SamplingParams

    prompts = plain[0][0:12:2]
    params = SamplingParams(temperature=0.0, max_tokens=40)
    with v1_engine() as llm:
        expected = generate(llm, prompts, params)
    with v2_engine() as llm, watch(llm) as record:
        for i, prompt in enumerate(prompts):
            llm.llm_engine.add_request(str(i), {"prompt_token_ids": prompt}, params)
        finished = {}
        for step in range(1000):
            if not llm.llm_engine.has_unfinished_requests():
                break
            if step == 2:
                llm.llm_engine.abort_request(["1", "4"])
            for output in llm.llm_engine.step():
                if output.finished:
                    finished[output.request_id] = list(output.outputs[0].token_ids)
        assert core(llm).scheduler.kv_cache_manager.usage == 0.0
    kept = {i: expected[int(i)] for i in ("0", "2", "3", "5")}
    assert {i: finished[i] for i in kept} == kept
    assert record.num_accepted > 0


def test_a_window_is_that_of_v1(plain):
    """Catches a window that V2 reads from another page of its block table."""
    prompts, params, expected = plain
    few = [i for i, prompt in enumerate(prompts) if 190 < len(prompt) < 440][:3]
    assert few
    asked, found = {"method": METHOD, "drafter_window": 64}, []
    for runner in (v1_engine, v2_engine):
        with runner(asked, block_size=32) as llm, watch(llm) as record:
            answers = generate(llm, [prompts[i] for i in few], [params[i] for i in few])
        assert answers == [expected[i] for i in few]
        found.append(sorted((tuple(p.known), tuple(p.draft)) for p in record.proposals))
    assert found[0] == found[1]
    assert any(len(draft) > 1 for _, draft in found[0])


def test_outcomes_belong_to_their_drafts_across_preemptions(plain):
    """Catches outcomes paired with another draft, and preempted requests taken for ended ones."""
    prompts, params, expected = plain
    few = [i for i, prompt in enumerate(prompts) if len(prompt) < 440][:12] * 2
    overrides = {"num_gpu_blocks_override": 9, "block_size": 64, "max_model_len": 512}
    with v2_engine(**overrides) as llm, policy(llm, "failfast"):
        session = proposer(llm).session
        preempted, forgotten, observed = count_preemptions(llm), [], []
        planner = session.drafter.planner
        forget, observe = session.forget, planner.observe

        def recording_forget(req_ids):
            ended = list(req_ids)
            forgotten.extend(ended)
            forget(ended)

        def recording_observe(rounds):
            observed.extend(rounds)
            observe(rounds)

        session.forget, planner.observe = recording_forget, recording_observe
        with watch(llm) as record:
            answers = generate(llm, [prompts[i] for i in few], [params[i] for i in few])
        assert answers == [expected[i] for i in few]
    assert preempted
    assert len(forgotten) == len(set(forgotten))
    rounds = [(len(r.drafted), len(r.emitted) - 1) for r in record.rounds if r.drafted]
    assert sorted((o.num_verified, o.num_accepted) for o in observed) == sorted(rounds)
