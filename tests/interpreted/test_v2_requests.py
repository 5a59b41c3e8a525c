"""The V2 model runner: what single requests ask, and what the runner reports and copies."""

import contextlib
import dataclasses
import itertools
import multiprocessing
import types

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from connectors import assert_stores_are_shared, prompts_of_pages
from embedded import (
    EMBEDS,
    answers,
    as_requests,
    assert_ids_stay_with_their_request,
    checked_views,
)
from engine import (
    count_preemptions,
    generate,
    greedy_params,
    mixed_prompts,
    only_drafts_are_verified,
    proposer,
    shipped_prompts,
    watch,
    whole_pages_and_a_token,
)
from failfast_vllm.config import MODELS_DIR
from independent import IndependentDrafter
from runners import (
    ANSWER_LEN,
    MIXED,
    few_plain,  # noqa: F401 - a fixture
    start_batch_invariant,
    v1_engine,
    v2_engine,
)


def test_what_single_requests_ask(few_plain):
    """Catches parameters of a request that do not reach its state slot, or reach another's."""
    from vllm import SamplingParams

    prompts = few_plain[0][0:16:2]
    stop = few_plain[2][4][10]  # in the middle of the third answer
    asked = [
        {"extra_args": {"failfast_max_len": 0}},
        {"extra_args": {"failfast_max_len": 3}},
        {"stop_token_ids": [stop]},
        {"extra_args": {"failfast_confidence_threshold": 1.0}},
        {"ignore_eos": True},
        {"logit_bias": dict.fromkeys(range(300, 310), 30.0)},
        {"presence_penalty": 2.0},
        {"logprobs": 2},
    ]
    params = [SamplingParams(temperature=0.0, max_tokens=70, **keys) for keys in asked]
    with v1_engine() as llm:
        eos = llm.get_tokenizer().eos_token_id
        expected = generate(llm, prompts, params)
    with v2_engine() as llm, watch(llm) as record:
        for _ in range(2):  # the second time in slots that others have left
            assert generate(llm, prompts, params) == expected
            prompts, params, expected = prompts[::-1], params[::-1], expected[::-1]

    def drafts(i):
        return [p for p in record.proposals if p.known[: len(prompts[i])] == prompts[i]]

    assert drafts(0) == []
    assert max(len(p.draft) for p in drafts(1)) == 3
    assert expected[2][-1] == stop
    assert {p.known[-1] for p in drafts(2)}.isdisjoint({stop})
    assert {p.num_passes for p in drafts(3)} == {1}
    assert any(eos in p.draft[:-1] for p in drafts(4))
    assert all(eos not in p.draft[:-1] for i in (1, 2, 3, 5, 6, 7) for p in drafts(i))
    assert all(drafts(i) for i in (5, 6, 7))


def test_rows_in_mixed_batches(few_plain):
    """Drafts for a few requests, others in each step: catches a step of one kind that loses

    what a request of the other needs.
    """
    from vllm import SamplingParams

    prompts = few_plain[0][0 : 2 * len(MIXED) : 2]
    base = {"temperature": 0.0, "max_tokens": 30}
    params = [SamplingParams(**{**base, **more}) for more in MIXED]
    reasoning = {"reasoning_config": {"reasoning_start_str": "Here", "reasoning_end_str": "The"}}
    with v1_engine(**reasoning) as llm:
        (unlimited,) = generate(llm, prompts[1:2], params[0])
        expected = generate(llm, prompts, params)
    with v2_engine(**reasoning) as llm, watch(llm) as record:
        drafter, steps = proposer(llm).drafter, itertools.count()
        propose = drafter.propose

        def sparing_propose(step):
            drafts = (np.arange(len(step.req_ids)) + next(steps)) % 4 == 0
            lens = np.where(drafts, step.max_draft_lens, 0)
            return propose(dataclasses.replace(step, max_draft_lens=lens))

        drafter.propose = sparing_propose
        answers = generate(llm, prompts, params)
    assert answers == expected
    assert expected[1] != unlimited
    assert any(0 in lens and any(lens) for lens in record.draft_lens)


