"""What a GPU worker does between loading and serving, on the V2 runner."""

import gc
import json
import weakref

import pytest

from engine import engine, generate, proposer, watch
from interpreted.gpu_startup import gpu_startup
from interpreted.test_v2 import plain  # noqa: F401 - a fixture

# eager engines skip the warm-up and the graphs: nothing is compiled here, but vLLM is not told so
WARM = {"max_num_seqs": 8, "enforce_eager": False, "compilation_config": {"mode": 0}}


@pytest.mark.parametrize("load_aware", [False, True])
def test_the_warm_up_drafts_only_ids_and_leaves_nothing(load_aware, tmp_path):
    """Catches placeholders that are no ids, and rounds of the warm-up that are learned from."""
    asked = {"method": "failfast", "load_aware": load_aware, "trace": str(tmp_path / "t.jsonl")}
    asked |= {"policy": "adaedl", "reuse_rejected": True}
    with gpu_startup() as seen, engine(asked, **WARM) as llm:
        assert len(seen.least_ids) >= 6, "the GPU worker's warm-up did not run"
        assert min(seen.least_ids) >= 0
        adapter = proposer(llm)
        stats, drafter = adapter.stats, adapter.drafter
        assert (stats.num_steps, stats.num_forwards, stats.num_rows) == (0, 0, 0)
        assert stats.counts.take() == []
        assert not drafter.blocks.bits.any()
        assert not drafter.rejected._rows
        if load_aware:
            assert not drafter.planner.acceptance.trials.any()
    lines = (tmp_path / "t.jsonl").read_text().splitlines()
    assert len(lines) == 1  # the header, once
    assert "target" in json.loads(lines[0])


def test_graphs_of_the_memory_profile_are_gone_before_the_kv_cache_comes():
    with gpu_startup() as seen:
        dead = []

        def on_profiled(runner):
            graphs = weakref.ref(runner.speculator.drafter.model.graphs)
            set_attn = runner.speculator.set_attn

            def watching_set_attn(*args):
                set_attn(*args)
                gc.disable()  # vLLM freezes the garbage collector: a cycle would keep them
                dead.append(graphs() is None)
                gc.enable()

            assert graphs().replays
            runner.speculator.set_attn = watching_set_attn

        seen.on_profiled = on_profiled
        with engine("failfast", **WARM) as llm:
            assert proposer(llm).drafter.model.graphs.replays
    assert dead == [True]


def test_answers_from_graphs(plain):  # noqa: F811
    """Steps with drafts of any lengths and steps without: one FULL graph each, and the answers."""
    from vllm import SamplingParams

    prompts, params, expected = plain
    some = slice(0, 16)
    with gpu_startup() as seen, engine("failfast", **WARM) as llm, watch(llm) as record:
        seen.graphs.clear()
        seen.num_draft_replays = 0
        assert generate(llm, prompts[some], params[some]) == expected[some]
        record.assert_not_vacuous()
        with_drafts = [graph for graph in seen.graphs if graph and graph.max_query_len]
        assert len(with_drafts) > 10
        assert {graph.cg_mode.name for graph in seen.graphs if graph} == {"FULL"}
        stats = proposer(llm).stats
        assert seen.num_draft_replays > stats.num_forwards / 2

        seen.graphs.clear()
        undrafted = SamplingParams(
            temperature=0.0, max_tokens=20, extra_args={"failfast_max_len": 0}
        )
        generate(llm, prompts[:1], undrafted)
        lens = [graph and graph.uniform_token_count for graph in seen.graphs]
        assert lens == [None] + [1] * 19  # the prompt, then a token a step
