"""What a GPU worker does between loading and serving, on the V2 runner.

Engines on a CPU skip it, so these tests give a CPU worker the GPU worker's own method. The
interpreter cannot run vLLM's top-k and grammar kernels: the warm-up requests are greedy here.
"""

import contextlib

import pytest

from engine import engine, proposer


@contextlib.contextmanager
def gpu_startup():
    """Workers start as on a GPU; yields the smallest token id of each step of the target."""
    from vllm import SamplingParams
    from vllm.v1.worker import gpu_worker
    from vllm.v1.worker.cpu_worker import CPUWorker
    from vllm.v1.worker.gpu import model_runner, warmup

    least_ids = []
    prepare_inputs = model_runner.GPUModelRunner.prepare_inputs

    def watching_prepare_inputs(self, *args, **kwargs):
        batch = prepare_inputs(self, *args, **kwargs)
        least_ids.append(int(batch.input_ids[: batch.num_tokens].min()))
        return batch

    def warmup_kernels(runner, execute_model, sample_tokens):
        warmup.warmup_kernels(runner, execute_model, lambda grammar: sample_tokens(None))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            CPUWorker,
            "compile_or_warm_up_model",
            gpu_worker.Worker.compile_or_warm_up_model,
        )
        patch.setattr(gpu_worker, "kernel_warmup", lambda worker: None)
        patch.setattr(gpu_worker, "warmup_kernels", warmup_kernels)
        patch.setattr(gpu_worker, "enable_gpu_sync_check", lambda: None)
        patch.setattr(
            SamplingParams,
            "for_sampler_warmup",
            staticmethod(lambda: SamplingParams(temperature=0.0, max_tokens=500)),
        )
        patch.setattr(model_runner.GPUModelRunner, "prepare_inputs", watching_prepare_inputs)
        patch.setenv("VLLM_USE_V2_MODEL_RUNNER", "1")
        yield least_ids


# eager engines skip the warm-up: nothing is compiled here, but vLLM is not told so
WARM = {"max_num_seqs": 4, "enforce_eager": False, "compilation_config": {"mode": 0}}


@pytest.mark.parametrize("load_aware", [False, True])
def test_the_warm_up_drafts_only_ids_and_leaves_nothing(load_aware):
    """Catches placeholders that are no ids, and rounds of the warm-up that are learned from."""
    with (
        gpu_startup() as least_ids,
        engine({"method": "failfast", "load_aware": load_aware}, **WARM) as llm,
    ):
        assert len(least_ids) >= 6, "the GPU worker's warm-up did not run"
        assert min(least_ids) >= 0
        adapter = proposer(llm)
        stats = adapter.stats
        assert (stats.num_steps, stats.num_forwards, stats.num_rows) == (0, 0, 0)
        assert stats.counts.take() == []
        assert not adapter.drafter.blocks.bits.any()