def test_the_demo_shows_rounds():
    """Catches a demo that looks for the V1 runner's drafter: on a GPU it would show none."""
    from tqdm import tqdm

    from failfast_vllm.tools import demo

    config = {"method": "failfast"}
    with v2_engine(max_num_seqs=1) as llm, tqdm(disable=True) as bar:
        run = demo._answer_all(llm, config, shipped_prompts()[:1], 24, bar)
    (served,) = run.served
    assert [token for r in served.rounds for token in r.accepted + r.bonus] == served.token_ids
    assert len(served.rounds) == len(served.step_ms)
    assert any(r.accepted for r in served.rounds)
    assert run.sums["accepted"] >= run.sums["longest"] > 0


def test_batch_invariant_engines_start():
    """Catches an attention backend that lets vLLM refuse, though no answer depends on a draft.

    In a process of its own: vLLM replaces operators of torch, and never puts them back.
    """
    process = multiprocessing.get_context("spawn").Process(target=start_batch_invariant)
    process.start()
    process.join()
    assert process.exitcode == 0


def test_a_step_without_drafts_reports_nothing():
    """Catches lists that the scheduler goes through for nothing, and a step that is asked twice."""
    from failfast_vllm.integration.session import Session
    from failfast_vllm.integration.v2 import FailFastSpeculator
    from failfast_vllm.observe.counters import DraftStats

    resting = types.SimpleNamespace(step_began=lambda *_: False, steps_to_look=1, ahead=None)
    speculator = object.__new__(FailFastSpeculator)
    drafter = types.SimpleNamespace(planner=resting)
    speculator.session = Session(drafter, DraftStats(), frozenset())
    speculator.postponed = types.SimpleNamespace(req_ids=["a"], num_tokens=1)
    assert speculator.take_drafts() is None
    assert speculator.session.stats.num_steps == 1
    assert speculator.take_drafts() is None
    assert speculator.session.stats.num_steps == 1


@pytest.mark.parametrize(("steps_to_look", "reads"), [(1, True), (2, False)])
def test_the_outcome_is_read_while_the_target_runs(monkeypatch, steps_to_look, reads):
    """Catches launches that the GPU waits for, and those of a rest, in which nobody will ask."""
    from failfast_vllm.integration import v2
    from failfast_vllm.integration.session import Session
    from failfast_vllm.observe.counters import DraftStats

    begun = []
    monkeypatch.setattr(v2.StepView, "start_reading", lambda view: begun.append(view))
    planner = types.SimpleNamespace(steps_to_look=steps_to_look, fewest_at_rest=0.0)
    speculator = object.__new__(v2.FailFastSpeculator)
    drafter = types.SimpleNamespace(planner=planner)
    speculator.session = Session(drafter, DraftStats(), frozenset())
    speculator.draft_tokens, speculator.num_speculative_steps = torch.zeros(4, 6), 6
    speculator.req_states = None
    batch = types.SimpleNamespace(
        num_reqs=2, num_tokens=2, req_ids=["a", "b"], num_draft_tokens_per_req=None
    )
    speculator.propose(batch, *[None] * 4, torch.ones(2), *[None] * 5)
    assert begun == [speculator.postponed] * reads


@pytest.mark.parametrize(("is_profile", "num_passes"), [(True, 1), (False, 0)])
def test_dummy_runs_take_a_pass_only_to_profile(monkeypatch, is_profile, num_passes):
    """Catches a pass over the whole drafter in each step of a data-parallel rank without work."""
    from failfast_vllm.integration import v2 as speculator

    passes = []
    monkeypatch.setattr(speculator, "profile_pass", lambda *args: passes.append(args))
    idle = object.__new__(speculator.FailFastSpeculator)
    idle.draft_tokens, idle.device = torch.full((4, 6), -1), torch.device("cpu")
    idle.model = idle.vllm_config = None
    batch = types.SimpleNamespace(num_reqs=2, num_tokens=2)
    drafts = idle.propose(batch, *[None] * 10, dummy_run=True, is_profile=is_profile)
    assert drafts.tolist() == [[0] * 6] * 2
    assert len(passes) == num_passes


