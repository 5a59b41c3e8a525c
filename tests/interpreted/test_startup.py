"""What a GPU worker does between loading and serving, on the V2 runner."""

import gc
import inspect
import json
import weakref

import pytest
import torch

from engine import chat_ids, engine, generate, proposer, shipped_prompts, watch
from gpu_startup import gpu_startup
from runners import few_plain, v2_engine  # noqa: F401 - a fixture

# eager engines skip the warm-up and the graphs: nothing is compiled here, but vLLM is not told so
WARM = {"max_num_seqs": 8, "enforce_eager": False, "compilation_config": {"mode": 0}}


@pytest.mark.parametrize("load_aware", [False, True])
def test_the_warm_up_drafts_only_ids_and_leaves_nothing(load_aware, tmp_path):
    """Catches placeholders that are no ids, and rounds of the warm-up that are learned from."""
    asked = {"method": "failfast", "load_aware": load_aware, "trace": str(tmp_path / "t.jsonl")}
    with gpu_startup() as seen, engine(asked, **WARM) as llm:
        assert len(seen.least_ids) >= 6, "the GPU worker's warm-up did not run"
        assert min(seen.least_ids) >= 0
        adapter = proposer(llm)
        stats, drafter = adapter.stats, adapter.drafter
        assert (stats.num_steps, stats.num_forwards, stats.num_rows) == (0, 0, 0)
        assert stats.take() == []
        assert adapter.session.stats is stats
        assert len(adapter.session.ledger) == 0
        assert not drafter.blocks.bits.any()
        assert seen.watched_with_planner == [load_aware]  # what it times may still compile
        if load_aware:
            assert not drafter.planner.acceptance.trials.any()
    lines = (tmp_path / "t.jsonl").read_text().splitlines()
    assert len(lines) == 1  # the header, once
    assert "target" in json.loads(lines[0])


def test_graphs_of_the_memory_profile_are_gone_before_the_kv_cache_comes():
    with gpu_startup() as seen:
        dead = []

        class Graph:
            """As torch's: holds memory, refers to nothing of ours."""

        def on_profiled(runner):
            replays = runner.speculator.drafter.model.graphs.replays
            assert replays
            replays.update({shape: Graph() for shape in replays})
            graph = weakref.ref(next(iter(replays.values())))
            set_attn = runner.speculator.set_attn

            def watching_set_attn(*args):
                gc.disable()  # vLLM freezes the garbage collector: a cycle would keep them
                set_attn(*args)
                dead.append(graph() is None)
                gc.enable()

            runner.speculator.set_attn = watching_set_attn

        seen.on_profiled = on_profiled
        with engine("failfast", **WARM) as llm:
            assert proposer(llm).drafter.model.graphs.replays
    assert dead == [True]


def test_answers_from_graphs(few_plain):
    """Steps with drafts of any lengths and steps without: one FULL graph each, and the answers."""
    from vllm import SamplingParams

    prompts, params, expected = few_plain
    with gpu_startup() as seen, engine("failfast", **WARM) as llm, watch(llm) as record:
        seen.graphs.clear()
        seen.num_draft_replays = 0
        assert generate(llm, prompts, params) == expected
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


class Watched:
    """A kernel that remembers what Triton would have compiled it for."""

    def __init__(self, kernel, compiled):
        self.kernel, self.compiled = kernel, compiled

    def key(self, args, constants):
        dynamic = self.kernel.kwargs.get("do_not_specialize") or ()
        unaligned = self.kernel.kwargs.get("do_not_specialize_on_alignment") or ()
        parts = [self.kernel.fn.__name__]
        for name, arg in zip(inspect.signature(self.kernel.fn).parameters, args, strict=False):
            if isinstance(arg, torch.Tensor):
                parts.append((str(arg.dtype), name in unaligned or arg.data_ptr() % 16 == 0))
            elif isinstance(arg, int) and name not in dynamic:
                parts.append("1" if arg == 1 else arg % 16 == 0)
        return (*parts, *sorted(constants.items()))

    def __getitem__(self, grid):
        def launch(*args, **constants):
            self.compiled.add(self.key(args, constants))
            return self.kernel[grid](*args, **constants)

        return launch


def test_serving_meets_no_kernel_that_start_up_has_not_compiled(monkeypatch):
    """What `--jit-monitor-mode error` would raise at; nothing is compiled here: launches tell.

    Eager, so that only our own warm-up can have launched them; with graphs vLLM's does besides.
    """
    from vllm import SamplingParams

    from failfast_kernels import block_attention, confidence, launch_table

    monkeypatch.setattr(launch_table, "MIN_SPLIT_KEYS", 16)  # short prefixes are split, too
    compiled = set()
    for module in (block_attention, confidence):
        for name, kernel in list(vars(module).items()):
            if type(kernel).__name__ == "InterpretedFunction" and name.endswith("_kernel"):
                monkeypatch.setattr(module, name, Watched(kernel, compiled))
    monkeypatch.setenv("FAILFAST_TRITON", "1")
    method = {"method": "failfast", "num_speculative_tokens": 6, "draft_increment": 3}
    params = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True)
    with v2_engine(method, max_num_seqs=2, max_model_len=256) as llm, watch(llm) as record:
        before = set(compiled)
        prompt = chat_ids(llm.get_tokenizer(), shipped_prompts()[0])
        generate(llm, [prompt[:n] for n in (1, 33, 70)], params)
    assert record.num_drafted > 0
    assert before
    assert compiled <= before
