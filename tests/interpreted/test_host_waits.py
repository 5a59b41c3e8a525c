"""How often a V2 step waits for the device: once for the verdict, once per increment.

On a CPU nothing waits, so calls that would are counted. What runs inside the draft model is left
out: here its references look at lengths, on a GPU kernels do.
"""

import pytest
import torch

from engine import chat_ids, generate, proposer, shipped_prompts
from failfast_vllm.drafters.cuda_graphs import PassGraphs, make_buckets
from runners import v2_engine
from waits import counted


def test_the_count_sees_what_waits():
    ones = torch.ones(3)
    with counted() as waits:
        ones.cpu()
        ones[ones > 0]
        ones.sum().item()
        ones.to("cpu")
        ones.to("cpu", non_blocking=True)
        ones.to(torch.float64)
    assert waits == ["cpu", "aten.index.Tensor", "item", "to"]


def test_a_step_waits_for_its_verdict_and_each_increment():
    from vllm import SamplingParams

    from failfast_vllm.integration import v2

    steps = []
    with v2_engine() as llm:
        adapter = proposer(llm)
        propose, add_requests, take = adapter.propose, adapter.add_requests, adapter.take_drafts
        draft, hosted = adapter.drafter.propose, adapter.drafter.model
        drafts = []

        def drafting(step):
            drafts.append(draft(step))
            return drafts[-1]

        def counting(function):
            def run(*args, **kwargs):
                with counted() as waits:

                    def unseen(method):
                        def run_unseen(*args, **kwargs):
                            waits.paused = True
                            try:
                                return method(*args, **kwargs)
                            finally:
                                waits.paused = False

                        return run_unseen

                    with pytest.MonkeyPatch.context() as patch:
                        patch.setattr(hosted, "_run", unseen(hosted._run))
                        patch.setattr(hosted, "confidence", unseen(hosted.confidence))
                        patch.setattr(v2, "wait_for_copies", lambda _: waits.append("verdict"))
                        result = function(*args, **kwargs)
                steps.append((function.__name__, list(waits)))
                return result

            return run

        adapter.propose, adapter.add_requests = counting(propose), counting(add_requests)
        adapter.take_drafts = counting(take)
        adapter.drafter.propose = drafting
        prompts = [chat_ids(llm.get_tokenizer(), p) for p in shipped_prompts()[:3]]
        generate(llm, prompts, SamplingParams(temperature=0.0, max_tokens=40))
    assert {tuple(waits) for name, waits in steps if name != "take_drafts"} == {()}
    taken = [waits for name, waits in steps if name == "take_drafts"]
    increments = [int(d.num_passes.max(initial=0)) for d in drafts]
    assert max(increments) >= 2
    assert [len(waits) for waits in taken] == [1 + n for n in increments]
    assert all(waits == ["verdict"] + ["cpu"] * (len(waits) - 1) for waits in taken)


def test_a_replay_does_not_wait():
    from failfast_vllm.drafting.records import DraftBatch

    graphs = PassGraphs(make_buckets(4, 64, [16]), 4, torch.device("cpu"))
    graphs.capture(lambda run: run() or run, lambda batch: torch.zeros(batch.input_ids.numel(), 8))
    batch = DraftBatch(
        input_ids=torch.zeros(20, dtype=torch.int64),
        positions=torch.arange(20),
        query_start_loc=torch.arange(3) * 10,
        committed_lens=torch.zeros(2, dtype=torch.int64),
        slot_mapping=torch.full((20,), -1),
        block_table=torch.zeros(2, 4, dtype=torch.int32),
    )
    with counted() as waits:
        assert graphs.replay(batch).shape == (20, 8)
    assert waits == []
