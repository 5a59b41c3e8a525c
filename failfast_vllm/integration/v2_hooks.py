"""Hooks of workers with the V2 model runner: they build `FailFastSpeculator` and talk to it."""

from typing import Any

from failfast_vllm.integration.hooks import asked_for, hook

RUNNER = "vllm.v1.worker.gpu.model_runner"


def _speculator(runner: Any) -> Any:
    """The runner's `FailFastSpeculator`, or None."""
    from failfast_vllm.integration.v2 import FailFastSpeculator

    return runner.speculator if isinstance(runner.speculator, FailFastSpeculator) else None


@hook("v2", f"{RUNNER}:init_speculator")
def build_ours(original: Any, vllm_config: Any, device: Any, req_states: Any) -> Any:
    """Builds our speculator where vLLM would build its own.

    Goes when: vLLM lets plugins register speculators.
    """
    if not asked_for(vllm_config):
        return original()
    from failfast_vllm.integration.v2 import FailFastSpeculator

    return FailFastSpeculator(vllm_config, device, req_states)


@hook("v2", f"{RUNNER}:GPUModelRunner.initialize_kv_cache")
def widen_graphs(original: Any, self: Any, kv_cache_config: Any) -> None:
    """Plans full CUDA graphs for target steps with drafts of any lengths.

    Goes when: vLLM captures them for any speculator whose drafts differ in length.
    """
    original()
    if _speculator(self) is not None:
        from failfast_vllm.integration.v2 import widen_target_graphs

        widen_target_graphs(self)


@hook("v2", f"{RUNNER}:GPUModelRunner.take_draft_token_ids")
def take_drafts(original: Any, self: Any) -> Any:
    """Drafts, now that the step's tokens have gone out; tells the scheduler each draft's length.

    Goes when: vLLM's V2 runner reports one draft length per request.
    """
    speculator = _speculator(self)
    return original() if speculator is None else speculator.take_drafts()


@hook("v2", f"{RUNNER}:GPUModelRunner.finish_requests")
def forget_requests(original: Any, self: Any, scheduler_output: Any) -> None:
    """Tells policies which requests have ended.

    Goes when: vLLM tells a speculator which requests have ended.
    """
    original()  # takes preempted requests for finished ones
    speculator = _speculator(self)
    if speculator is not None:
        speculator.forget(scheduler_output.finished_req_ids)


@hook("v2", f"{RUNNER}:GPUModelRunner.add_requests")
def keep_parameters(original: Any, self: Any, scheduler_output: Any) -> None:
    """Keeps each request's sampling parameters by state slot.

    Goes when: vLLM gives a speculator the parameters of the requests in a batch.
    """
    original()
    speculator = _speculator(self)
    if speculator is not None:
        speculator.add_requests(scheduler_output)
