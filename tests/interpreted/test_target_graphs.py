"""Which CUDA graph of the target a step gets, asked of vLLM's own dispatcher."""

import types

import pytest

from failfast_vllm.integration import v2

K, MAX_NUM_REQS = 60, 256
SIZES = [1, 2, 4, *range(8, 513, 8)]
SHAPES = {  # requests, tokens, of each alike, of the longest
    "one token": (1, 1, 1, 1),
    "one draft": (1, 11, 11, 11),
    "eight without drafts": (8, 8, 1, 1),
    "five without drafts, padded": (5, 5, 1, 1),
    "64 ragged drafts": (64, 480, None, 61),
    "a prompt": (3, 100, None, None),
    "more tokens than any graph": (64, 600, None, 61),
}


def planned(mode, lora_cases=(0,)):
    """A runner as it is when its KV cache is laid out; its graphs are taken for captured."""
    from vllm.config.compilation import CUDAGraphMode
    from vllm.v1.worker.gpu.cudagraph_utils import ModelCudaGraphManager

    graphs = object.__new__(ModelCudaGraphManager)
    graphs.vllm_config = types.SimpleNamespace(speculative_config=None)
    graphs.vllm_config.cache_config = types.SimpleNamespace(use_kda_recoverssm=False)
    graphs.compilation_config = types.SimpleNamespace(
        cudagraph_capture_sizes=SIZES, max_cudagraph_capture_size=SIZES[-1]
    )
    graphs.cudagraph_mode = CUDAGraphMode[mode]
    graphs.max_num_reqs, graphs.decode_query_len = MAX_NUM_REQS, K + 1
    graphs.varlen_decode, graphs.ubatch_runner = False, None
    graphs.lora_capture_cases = list(lora_cases)
    graphs._lora_dispatch_map, graphs._max_lora_case = graphs._build_lora_dispatch_map()
    graphs._candidates, graphs._capture_descs, graphs._graphs_captured = {}, {}, True
    graphs._init_candidates()
    return types.SimpleNamespace(
        cudagraph_manager=graphs,
        attn_groups=[],
        kv_cache_config=types.SimpleNamespace(kv_cache_groups=[]),
        speculator=types.SimpleNamespace(draft_attn_layer_names=set()),
        vllm_config=graphs.vllm_config,
        decode_query_len=K + 1,
    )


def dispatched(runner, loras=0):
    """The mode and the padded tokens of each shape."""
    found = {}
    for name, (num_reqs, num_tokens, uniform, longest) in SHAPES.items():
        desc = runner.cudagraph_manager.dispatch(num_reqs, num_tokens, uniform, loras, longest)
        found[name] = (desc.cg_mode.name, desc.num_tokens)
    return found


PIECES = {
    "one token": ("PIECEWISE", 1),
    "one draft": ("PIECEWISE", 16),
    "eight without drafts": ("PIECEWISE", 8),
    "five without drafts, padded": ("PIECEWISE", 8),
    "64 ragged drafts": ("PIECEWISE", 480),
    "a prompt": ("PIECEWISE", 104),
    "more tokens than any graph": ("NONE", 600),
}
PLAIN_FULL = {
    "one token": ("FULL", 1),
    "eight without drafts": ("FULL", 8),
    "five without drafts, padded": ("FULL", 8),
}


def test_vllm_alone_runs_our_steps_in_pieces():
    """The reason for `widen_target_graphs`; when this fails, it can go."""
    assert dispatched(planned("FULL_AND_PIECEWISE")) == PIECES


@pytest.mark.parametrize("loras", [0, 1, 2])
def test_drafts_of_any_lengths_get_full_graphs(loras):
    runner = planned("FULL_AND_PIECEWISE", (0, 2))
    v2.widen_target_graphs(runner)
    drafted = {"one draft": ("FULL", 16), "64 ragged drafts": ("FULL", 480)}
    assert dispatched(runner, loras) == PIECES | PLAIN_FULL | drafted
    graphs = runner.cudagraph_manager
    desc = graphs.dispatch(8, 8, 1, loras, 1)
    assert desc.uniform_token_count == 1, "a step without drafts gets a graph of single tokens"
    offered = {desc for descs in graphs._candidates.values() for desc in descs}
    captured = [desc for descs in graphs._capture_descs.values() for desc in descs]
    assert offered == set(captured)
    assert len(captured) == len(set(captured))


def test_a_backend_that_cannot_says_so_once(monkeypatch):
    """FlashAttention 2 replays one length only: steps without drafts have their graphs."""
    warnings = []
    monkeypatch.setattr(v2.logger, "warning", lambda *a: warnings.append(a[0] % a[1:]))
    monkeypatch.setattr(v2, "get_varlen_cudagraph_unsupported_backend", lambda *args: ("FA2", None))
    runner = planned("FULL_AND_PIECEWISE")
    v2.widen_target_graphs(runner)
    assert dispatched(runner) == PIECES | PLAIN_FULL
    (warning,) = warnings
    assert "FA2" in warning
    assert "--attention-backend" in warning


@pytest.mark.parametrize("mode", ["NONE", "PIECEWISE", "FULL"])
def test_other_modes_stay_as_vllm_plans_them(mode):
    runner = planned(mode)
    before = dispatched(runner)
    v2.widen_target_graphs(runner)
    assert dispatched(runner) == before
