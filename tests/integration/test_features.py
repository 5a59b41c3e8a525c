"""What requests may ask, with failfast and without: docs/features.md, row by row.

Each feature is asked for in a batch that also has plain greedy requests. They must answer as if
they were alone, and so must the requests with the feature.
"""

import itertools
import json
import math
from types import SimpleNamespace
from typing import NamedTuple

import hypothesis.strategies as st
import pytest
from hypothesis import example, given, settings
from vllm import SamplingParams
from vllm.exceptions import VLLMValidationError
from vllm.sampling_params import BeamSearchParams
from vllm.v1.sample.logits_processor import MinPLogitsProcessor

from engine import chat_ids, core, generate, proposer, shipped_prompts, watch
from failfast_vllm.config import MODELS_DIR
from failfast_vllm.integration import requests as request
from features import (
    CASES,
    FALLS_BACK,
    GREEDY,
    NAMES,
    SAME_ANSWER,
    SCHEMA,
    SEEDED,
    are_close,
    asked_for,
    constrained,
    features_engine,
)
from independent import IndependentDrafter
from state_check import TOLERANCE, largest_error

NUM_QUESTIONS = 6


class Batch(NamedTuple):
    """A batch in which every second request is a plain greedy one."""

    outputs: list  # RequestOutputs with the feature
    neighbours: list  # those without

    @property
    def answers(self):
        return [[list(c.token_ids) for c in output.outputs] for output in self.outputs]

    @property
    def neighbours_answers(self):
        return [list(output.outputs[0].token_ids) for output in self.neighbours]


def ask(llm, prompts, params):
    """Put each prompt twice, with its own parameters and with plain greedy ones."""
    greedy = SamplingParams(**GREEDY)
    outputs = llm.generate(
        [{"prompt_token_ids": ids} for ids in prompts for _ in range(2)],
        [p for param in params for p in (SamplingParams(**param), greedy)],
        use_tqdm=False,
    )
    return Batch(outputs[::2], outputs[1::2])


class Plain(NamedTuple):
    """What an engine without speculation answers."""

    prompts: list
    greedy: list
    params: dict
    batches: dict
    beams: list
    foreign: list  # answers to a request that failfast would refuse


def beams(llm, prompts):
    requests = [{"prompt_token_ids": ids} for ids in prompts]
    found = llm.beam_search(requests, BeamSearchParams(beam_width=3, max_tokens=10))
    return [[sequence.tokens for sequence in output.sequences] for output in found]


@pytest.fixture(scope="module")
def plain():
    with features_engine() as llm:
        tokenizer = llm.get_tokenizer()
        prompts = [chat_ids(tokenizer, prompt) for prompt in shipped_prompts()[:NUM_QUESTIONS]]
        greedy = ask(llm, prompts, [GREEDY] * len(prompts)).neighbours_answers
        assert all(answer[-1] == tokenizer.eos_token_id for answer in greedy)
        params = {
            name: [make(tokenizer, answer) for answer in greedy] for name, make in CASES.items()
        }
        batches = {name: ask(llm, prompts, params[name]) for name in CASES}
        refused = {**GREEDY, "extra_args": {"failfast_max_len": "many"}, "logprob_token_ids": [5]}
        foreign = generate(llm, prompts[:1], SamplingParams(**refused))
        return Plain(prompts, greedy, params, batches, beams(llm, prompts[:2]), foreign)


@pytest.fixture(scope="module")
def drafting(plain):
    """The same engine with failfast; after `plain`, so that one engine runs at a time."""
    with features_engine("failfast") as llm:
        yield llm


def rounds_of(record, outputs):
    """The rounds of some requests; the engine appends to a request's id."""
    ids = {output.request_id for output in outputs}
    return [r for r in record.rounds if r.req_id.split("-")[0].split("_")[-1] in ids]


def assert_undisturbed(batch, record, plain):
    assert batch.neighbours_answers == plain.greedy
    assert any(len(r.drafted) > 20 for r in rounds_of(record, batch.neighbours))


