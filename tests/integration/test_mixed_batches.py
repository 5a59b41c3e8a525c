"""Every row of docs/features.md beside other rows, whichever steps have drafts.

A batch holds one row twice (two questions), three rows that change from row to row, and plain
greedy requests. The modes decide who may draft in which step, so that a step without drafts, a step
in which only some requests have one, and steps of both kinds in turn meet every row.
"""

import contextlib
import dataclasses
import itertools
import json
from typing import NamedTuple

import numpy as np
import pytest
import torch
from vllm import SamplingParams
from vllm.sampling_params import RepetitionDetectionParams

from copying_cases import Copying
from engine import chat_ids, core, proposer, shipped_prompts, watch
from failfast_vllm.drafting.copying import OwnText
from failfast_vllm.integration.startup import NoDraftModel
from features import CASES, GREEDY, NAMES, SCHEMA, are_close, constrained, features_engine
from turns import Turns

REASONING = {"reasoning_start_str": "Here", "reasoning_end_str": "The answer"}
QUESTIONS = (2, 11)  # one that thinks until its budget is spent, and one that never begins to
DRAWN = {"temperature": 1.5, "max_tokens": 60}  # no seed: each run is another
ALLOWED = range(4, 700)


def budget(num_tokens, **more):
    return {**GREEDY, "thinking_token_budget": num_tokens, **more}


# rows that need no other check than the answer of an engine without speculation
EXACT = {
    **CASES,
    "greedy": lambda tokenizer, answer: GREEDY,
    "no thinking": lambda tokenizer, answer: budget(0),
    "thinking budget": lambda tokenizer, answer: budget(9),
    "thinking budget and penalties": lambda tokenizer, answer: budget(
        9, presence_penalty=1.0, bad_words=["answer"], logprobs=2
    ),
    # draws that leave one token to draw: through the sampler of sampled requests
    "top_k 1": lambda tokenizer, answer: {**GREEDY, "temperature": 1.0, "top_k": 1},
    "top_p 0": lambda tokenizer, answer: {**GREEDY, "temperature": 1.0, "top_p": 1e-9},
    "min_p 1": lambda tokenizer, answer: {**GREEDY, "temperature": 1.0, "min_p": 1.0},
    "n": lambda tokenizer, answer: {**GREEDY, "temperature": 1.0, "top_k": 1, "n": 3},
    "one token": lambda tokenizer, answer: {**GREEDY, "max_tokens": 1},
    "stop string kept": lambda tokenizer, answer: {
        **GREEDY,
        "stop": ["answer", "which"],
        "include_stop_str_in_output": True,
    },
    "repetition detection": lambda tokenizer, answer: {
        **GREEDY,
        "logit_bias": {300: 30.0},
        "repetition_detection": RepetitionDetectionParams(
            max_pattern_size=3, min_pattern_size=1, min_count=7
        ),
    },
    "grammar and min_tokens": lambda tokenizer, answer: {
        **constrained(regex="(No|Yes)[.]*"),
        "min_tokens": 20,
    },
    "grammar and penalties": lambda tokenizer, answer: {
        **constrained(json=SCHEMA),
        "repetition_penalty": 1.5,
        "logprobs": 3,
    },
}


# sampled rows: their parameters, and what holds for every answer
SAMPLED = {
    "drawn": (DRAWN, lambda output: len(output.token_ids) > 0),
    "drawn, seeded": ({**DRAWN, "seed": 3}, lambda output: len(output.token_ids) > 0),
    "drawn JSON": (
        {**DRAWN, **constrained(json=SCHEMA), "temperature": 1.5},
        lambda output: output.finish_reason == "stop" and json.loads(output.text)["name"] in NAMES,
    ),
    "drawn, allowed_token_ids": (
        {**DRAWN, "allowed_token_ids": list(ALLOWED)},
        lambda output: set(output.token_ids) <= set(ALLOWED),
    ),
    "drawn, top_k and top_p": (
        {**DRAWN, "top_k": 20, "top_p": 0.8},
        lambda output: len(output.token_ids) > 0,
    ),
    "drawn, min_p": ({**DRAWN, "min_p": 0.2}, lambda output: len(output.token_ids) > 0),
    "drawn, stop": (
        {**DRAWN, "stop": ["e"]},
        lambda output: "e" not in output.text,
    ),
    "drawn, min_tokens": (
        {**DRAWN, "min_tokens": 50},
        lambda output: len(output.token_ids) >= 50,
    ),
    "drawn, logprobs": (
        {**DRAWN, "logprobs": 2},
        lambda output: (
            len(output.logprobs) == len(output.token_ids)
            and all(i in found for i, found in zip(output.token_ids, output.logprobs, strict=True))
        ),
    ),
    "drawn, thinking budget": (
        {**DRAWN, "thinking_token_budget": 5},
        lambda output: len(output.token_ids) > 0,
    ),
}
ROWS = (*EXACT, *SAMPLED)


