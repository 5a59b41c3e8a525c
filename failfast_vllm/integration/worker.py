"""A worker's life: its hooks, the drafters' architectures, warm-up, and the end of its trace."""

import contextlib
from collections.abc import Iterator
from typing import Any

from failfast_vllm.drafters.families import FAMILIES
from failfast_vllm.integration.hooks import asked_for, hook, install


@hook("worker", "vllm.v1.worker.worker_base:WorkerBase.__init__")
def prepare_worker(original: Any, self: Any, vllm_config: Any, *rest: Any, **more: Any) -> None:
    """Installs the hooks of the model runner, and wraps the worker's start-up and shutdown.

    Runner hooks import CUDA libraries, so they wait for a worker process that needs them.

    Goes when: vLLM lets plugins register speculative methods, with a start-up of their own.
    """
    if not asked_for(vllm_config):
        original(self, vllm_config, *rest, **more)
        return
    register_model()
    install("engine")
    install("v2" if vllm_config.use_v2_model_runner else "v1")
    original(self, vllm_config, *rest, **more)
    self.compile_or_warm_up_model = _warming_up(self)
    self.shutdown = _closing_the_trace(self)


def register_model() -> None:
    """Make the drafters' configs and architectures known to vLLM."""
    from vllm.model_executor.models.registry import ModelRegistry
    from vllm.transformers_utils.config import _CONFIG_REGISTRY

    for family in FAMILIES:
        architecture = family.architecture
        if architecture not in ModelRegistry.get_supported_archs():
            ModelRegistry.register_model(
                architecture, f"failfast_vllm.drafters.model:{architecture}"
            )
        if family.model_types[0] not in _CONFIG_REGISTRY:
            from failfast_vllm.drafters import hf_config

            _CONFIG_REGISTRY[family.model_types[0]] = hf_config.CONFIGS[family.model_types[0]]


def _warming_up(worker: Any) -> Any:
    """The worker's last step before it serves."""
    warm_up = worker.compile_or_warm_up_model

    def compile_or_warm_up_model(*args: Any, **kwargs: Any) -> Any:
        from failfast_vllm.integration.session import adapter_of
        from failfast_vllm.integration.startup import start_serving

        drafter = adapter_of(worker.model_runner).drafter
        drafter.model.warm_up_kernels(details=drafter.policy.needs_entropy)
        with _compiling_unmonitored(worker):
            result = warm_up(*args, **kwargs)
            start_serving(worker.model_runner)
        return result

    return compile_or_warm_up_model


@contextlib.contextmanager
def _compiling_unmonitored(worker: Any) -> Iterator[None]:
    """vLLM's monitor of compilation starts at the end of its warm-up: let it wait for ours."""
    activate = worker._maybe_activate_jit_monitor
    wanted: list[None] = []
    worker._maybe_activate_jit_monitor = lambda: wanted.append(None)
    try:
        yield
    finally:
        del worker._maybe_activate_jit_monitor
    if wanted:
        activate()


def _closing_the_trace(worker: Any) -> Any:
    """The worker's last call: rounds that wait for the disk are written."""
    end = worker.shutdown

    def shutdown() -> None:
        from failfast_vllm.integration.session import adapter_of

        adapter = adapter_of(getattr(worker, "model_runner", None))  # none: start-up failed
        if adapter is not None and adapter.stats.trace is not None:
            adapter.stats.trace.close()
        end()

    return shutdown
