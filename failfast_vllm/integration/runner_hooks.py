"""Hooks of workers: V1 and V2 model runners hand their steps to our adapters."""

from typing import Any

from failfast_vllm.config import METHOD
from failfast_vllm.integration.hooks import asked_for, hook

V1 = "vllm.v1.worker.gpu_model_runner"
V2 = "vllm.v1.worker.gpu.model_runner"


def _ours(runner: Any) -> Any:
    """The runner's adapter, or None where it does not run failfast."""
    from failfast_vllm.integration.session import Adapter, adapter_of

    found = adapter_of(runner)
    return found if isinstance(found, Adapter) else None


@hook("v1", "vllm.v1.spec_decode.draft_model:DraftModelProposer.__init__")
def become_ours(
    original: Any, self: Any, vllm_config: Any, device: Any, runner: Any = None
) -> None:
    """Builds our proposer where vLLM would build its own.

    Goes when: vLLM lets plugins register proposers that have a KV cache.
    """
    from vllm.v1.spec_decode.draft_model import DraftModelProposer

    if type(self) is not DraftModelProposer or not asked_for(vllm_config):
        original()
        return
    from failfast_vllm.integration.v1 import FailFastProposer

    self.__class__ = FailFastProposer  # nothing is set yet
    self.__init__(vllm_config, device, runner)


@hook("v1", f"{V1}:GPUModelRunner._input_fits_in_drafter")
def fit_each_sequence(original: Any, self: Any, common_attn_metadata: Any) -> Any:
    """Ends drafts at the drafter's last position per sequence, not for the whole batch.

    Goes when: vLLM checks each sequence by itself.
    """
    return original() if _ours(self) is None else common_attn_metadata is not None


@hook("v1", f"{V1}:GPUModelRunner.propose_draft_token_ids")
def keep_the_step(
    original: Any,
    self: Any,
    scheduler_output: Any,
    sampled_token_ids: Any,
    sampling_metadata: Any,
    hidden_states: Any,
    sample_hidden_states: Any,
    aux_hidden_states: Any,
    spec_decode_metadata: Any,
    common_attn_metadata: Any,
) -> Any:
    """Keeps the step until its drafts are asked for, after its tokens have gone out.

    Goes when: vLLM sends a step's tokens to the clients before it drafts.
    """
    proposer = _ours(self)
    if proposer is None:
        return original()
    return proposer.postpone(scheduler_output, sampled_token_ids, common_attn_metadata)


@hook("v1", f"{V1}:GPUModelRunner._update_states")
def follow_requests(original: Any, self: Any, scheduler_output: Any) -> Any:
    """Tells policies which requests have ended, and the drafter which pages are new.

    Goes when: vLLM tells a proposer what the scheduler has decided.
    """
    proposer = _ours(self)
    if proposer is None:
        return original()
    proposer.begin(self, scheduler_output)
    corrections = original()
    proposer.drop_stale_budgets()
    return corrections


@hook("v1", f"{V1}:GPUModelRunner.take_draft_token_ids")
@hook("v2", f"{V2}:GPUModelRunner.take_draft_token_ids")
def take_drafts(original: Any, self: Any) -> Any:
    """Drafts, now that the step's tokens have gone out; tells the scheduler each draft's length.

    Goes when: vLLM sends a step's tokens out first, and V2 reports one draft length per request.
    """
    ours = _ours(self)
    return original() if ours is None else ours.take_drafts()


@hook("v1", f"{V1}:GPUModelRunner._prepare_inputs")
def prepare_without_drafts(
    original: Any, self: Any, scheduler_output: Any, num_scheduled_tokens: Any
) -> Any:
    """Prepares a step without drafts as vLLM does where nothing drafts, which takes less time.

    Not for models with a recurrent state: there it lies where the step before has verified.

    Goes when: vLLM prepares a step for verification only where it has drafts.
    """
    drafts = scheduler_output.scheduled_spec_decode_tokens
    if drafts or self.model_config.has_inner_state or _ours(self) is None:
        return original()
    config, self.speculative_config = self.speculative_config, None
    try:
        return original()
    finally:
        self.speculative_config = config