@pytest.mark.parametrize("name", CASES)
def test_answers_equal_those_without_speculation(plain, drafting, name):
    """Catches a feature that the verification of drafts applies to the wrong rows, or to none."""
    with watch(drafting) as record:
        batch = ask(drafting, plain.prompts, plain.params[name])
    assert batch.answers == plain.batches[name].answers
    assert_undisturbed(batch, record, plain)
    drafted = sum(len(r.drafted) for r in rounds_of(record, batch.outputs))
    accepted = sum(len(r.emitted) - 1 for r in rounds_of(record, batch.outputs) if r.drafted)
    if name in FALLS_BACK:
        assert drafted == 0
    else:
        assert drafted > 0
        assert accepted > 0
    is_plain = [
        answer == [greedy] for answer, greedy in zip(batch.answers, plain.greedy, strict=True)
    ]
    assert all(is_plain) if name in SAME_ANSWER else not all(is_plain), "the feature does nothing"


@pytest.mark.parametrize("name", ["logprobs", "all at once"])
def test_logprobs(plain, drafting, name):
    """Catches logprobs of another row of the draft (vLLM issue 34497)."""
    batch = ask(drafting, plain.prompts, plain.params[name])
    for with_drafts, without in zip(batch.outputs, plain.batches[name].outputs, strict=True):
        assert len(without.outputs[0].logprobs) > 10
        assert are_close(with_drafts.outputs[0].logprobs, without.outputs[0].logprobs)


def test_prompt_logprobs(plain, drafting):
    batch = ask(drafting, plain.prompts, plain.params["prompt_logprobs"])
    for with_drafts, without in zip(
        batch.outputs, plain.batches["prompt_logprobs"].outputs, strict=True
    ):
        assert len(without.prompt_logprobs) > 10
        assert are_close(with_drafts.prompt_logprobs, without.prompt_logprobs)


@pytest.mark.parametrize("n", [1, 3])
def test_seeds(plain, drafting, n):
    """Draws repeat from run to run; vLLM does not promise those of an engine without drafts."""
    params = [{**SEEDED, "n": n, "seed": i} for i in range(NUM_QUESTIONS)]
    with watch(drafting) as record:
        first, second = (ask(drafting, plain.prompts, params) for _ in range(2))
    assert first.answers == second.answers
    assert_undisturbed(first, record, plain)
    assert sum(len(r.drafted) for r in rounds_of(record, first.outputs)) > 0
    drawn = [tuple(answer) for answers in first.answers for answer in answers]
    assert len(set(drawn)) == len(drawn) == n * NUM_QUESTIONS


def test_beam_search(plain, drafting):
    """vLLM asks for one token at a time, so nothing is drafted."""
    assert beams(drafting, plain.prompts[:2]) == plain.beams


def test_one_token(plain, drafting):
    with watch(drafting) as record:
        batch = ask(drafting, plain.prompts, [{**GREEDY, "max_tokens": 1}] * NUM_QUESTIONS)
    assert batch.answers == [[answer[:1]] for answer in plain.greedy]
    assert_undisturbed(batch, record, plain)
    assert sum(len(r.drafted) for r in rounds_of(record, batch.outputs)) == 0


def test_200_constrained_answers_are_valid(plain, drafting):
    """Catches a grammar that drafts lead out of step: an invalid answer, or one that never ends."""
    greedy = constrained(json=SCHEMA)
    sampled = [{**greedy, "temperature": 1.5, "seed": i} for i in range(100)]
    prompts = [prompt for prompt, _ in zip(itertools.cycle(plain.prompts), range(200))]
    with watch(drafting) as record:
        outputs = drafting.generate(
            [{"prompt_token_ids": ids} for ids in prompts],
            [SamplingParams(**p) for p in (*[greedy] * 100, *sampled)],
            use_tqdm=False,
        )
    answers = [output.outputs[0] for output in outputs]
    assert {answer.finish_reason for answer in answers} == {"stop"}
    for answer in answers:
        value = json.loads(answer.text)
        assert list(value) == ["name", "count", "fresh"]
        assert value["name"] in NAMES
        assert type(value["count"]) is int
        assert 0 <= value["count"] <= 99
        assert type(value["fresh"]) is bool
    assert len({answer.text for answer in answers}) > 20
    assert record.num_accepted > 200


