"""A GPU worker's start-up on a CPU: memory profiles, vLLM's warm-up, captured graphs.

The methods are vLLM's own. Stood in for: CUDA graphs (a replay runs the model again), memory pools,
and what the interpreter cannot run: kernels of other models, top-k sampling, grammar masks.
"""

import contextlib
import functools
import inspect
from dataclasses import dataclass, field
from typing import Any

import pytest

from failfast_vllm.planning.planner import LoadPlanner

CAPTURE_SIZES = [1, 2, 4, 8, 16, 32, 64]


@dataclass
class Startup:
    """What was seen of the engines that started."""

    least_ids: list[int] = field(default_factory=list)  # of each step of the target
    graphs: list[Any] = field(default_factory=list)  # of each step; None: it ran as it is
    num_draft_replays: int = 0
    watched_with_planner: list[bool] = field(default_factory=list)  # when vLLM began to watch
    on_profiled: Any = None  # called with the runner when its graphs' memory has been profiled


@contextlib.contextmanager
def gpu_startup():
    """Workers start as on a GPU."""
    from vllm import SamplingParams
    from vllm.config.compilation import CUDAGraphMode
    from vllm.forward_context import set_forward_context
    from vllm.platforms import current_platform
    from vllm.v1.attention.backend import AttentionCGSupport
    from vllm.v1.attention.backends.cpu_attn import (
        CPUAttentionBackendImpl,
        CPUAttentionMetadataBuilder,
    )
    from vllm.v1.worker import gpu_worker
    from vllm.v1.worker.cpu_worker import CPUWorker
    from vllm.v1.worker.gpu import cudagraph_utils, model_runner, warmup
    from vllm.v1.worker.gpu.model_states.default import DefaultModelState

    from failfast_vllm.integration import v2 as speculator

    seen = Startup()
    runner_class, manager_class = model_runner.GPUModelRunner, cudagraph_utils.ModelCudaGraphManager
    latest = {}

    def warmup_kernels(runner, execute_model, sample_tokens):
        warmup.warmup_kernels(runner, execute_model, lambda grammar: sample_tokens(None))

    def prepare_inputs(original, self, *args, **kwargs):
        batch = original(self, *args, **kwargs)
        seen.least_ids.append(int(batch.input_ids.min()))
        return batch

    def prepare_attn(original, self, *args, **kwargs):
        latest["metadata"] = original(self, *args, **kwargs)
        return latest["metadata"]

    def attend(original, self, *args, **kwargs):
        output = original(self, *args, **kwargs)
        given = inspect.signature(original).bind(self, *args, **kwargs).arguments
        if given["attn_metadata"] is None:  # a profile: else logits of what memory held, even NaN
            output.zero_()
        return output

    def build_slot_mappings_by_layer(original, *args):
        latest["slots"] = original(*args)
        return latest["slots"]

    def execute_model(original, self, scheduler_output, *args, **kwargs):
        latest["graph"] = None
        result = original(self, scheduler_output, *args, **kwargs)
        if scheduler_output.total_num_scheduled_tokens:
            seen.graphs.append(latest["graph"])
        return result

    def determine_available_memory(original, self):
        config = self.compilation_config
        config.cudagraph_mode = CUDAGraphMode.FULL_DECODE_ONLY  # pieces need compiled models
        config.cudagraph_capture_sizes = CAPTURE_SIZES
        config.max_cudagraph_capture_size = CAPTURE_SIZES[-1]
        self.model_runner.profile_run()
        self.model_runner.profile_cudagraph_memory()
        if seen.on_profiled is not None:
            seen.on_profiled(self.model_runner)
        return original(self)

    def activate_jit_monitor(original, self):
        seen.watched_with_planner.append(
            isinstance(self.model_runner.speculator.drafter.planner, LoadPlanner)
        )

    def capture_model(original, self, model, model_state, input_buffers, *args, **kwargs):
        latest["model"], latest["buffers"] = model, input_buffers
        return original(self, model, model_state, input_buffers, *args, **kwargs)

    def capture(self, create_forward_fn, progress_bar_desc=None):
        for descs in self._capture_descs.values():
            for desc in descs:
                create_forward_fn(desc, warmup=True)(CUDAGraphMode.NONE)
                assert desc not in self.graphs
                self.graphs[desc] = None
        self._graphs_captured = True

    def run_fullgraph(self, desc):
        assert desc in self.graphs
        latest["graph"] = desc
        buffers, size = latest["buffers"], desc.num_tokens
        with set_forward_context(
            latest["metadata"], self.vllm_config, num_tokens=size, slot_mapping=latest["slots"]
        ):
            return latest["model"](
                input_ids=buffers.input_ids[:size],
                positions=buffers.positions[:size],
                intermediate_tensors=None,
            )

    def cuda_graph(run, pool):
        with pool():
            run()

        def replay():
            seen.num_draft_replays += 1
            run()

        return replay

    with pytest.MonkeyPatch.context() as patch:

        def around(owner, name, function):
            original = getattr(owner, name)

            @functools.wraps(original)  # a hook looks at the parameters
            def wrapper(*args, **kwargs):
                return function(original, *args, **kwargs)

            patch.setattr(owner, name, wrapper)

        patch.setattr(
            CPUWorker, "compile_or_warm_up_model", gpu_worker.Worker.compile_or_warm_up_model
        )
        around(gpu_worker.Worker, "_maybe_activate_jit_monitor", activate_jit_monitor)
        patch.setattr(gpu_worker, "kernel_warmup", lambda worker: None)
        patch.setattr(gpu_worker, "warmup_kernels", warmup_kernels)
        patch.setattr(gpu_worker, "enable_gpu_sync_check", lambda: None)
        patch.setattr(model_runner, "lock_workspace", lambda: None)
        around(CPUWorker, "determine_available_memory", determine_available_memory)
        greedy = SamplingParams(temperature=0.0, max_tokens=500)
        patch.setattr(SamplingParams, "for_sampler_warmup", staticmethod(lambda: greedy))
        around(runner_class, "prepare_inputs", prepare_inputs)
        around(runner_class, "execute_model", execute_model)
        around(model_runner, "build_slot_mappings_by_layer", build_slot_mappings_by_layer)
        around(DefaultModelState, "prepare_attn", prepare_attn)
        around(CPUAttentionBackendImpl, "forward", attend)
        patch.setattr(CPUAttentionMetadataBuilder, "_cudagraph_support", AttentionCGSupport.ALWAYS)
        around(manager_class, "capture", capture_model)
        patch.setattr(cudagraph_utils.CudaGraphManager, "capture", capture)
        patch.setattr(manager_class, "run_fullgraph", run_fullgraph)
        handle = staticmethod(lambda *args: (0, 1))
        patch.setattr(type(current_platform), "graph_pool_handle", handle, raising=False)
        patch.setattr(speculator, "graph_capture", lambda device: contextlib.nullcontext())
        patch.setattr(speculator, "capture_pool", lambda *args: contextlib.nullcontext())
        patch.setattr(speculator, "cuda_graph", cuda_graph)
        patch.setenv("VLLM_USE_V2_MODEL_RUNNER", "1")
        yield seen