@hook("v1", f"{V1}:GPUModelRunner._sample")
def sample_without_drafts(original: Any, self: Any, logits: Any, spec_decode_metadata: Any) -> Any:
    """Samples a step without drafts, which vLLM would verify.

    Each row is then the token after a draft of length 0, sampled as vLLM samples that. Verifying is
    slow and, for top-k on a CPU, fails on no rows.

    Goes when: vLLM skips the rejection sampler in steps without drafts.
    """
    drafts = spec_decode_metadata is not None and any(spec_decode_metadata.num_draft_tokens)
    if drafts or _ours(self) is None:
        return original()
    return self.sampler(
        logits=logits,
        sampling_metadata=self.input_batch.sampling_metadata,
        predict_bonus_token=True,
    )


@hook("v1", "vllm.v1.sample.rejection_sampler:expand_batch_to_tokens")
def spread_parameters(
    original: Any,
    x: Any,
    cu_num_tokens: Any,
    num_tokens: int,
    replace_from: int = 0,
    replace_to: int = 0,
) -> Any:
    """Replaces, without Triton only, a function whose stand-in returns unset memory.

    The C++ stand-in (vLLM 0.32) writes a request's temperature, top-k and top-p for its draft
    tokens into a temporary copy.

    Goes when: that stand-in writes into its output, not into a copy.
    """
    from vllm.triton_utils import HAS_TRITON

    if HAS_TRITON:
        return original()
    import torch

    counts = torch.diff(cu_num_tokens, prepend=cu_num_tokens.new_zeros(1))
    expanded = x.repeat_interleave(counts, output_size=num_tokens)
    return expanded.masked_fill(expanded == replace_from, replace_to)


@hook("v1", f"{V1}:build_logitsprocs")
def keep_logits_processors(
    original: Any,
    vllm_config: Any,
    device: Any,
    is_pin_memory: bool,
    is_pooling_model: bool,
    custom_logitsprocs: Any = (),
) -> Any:
    """Keeps the processors of `min_p` and `logit_bias`, which undrafted requests can have.

    Goes when: vLLM keeps them beside a drafter.
    """
    if not asked_for(vllm_config) or custom_logitsprocs:
        return original()
    from vllm.v1.sample.logits_processor import BUILTIN_LOGITS_PROCESSORS, LogitsProcessors

    return LogitsProcessors(
        make(vllm_config, device, is_pin_memory) for make in BUILTIN_LOGITS_PROCESSORS
    )


@hook("v2", f"{V2}:init_speculator")
def build_ours(original: Any, vllm_config: Any, device: Any, req_states: Any) -> Any:
    """Builds our speculator where vLLM would build its own.

    Goes when: vLLM lets plugins register speculators.
    """
    if not asked_for(vllm_config):
        return original()
    from failfast_vllm.integration.v2 import CopySpeculator, FailFastSpeculator

    drafts = vllm_config.additional_config[METHOD]["drafts"]
    return (FailFastSpeculator if drafts else CopySpeculator)(vllm_config, device, req_states)


@hook("v2", f"{V2}:GPUModelRunner.initialize_kv_cache")
def widen_graphs(original: Any, self: Any, kv_cache_config: Any) -> None:
    """Plans full CUDA graphs for target steps with drafts of any lengths.

    Goes when: vLLM captures them for any speculator whose drafts differ in length.
    """
    original()
    if _ours(self) is not None:
        from failfast_vllm.integration.v2 import widen_target_graphs

        widen_target_graphs(self)


@hook("v2", f"{V2}:GPUModelRunner.finish_requests")
def forget_requests(original: Any, self: Any, scheduler_output: Any) -> None:
    """Tells policies which requests have ended.

    Goes when: vLLM tells a speculator which requests have ended.
    """
    original()  # takes preempted requests for finished ones
    if (speculator := _ours(self)) is not None:
        speculator.forget(scheduler_output.finished_req_ids)


@hook("v2", f"{V2}:GPUModelRunner.add_requests")
def keep_parameters(original: Any, self: Any, scheduler_output: Any) -> None:
    """Keeps each request's sampling parameters by state slot.

    Goes when: vLLM gives a speculator the parameters of the requests in a batch.
    """
    original()
    if (speculator := _ours(self)) is not None:
        speculator.add_requests(scheduler_output)
