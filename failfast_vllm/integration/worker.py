"""A worker's life: its hooks, the drafters' architectures, warm-up, and the end of its trace."""

import functools
from typing import Any

from failfast_vllm.drafters.families import FAMILIES
from failfast_vllm.integration.hooks import asked_for, hook, install


@hook("worker", "vllm.v1.worker.worker_base:WorkerBase.__init__")
def prepare_worker(original: Any, self: Any, vllm_config: Any) -> None:
    """Installs the hooks of the model runner, and wraps the worker's start-up and shutdown.

    Runner hooks import CUDA libraries, so they wait for a worker process that needs them.

    Goes when: vLLM lets plugins register speculative methods, with a start-up of their own.
    """
    if not asked_for(vllm_config):
        original()
        return
    register_model()
    install("engine")
    install("v2" if vllm_config.use_v2_model_runner else "v1")
    original()
    for function, ours in (("compile_or_warm_up_model", _warm_up), ("shutdown", _shut_down)):
        setattr(self, function, functools.partial(ours, self, getattr(self, function)))


def register_model() -> None:
    """Make the drafters' configs and architectures known to vLLM."""
    from vllm.model_executor.models.registry import ModelRegistry
    from vllm.transformers_utils.config import _CONFIG_REGISTRY

    from failfast_vllm.drafters.hf_config import CONFIGS

    known = ModelRegistry.get_supported_archs()
    for name in (family.architecture for family in FAMILIES):
        if name not in known:
            ModelRegistry.register_model(name, f"failfast_vllm.drafters.model:{name}")
    for model_type, config in CONFIGS.items():
        _CONFIG_REGISTRY.setdefault(model_type, config)


def _warm_up(worker: Any, original: Any, *args: Any, **kwargs: Any) -> Any:
    """The worker's last step before it serves."""
    from failfast_vllm.integration.session import adapter_of
    from failfast_vllm.integration.startup import start_serving

    adapter, activate = adapter_of(worker.model_runner), worker._maybe_activate_jit_monitor
    drafter = adapter.drafter
    drafter.model.warm_up_kernels(details=drafter.policy.needs_entropy)
    postponed: list[Any] = []  # vLLM's monitor of compilation: it waits for our start-up
    worker._maybe_activate_jit_monitor = lambda: postponed.append(activate)
    result = original(*args, **kwargs)
    start_serving(adapter, worker.model_runner)
    worker._maybe_activate_jit_monitor = activate
    for activation in postponed:
        activation()
    return result


def _shut_down(worker: Any, original: Any) -> None:
    """The worker's last call: rounds that wait for the disk are written."""
    from failfast_vllm.integration.session import adapter_of

    adapter = adapter_of(getattr(worker, "model_runner", None))  # none: start-up failed
    if adapter is not None and adapter.stats.trace is not None:
        adapter.stats.trace.close()
    original()
