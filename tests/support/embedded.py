"""Prompts given as embeddings, whole or in parts, beside prompts of token ids."""

import contextlib

import numpy as np
from safetensors.torch import load_file

from engine import core, proposer
from failfast_vllm.config import MODELS_DIR
from failfast_vllm.drafting.records import UNKNOWN
from failfast_vllm.drafting.workspace import Workspace

EMBEDS = {"enable_prompt_embeds": True}


def as_requests(prompts):
    """Of token ids: every third as it is, embedded, and with its middle embedded."""
    (file,) = (MODELS_DIR / "target").glob("*.safetensors")
    weight = load_file(file)["model.embed_tokens.weight"].float()
    requests = []
    for i, ids in enumerate(prompts):
        is_id = np.zeros(len(ids), dtype=bool)
        is_id[: len(ids) // 3], is_id[-len(ids) // 3 :] = True, True
        parts = (
            {"prompt_token_ids": list(ids)},
            {"prompt_embeds": weight[ids]},
            {
                "prompt_embeds": weight[ids],
                "prompt_token_ids": [
                    t if known else 7 for t, known in zip(ids, is_id, strict=True)
                ],
                "prompt_is_token_ids": is_id.tolist(),
            },
        )
        requests.append(parts[i % 3])
    return requests


def answers(llm, requests, params):
    outputs = llm.generate(requests, params, use_tqdm=False)
    return [list(output.outputs[0].token_ids) for output in outputs]


def known_prompt(request):
    """The ids that a scheduler's request has told; UNKNOWN where it has embeddings."""
    if request.prompt_embeds is None:
        return list(request.prompt_token_ids)
    is_id = request.prompt_is_token_ids or [False] * request.num_prompt_tokens
    ids = request.prompt_token_ids or is_id
    return [t if known else UNKNOWN for t, known in zip(ids, is_id, strict=True)]


@contextlib.contextmanager
def checked_views(llm):
    """Check what every step's drafter may read of the prompts; yields the numbers of ids hidden."""
    drafter, scheduler = proposer(llm).drafter, core(llm).scheduler
    propose, canvas, hidden = drafter.propose, Workspace._canvas, []
    add_request, requests = scheduler.add_request, {}  # the scheduler forgets the ended ones

    def remembering_request(request):
        requests[request.request_id] = request
        add_request(request)

    def checking_propose(step):
        for i, req_id in enumerate(step.req_ids):
            prompt = known_prompt(requests[req_id])[: step.known_lens[i]]
            assert step.token_ids[step.slots[i], : len(prompt)].tolist() == prompt
            hidden.append(prompt.count(UNKNOWN))
        return propose(step)

    def checking_canvas(work):
        found, step = canvas(work), work.step
        for i, req_id in enumerate(step.req_ids):
            prompt = known_prompt(requests[req_id])[step.committed_lens[i] : step.known_lens[i]]
            expected = [drafter.geometry.mask_token_id if t == UNKNOWN else t for t in prompt]
            assert found[i, : len(prompt)].tolist() == expected
        return found

    drafter.propose, Workspace._canvas = checking_propose, checking_canvas
    scheduler.add_request = remembering_request
    try:
        yield hidden
    finally:
        drafter.propose, Workspace._canvas = propose, canvas
        del scheduler.add_request


def assert_ids_stay_with_their_request(llm, params):
    """A prompt of ids, then an embedded one in its slot: the drafter reads none of the ids."""
    first = [301 + 7 * i for i in range(29)]
    answers(llm, [{"prompt_token_ids": first}], params)
    _, embedded = as_requests([first[::-1]] * 2)
    with checked_views(llm) as hidden:
        answers(llm, [embedded], params)
    assert max(hidden) == len(first)