class Asked(NamedTuple):
    """One request and, of an exact row, what an engine without speculation answers."""

    row: str
    prompt: list
    params: dict
    expected: object = None  # RequestOutput


def generate(llm, asked, **more):
    return llm.generate(
        [{"prompt_token_ids": a.prompt} for a in asked],
        [SamplingParams(**a.params) for a in asked],
        use_tqdm=False,
        **more,
    )


def mixed_engine(speculative_config=None):
    return features_engine(
        speculative_config,
        reasoning_config=REASONING,
        scheduling_policy="priority",
        block_size=32,
        max_model_len=512,
        num_gpu_blocks_override=44,  # few for 16 answers: requests are preempted
    )


@pytest.fixture(scope="module")
def table():
    """{row: its requests, one per question}, answered by an engine without speculation."""
    with mixed_engine() as llm:
        tokenizer = llm.get_tokenizer()
        questions = shipped_prompts()
        prompts = [chat_ids(tokenizer, questions[i]) for i in QUESTIONS]
        greedy = [
            list(output.outputs[0].token_ids)
            for output in generate(llm, [Asked("greedy", p, GREEDY) for p in prompts])
        ]
        asked = [
            Asked(row, prompt, make(tokenizer, answer))
            for row, make in EXACT.items()
            for prompt, answer in zip(prompts, greedy, strict=True)
        ]
        # apart, since vLLM may leave the budget of a request that has ended to one without
        budgeted = [a for a in asked if "thinking_token_budget" in a.params]
        others = [a for a in asked if "thinking_token_budget" not in a.params]
        asked = [
            a._replace(expected=output)
            for some in (budgeted, others)
            for a, output in zip(some, generate(llm, some), strict=True)
        ]
    asked += [Asked(row, p, params) for row, (params, _) in SAMPLED.items() for p in prompts]
    return {row: list(group) for row, group in itertools.groupby(asked, lambda a: a.row)}


@pytest.fixture(scope="module", params=["failfast"])
def drafting(table, request):
    alone = {"method": "failfast", "model": None, "load_aware": True}
    with mixed_engine(alone if request.param == "copies alone" else "failfast") as llm:
        yield llm


def every_request(req_ids, step):
    return np.ones(len(req_ids), dtype=bool)


def no_request(req_ids, step):
    return np.zeros(len(req_ids), dtype=bool)


def some_requests(req_ids, step):
    # vLLM appends random letters to a request's number
    return np.array([int(req_id.split("-")[0]) % 2 == 0 for req_id in req_ids])


def in_turn(req_ids, step):
    return np.full(len(req_ids), step % 3 == 0)


MODES = {
    "drafts in every step": every_request,
    "drafts in no step": no_request,
    "drafts for some": some_requests,
    "drafts in some steps": in_turn,
    "a planner that rests": every_request,
    "copies and drafts": every_request,
}


@contextlib.contextmanager
def drafting_for(llm, mode):
    """Let the requests draft that `mode` lets; yields what the drafter then did."""
    drafter, steps = proposer(llm).drafter, itertools.count()
    with watch(llm) as record:
        propose = drafter.propose

        def masking_propose(step):
            allowed = MODES[mode](step.req_ids, next(steps))
            lens = np.where(allowed, step.max_draft_lens, 0)
            return propose(dataclasses.replace(step, max_draft_lens=lens))

        drafter.propose = masking_propose
        planner = drafter.planner
        if mode == "a planner that rests":
            drafter.planner = Turns(10)
            proposer(llm).stats.drafts_only = True  # else each step is asked for its rounds
        copies, alone = drafter.copies, isinstance(drafter.model, NoDraftModel)
        if alone or mode == "copies and drafts":
            drafter.planner = Copying(10, drafts=not alone)
            drafter.copies = OwnText(2000, torch.device("cpu"))
        try:
            yield record
            if mode == "a planner that rests":
                assert drafter.planner.num_rested > 5
        finally:
            drafter.planner, drafter.copies = planner, copies
            proposer(llm).stats.drafts_only = False


def wrong_rows(asked, outputs):
    """Every wrong row at once: where a mixed batch goes wrong is seen from all of them."""
    wrong = []
    for a, output in zip(asked, outputs, strict=True):
        if a.row in SAMPLED:
            holds = all(map(SAMPLED[a.row][1], output.outputs))
            wrong += [] if holds else [(a.row, output.outputs)]
            continue
        assert len(output.outputs) == len(a.expected.outputs)
        pairs = [(output.prompt_logprobs, a.expected.prompt_logprobs, "prompt_logprobs")]
        for found, expected in zip(output.outputs, a.expected.outputs, strict=True):
            pairs.append((found.logprobs, expected.logprobs, "logprobs"))
            for name in ("token_ids", "text", "finish_reason"):
                if getattr(found, name) != getattr(expected, name):
                    wrong.append((a.row, name, getattr(found, name), getattr(expected, name)))
        wrong += [(a.row, name) for *pair, name in pairs if not are_close(*pair)]
    return wrong