def test_the_profile_copies_no_more_logits_than_vllm_does(monkeypatch):
    """Catches gigabytes set aside for copies that vLLM makes in parts."""
    from vllm.v1.worker.gpu.spec_decode import rejection_sampler

    from failfast_vllm.drafters import hosted

    class Model:
        def __call__(self, input_ids, positions):
            return torch.zeros(input_ids.numel(), 4, dtype=torch.bfloat16)

        def compute_logits(self, hidden_states):
            return hidden_states

    copied = []
    conversions = (torch.ops.aten.to.dtype, torch.ops.aten._to_copy.default)

    class Copies(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func in conversions and torch.float32 in (*args, *(kwargs or {}).values()):
                copied.append(len(args[0]))
            return func(*args, **(kwargs or {}))

    monkeypatch.setattr(rejection_sampler, "get_max_chunk_logits", lambda vocab_size: 7)
    for name in ("drafter_group", "draft_context"):
        monkeypatch.setattr(hosted, name, lambda *args: contextlib.nullcontext())
    monkeypatch.setattr(hosted, "max_positions", lambda config: 64)
    config = types.SimpleNamespace(
        additional_config={"failfast": {"draft_budget": 12}},
        scheduler_config=types.SimpleNamespace(max_num_seqs=3),
        model_config=types.SimpleNamespace(get_vocab_size=lambda: 4),
    )
    for config.use_v2_model_runner, expected in ((True, [7]), (False, [15] * 3)):
        copied.clear()
        with Copies():
            hosted.profile_pass(Model(), config, 40, torch.device("cpu"))
        assert copied == expected


def test_embedded_positions_are_masked():
    """Catches the ids 0 that vLLM has for them; whole and mixed prompts, resumed requests."""
    from vllm import SamplingParams

    with v1_engine(**EMBEDS) as llm:
        prompts = [p for p in mixed_prompts(llm.get_tokenizer(), 40) if 8 < len(p) < 300]
        requests, params = as_requests(prompts), greedy_params(prompts, ANSWER_LEN)
        expected = answers(llm, requests, params)
    tight = {"num_gpu_blocks_override": 18, "block_size": 64, "max_model_len": 512}
    with v2_engine(**EMBEDS, **tight) as llm:
        assert_ids_stay_with_their_request(
            llm, SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)
        )
        preempted = count_preemptions(llm)
        with watch(llm) as record, checked_views(llm) as hidden:
            assert answers(llm, requests, params) == expected
        record.assert_not_vacuous()
        assert sum(n > 0 for n in hidden) > 50
        assert preempted
        generate(llm, [[5, 6]], SamplingParams(max_tokens=1))  # the next step is told who has ended
        assert not proposer(llm).embedded, "what has ended is forgotten"


def test_nothing_is_verified_that_nobody_drafted():
    """Catches 60 placeholders beside the last token of a prompt that is in the prefix cache."""
    few = {"block_size": 64, "max_model_len": 512, "num_gpu_blocks_override": 18}
    with v1_engine() as llm:
        prompts = whole_pages_and_a_token(llm.get_tokenizer(), 64, 10)
        params = greedy_params(prompts, ANSWER_LEN)
        expected = generate(llm, prompts, params)
    with v2_engine(enable_prefix_caching=True, **few) as llm:
        preempted = count_preemptions(llm)
        with only_drafts_are_verified(llm) as record:
            assert generate(llm, prompts, params) == expected
            for prompt, param, answer in zip(prompts[:3], params, expected, strict=False):
                for _ in range(2):
                    assert generate(llm, [prompt], [param]) == [answer]
        record.assert_not_vacuous()
        assert preempted


def test_stores_of_kv_connectors_are_shared(tmp_path):
    """Catches an engine that ends because nobody has stored its drafter's layers."""
    with v1_engine() as llm:
        prompts = prompts_of_pages(llm.get_tokenizer(), 8)
        params = greedy_params(prompts, ANSWER_LEN)
        expected = generate(llm, prompts, params)
    dense = IndependentDrafter(MODELS_DIR / "drafter", num_draftable_tokens=1)
    asked = {"method": "failfast", "load_aware": True}
    assert_stores_are_shared(
        tmp_path, dense, asked, prompts, params, expected, v1_engine, v2_engine
    )