def test_drafts_are_as_long_as_asked_for(plain, drafting):
    """Each request's own limit, and a threshold that no draft passes: one increment."""
    limits = [0, 1, 3, 10, 25, 60]
    params = [{**GREEDY, **asked_for(max_len=limit)} for limit in limits]
    with watch(drafting) as record:
        batch = ask(drafting, plain.prompts, params)
    assert batch.answers == [[answer] for answer in plain.greedy]
    assert_undisturbed(batch, record, plain)
    for limit, output in zip(limits, batch.outputs, strict=True):
        longest = max(len(r.drafted) for r in rounds_of(record, [output]))
        assert min(limit, 10) <= longest <= limit

    params = [{**GREEDY, **asked_for(confidence_threshold=1.0)}] * NUM_QUESTIONS
    with watch(drafting) as record:
        batch = ask(drafting, plain.prompts, params)
    assert_undisturbed(batch, record, plain)
    assert {r.num_passes for r in rounds_of(record, batch.outputs) if r.drafted} == {1}
    assert max(len(r.drafted) for r in rounds_of(record, batch.outputs)) == 10


def test_blocks_of_undrafted_requests_are_committed(plain, drafting):
    """Catches a request without drafts that leaves holes in pages which others may hit."""
    params = [{**GREEDY, "ignore_eos": True, **asked_for(max_len=0)}] * NUM_QUESTIONS
    dense = IndependentDrafter(MODELS_DIR / "drafter", num_draftable_tokens=1)
    drafter = proposer(drafting).drafter
    propose, lens = drafter.propose, []

    def watching_propose(step):
        lens.append((step.max_draft_lens == 0) & (step.final_lens > step.committed_lens))
        return propose(step)

    drafter.propose = watching_propose
    try:
        error, _ = largest_error(drafting, dense, lambda: ask(drafting, plain.prompts, params))
    finally:
        drafter.propose = propose
    assert sum(int(some.sum()) for some in lens) >= 3 * NUM_QUESTIONS
    assert error < TOLERANCE


@pytest.mark.parametrize(
    ("extra_args", "message"),
    [
        ({"failfast_max_len": 61}, "'failfast_max_len' must be an integer from 0 to 60"),
        ({"failfast_max_len": -1}, "'failfast_max_len' must be an integer from 0 to 60"),
        ({"failfast_max_len": 3.0}, "got 3.0."),
        ({"failfast_max_len": "3"}, "got '3'."),
        ({"failfast_max_len": True}, "got True."),
        ({"failfast_max_len": None}, "got None."),
        (
            {"failfast_confidence_threshold": 0.4},
            "'failfast_confidence_threshold' must be a probability from 0.45 to 1.0 on this "
            "server; got 0.4.",
        ),
        ({"failfast_confidence_threshold": 1.1}, "got 1.1."),
        ({"failfast_confidence_threshold": float("nan")}, "got nan."),
        ({"failfast_confidence_threshold": "0.5"}, "got '0.5'."),
        ({"failfast_confidence_threshold": [0.5]}, "got [0.5]."),
        (
            {"failfast_max_length": 3},
            "failfast: unknown key 'failfast_max_length' in a request; "
            "use one of failfast_max_len, failfast_confidence_threshold.",
        ),
        ({"failfast": 3}, "unknown key 'failfast'"),
        ({"failfast_max_len": "3" * 10_000}, "... (10002 characters)."),
    ],
)
def test_wrong_keys_are_refused(plain, drafting, extra_args, message):
    """Catches a value that only the engine would find wrong: it would die of it."""
    with pytest.raises(VLLMValidationError, match=r"\Afailfast: ") as caught:
        drafting.generate(
            {"prompt_token_ids": plain.prompts[0]},
            SamplingParams(extra_args=extra_args),
            use_tqdm=False,
        )
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert core(drafting).scheduler.get_num_unfinished_requests() == 0


HOSTILE = ("x", "3", math.nan, math.inf, -5, 2**62, None, [1], [0.5], {}, True, -0.1, 1e300)