def check_steps(record, mode):
    """The mode did what its name says, else the tests above prove nothing."""
    have_drafts = [any(lens) for lens in record.draft_lens]
    if mode == "drafts in no step":
        assert have_drafts
        assert not any(have_drafts)
    else:
        assert any(have_drafts)
    if mode == "drafts for some":
        assert any(0 in lens and any(lens) for lens in record.draft_lens)
    if mode == "drafts in some steps":
        assert sum(have_drafts) < len(have_drafts) / 2


def rows_and_modes():
    """The two modes in turn; the other half of the pairs is large."""
    modes = "drafts for some", "drafts in some steps"
    for (i, row), (j, mode) in itertools.product(enumerate(ROWS), enumerate(modes)):
        marks = pytest.mark.large if (i + j) % 2 else pytest.mark.slow
        yield pytest.param(row, mode, marks=marks)


@pytest.mark.parametrize(("row", "mode"), rows_and_modes())
def test_row_in_a_mixed_batch(table, drafting, row, mode):
    """Catches a way around vLLM's sampling that another request of the batch depends on."""
    i = ROWS.index(row)
    beside = [ROWS[(i + n) % len(ROWS)] for n in (1, 7, 19)]
    greedy = table["greedy"]
    asked = [
        greedy[0],
        *table[row],
        *(table[name][n % 2] for n, name in enumerate(beside)),
        greedy[1],
    ]
    with drafting_for(drafting, mode) as record:
        assert wrong_rows(asked, generate(drafting, asked)) == []
    check_steps(record, mode)


@pytest.mark.parametrize("recurrent", [False, True])
def test_only_steps_with_drafts_are_prepared_for_verification(
    table, drafting, monkeypatch, recurrent
):
    """Catches a step without drafts that is verified; recurrent targets need all to be."""
    runner, prepared = proposer(drafting).runner, []
    prepare = runner._prepare_inputs

    def watching_prepare(scheduler_output, *args):
        found = prepare(scheduler_output, *args)
        prepared.append((bool(scheduler_output.scheduled_spec_decode_tokens), found[1] is not None))
        return found

    monkeypatch.setattr(runner, "_prepare_inputs", watching_prepare)
    monkeypatch.setattr(type(runner.model_config), "has_inner_state", recurrent)
    with drafting_for(drafting, "drafts in some steps"):
        assert wrong_rows(table["greedy"], generate(drafting, table["greedy"])) == []
    assert set(prepared) == {(True, True), (False, recurrent)}


# the other modes meet each row above, or in test_features.py
HERE = "drafts for some", "a planner that rests", "copies and drafts"
CASES_AT_ONCE = [
    *(("failfast", mode) for mode in HERE),
    ("copies alone", "drafts in every step"),
    *(pytest.param("failfast", m, marks=pytest.mark.large) for m in MODES if m not in HERE),
    pytest.param("copies alone", "drafts for some", marks=pytest.mark.large),
]


@pytest.mark.parametrize(("drafting", "mode"), CASES_AT_ONCE, indirect=["drafting"])
def test_all_rows_at_once(table, drafting, mode):
    """Sixteen at a time, by priority, with too few pages: rows come, go, move and are preempted.

    Without thinking budgets: vLLM forgets, also without speculation, which tokens of the end of
    thinking it has forced upon a request that it preempts, and forces them again.
    """
    asked = [a for question in zip(*table.values(), strict=True) for a in question]
    asked = [a for a in asked if "thinking_token_budget" not in a.params]
    priorities = [i * 31 % 7 for i in range(len(asked))]
    scheduler, preempted = core(drafting).scheduler, []
    preempt = scheduler._preempt_request

    def counting_preempt(request, *args, **more):
        preempted.append(request.request_id)
        return preempt(request, *args, **more)

    scheduler._preempt_request = counting_preempt
    try:
        with drafting_for(drafting, mode) as record:
            outputs = generate(drafting, asked, priority=priorities)
    finally:
        del scheduler._preempt_request
    assert wrong_rows(asked, outputs) == []
    check_steps(record, mode)
    assert preempted
    assert scheduler.kv_cache_manager.usage == 0.0


def test_the_rows_do_something(table):
    """Else a mixed batch proves nothing of them: with the row the answer is another."""
    greedy = [list(a.expected.outputs[0].token_ids) for a in table["greedy"]]
    same = {"logprobs", "prompt_logprobs", "greedy", "top_k 1", "top_p 0", "min_p 1", "n"}
    same |= {"min_tokens to the end", "failfast_max_len", "failfast_confidence_threshold"}
    for row in EXACT:
        answers = [list(a.expected.outputs[0].token_ids) for a in table[row]]
        assert (answers == greedy) == (row in same), row
