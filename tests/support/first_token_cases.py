"""Drafts are made after a step's tokens have gone out, and none for a request that has ended."""

import sys
from itertools import count

import pytest

from engine import chat_ids, core, generate, proposer, shipped_prompts, watch

request_ids = count()


def add(llm, max_tokens, **given):
    """Queue a greedy request; returns its id in the engine."""
    from vllm import SamplingParams

    tokenizer = llm.get_tokenizer()
    number = next(request_ids)
    prompt = {"prompt_token_ids": chat_ids(tokenizer, shipped_prompts()[number % 8])}
    params = SamplingParams(temperature=0.0, max_tokens=max_tokens, **given)
    return llm.llm_engine.add_request(str(number), prompt, params)


def new_tokens(outputs):
    return {o.request_id: o.new_token_ids for each in outputs.values() for o in each.outputs}


def run_to_the_end(llm):
    while llm.llm_engine.has_unfinished_requests():
        llm.llm_engine.step()


def test_tokens_go_out_before_their_drafts(llm):
    """Catches a first token that waits for a pass over its prompt and for the first draft.

    vLLM's engine process puts a step's outputs on their queue between these two calls.
    """
    stats, engine_core = proposer(llm).stats, core(llm)
    request = add(llm, 8)
    before = stats.num_forwards
    outputs, executed = engine_core.step_fn()
    assert len(new_tokens(outputs)[request]) == 1
    assert stats.num_forwards == before
    engine_core.post_step(executed)
    assert stats.num_forwards > before
    scheduled = engine_core.scheduler.requests[request].spec_token_ids
    assert scheduled
    llm.llm_engine.abort_request([request], internal=True)
    run_to_the_end(llm)


@pytest.mark.parametrize(
    "given",
    [
        {"max_tokens": 33},
        {"max_tokens": 200},  # the model ends its answer
        {"max_tokens": 200, "stops": True},
    ],
    ids=["length", "end of sequence", "stop token"],
)
def test_an_ended_request_is_not_drafted_for(llm, given):
    """Catches a draft for a request whose last token has just gone out."""
    from vllm import SamplingParams

    ids = chat_ids(llm.get_tokenizer(), shipped_prompts()[0])
    (whole,) = generate(llm, [ids], SamplingParams(temperature=0.0, max_tokens=200))
    stops = [whole[20]] if given.pop("stops", False) else None
    params = SamplingParams(temperature=0.0, stop_token_ids=stops, **given)
    forwards = []  # of each step
    with watch(llm) as record:
        draft = proposer(llm).drafter.propose

        def drafting(step):
            drafts = draft(step)
            forwards.append(drafts.num_forwards)
            return drafts

        proposer(llm).drafter.propose = drafting
        (answer,) = generate(llm, [ids], params)
    assert answer == whole[: len(answer)]
    assert len(answer) < 200
    assert any(lens[0] for lens in record.draft_lens)
    assert record.draft_lens[-1] == [0]
    assert forwards[-1] == 0  # its blocks are not committed either


def test_steps_whose_drafts_nobody_asks_for(llm):
    """Catches drafts of one step that are handed to another, and ones for those who have left."""

    def answers(meddle):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys.modules[__name__], "request_ids", count())
            leaving, *staying = [add(llm, 60) for _ in range(5)]
            steps, post_step = count(), core(llm).post_step

            def post(model_executed):
                step = next(steps)
                if step == 2:  # between the step's tokens and its drafts
                    core(llm).abort_requests([leaving])
                if step % 3 or not meddle:
                    post_step(model_executed)

            patch.setattr(core(llm), "post_step", post)
            found = {}
            while llm.llm_engine.has_unfinished_requests() and len(found) < len(staying):
                for output in llm.llm_engine.step():
                    if output.finished:
                        found[output.request_id] = list(output.outputs[0].token_ids)
            llm.llm_engine.abort_request([leaving], internal=True)
            run_to_the_end(llm)
        return found

    expected = answers(meddle=False)
    assert len(expected) == 4
    with watch(llm) as record:
        assert answers(meddle=True) == expected
    assert record.num_accepted > 0