def test_unchecked_values_do_not_end_the_engine(plain, drafting, monkeypatch):
    """A front end that checks nothing, as vLLM's Rust one: values of any kind reach the worker."""
    monkeypatch.setattr(request, "check", lambda *args: None)
    params = [
        {**GREEDY, "extra_args": {key: HOSTILE[i % len(HOSTILE)]}}
        for i, key in enumerate(request.KEYS * len(HOSTILE))
    ]
    prompts = (plain.prompts * len(params))[: len(params)]
    expected = ([[answer] for answer in plain.greedy] * len(params))[: len(params)]
    assert ask(drafting, prompts, params).answers == expected
    assert core(drafting).scheduler.get_num_unfinished_requests() == 0


@given(
    max_len=st.none() | st.booleans() | st.integers(-(2**63), 2**63) | st.floats() | st.text(),
    threshold=st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**63)
    | st.floats()
    | st.lists(st.floats()),
)
@example(max_len=float("nan"), threshold=float("nan"))
@settings(deadline=None, derandomize=True, database=None)
def test_whatever_a_request_asks_stays_in_range(max_len, threshold):
    """Catches a limit that is no number: a draft would end after any increment."""
    extra = {request.MAX_LEN: max_len, request.CONFIDENCE_THRESHOLD: threshold}
    found = request.asked([SamplingParams(extra_args=extra)], [[1]], frozenset(), 60)
    assert 0 <= found.max_draft_lens[0] <= 60
    assert 0.0 <= found.min_confidences[0] <= 1.0


def test_logprob_token_ids_are_refused(plain, drafting):
    """Beside a request with logprobs they end vLLM's engine, alone they come back empty."""
    with pytest.raises(VLLMValidationError, match="failfast: 'logprob_token_ids' does not go with"):
        drafting.generate(
            {"prompt_token_ids": plain.prompts[0]},
            SamplingParams(logprob_token_ids=[5, 6]),
            use_tqdm=False,
        )


def test_keys_of_others_pass(plain, drafting):
    params = [{**GREEDY, "extra_args": {"somebody_elses": "failfast"}}] * NUM_QUESTIONS
    assert ask(drafting, plain.prompts, params).answers == [[answer] for answer in plain.greedy]


def test_custom_logits_processors_are_refused():
    """vLLM's own refusal (V1), as beside its ngram drafts: nobody knows which rows they want."""
    with (
        pytest.raises(ValueError, match="Custom logits processors are not supported"),
        features_engine("failfast", logits_processors=[MinPLogitsProcessor]),
    ):
        pass


def test_other_engines_refuse_as_before():
    """Catches a hook that lifts vLLM's refusals, or reads our keys, where failfast is not used."""
    ngram = SimpleNamespace(method="ngram", draft_model_config=None)
    with pytest.raises(VLLMValidationError, match="min_p and logit_bias"):
        SamplingParams(min_p=0.1)._validate_spec_decode(ngram)
    SamplingParams(min_p=0.1)._validate_spec_decode(None)


def test_any_key_passes_without_failfast(plain):
    """Catches hooks that are in place for all engines of a process."""
    assert plain.foreign == plain.greedy[:1]


def test_limits_are_read_per_request():
    """The reading of checked parameters, on its own: any runner shares it."""
    plain_params = SamplingParams()
    strict = SamplingParams(stop_token_ids=[9], **asked_for(max_len=3, confidence_threshold=0.5))
    endless = SamplingParams(ignore_eos=True)
    found = request.asked(
        [plain_params, strict, endless, strict], [[2, 4], [9], [2], [5]], frozenset([2]), 7
    )
    assert found.max_draft_lens.tolist() == [7, 3, 7, 3]
    assert found.min_confidences.tolist() == [0.0, 0.5, 0.0, 0.5]
    assert found.stops_at_eos.tolist() == [True, True, False, True]
    assert found.ended.tolist() == [True, True, False, False]
    assert request.asked([strict], [[5]], frozenset([2]), 2).max_draft_lens.tolist() == [2]
