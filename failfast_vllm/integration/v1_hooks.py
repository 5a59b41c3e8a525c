"""Hooks of workers with the V1 model runner: they hand failfast's steps to `FailFastProposer`."""

from typing import Any

from failfast_vllm.integration.hooks import asked_for, hook

RUNNER = "vllm.v1.worker.gpu_model_runner"


def _proposer(runner: Any) -> Any:
    """The runner's `FailFastProposer`, or None; only a runner that speculates has a drafter."""
    from failfast_vllm.integration.v1 import FailFastProposer

    drafter = getattr(runner, "drafter", None)
    return drafter if isinstance(drafter, FailFastProposer) else None


@hook("v1", "vllm.v1.spec_decode.draft_model:DraftModelProposer.__init__")
def become_ours(
    original: Any, self: Any, vllm_config: Any, device: Any, runner: Any = None
) -> None:
    """Builds our proposer where vLLM would build its own.

    Goes when: vLLM lets plugins register proposers that have a KV cache.
    """
    from vllm.v1.spec_decode.draft_model import DraftModelProposer

    if type(self) is DraftModelProposer and asked_for(vllm_config):
        from failfast_vllm.integration.v1 import FailFastProposer

        self.__class__ = FailFastProposer  # nothing is set yet
        self.__init__(vllm_config, device, runner)
        return
    original()


@hook("v1", f"{RUNNER}:GPUModelRunner._input_fits_in_drafter")
def fit_each_sequence(original: Any, self: Any, common_attn_metadata: Any) -> Any:
    """Ends drafts at the drafter's last position per sequence, not for the whole batch.

    Goes when: vLLM checks each sequence by itself.
    """
    return original() if _proposer(self) is None else common_attn_metadata is not None


@hook("v1", f"{RUNNER}:GPUModelRunner.propose_draft_token_ids")
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
    slot_mappings: Any,
) -> Any:
    """Keeps the step until its drafts are asked for, after its tokens have gone out.

    Goes when: vLLM sends a step's tokens to the clients before it drafts.
    """
    proposer = _proposer(self)
    if proposer is None:
        return original()
    return proposer.postpone(scheduler_output, sampled_token_ids, common_attn_metadata)


@hook("v1", f"{RUNNER}:GPUModelRunner._update_states")
def follow_requests(original: Any, self: Any, scheduler_output: Any) -> Any:
    """Tells policies which requests have ended, and the drafter which pages are new.

    Goes when: vLLM tells a proposer what the scheduler has decided.
    """
    proposer = _proposer(self)
    if proposer is None:
        return original()
    proposer.begin(scheduler_output)
    corrections = original()
    proposer.drop_stale_budgets()
    return corrections


@hook("v1", f"{RUNNER}:GPUModelRunner.take_draft_token_ids")
def take_drafts(original: Any, self: Any) -> Any:
    """Drafts, now that the step's tokens have gone out; the counts go along.

    Goes when: vLLM sends a step's tokens to the clients before it drafts.
    """
    proposer = _proposer(self)
    return original() if proposer is None else proposer.take_drafts()


@hook("v1", f"{RUNNER}:GPUModelRunner._sample")
def sample_without_drafts(original: Any, self: Any, logits: Any, spec_decode_metadata: Any) -> Any:
    """Samples a step without drafts, which vLLM would verify.

    vLLM verifies in every step of an engine that may speculate, with or without drafts. Without
    drafts each row is the token after a draft of length 0: sampled as vLLM samples that, thinking
    budgets included, and not verified, which is slow and, for top-k on a CPU, fails on no rows.

    Goes when: vLLM skips the rejection sampler in steps without drafts.
    """
    ours = spec_decode_metadata is not None and _proposer(self) is not None
    if ours and not any(spec_decode_metadata.num_draft_tokens):
        return self.sampler(
            logits=logits,
            sampling_metadata=self.input_batch.sampling_metadata,
            predict_bonus_token=True,
        )
    return original()


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

    It spreads temperature, top-k and top-p of each request over its draft tokens with a kernel
    whose C++ stand-in (vLLM 0.32) writes into a temporary copy, so the sampler divides the logits
    by unset memory: those of greedy requests in the same batch, too.

    Goes when: that stand-in writes into its output, not into a copy.
    """
    from vllm.triton_utils import HAS_TRITON

    if HAS_TRITON:
        return original()
    import torch

    counts = torch.diff(cu_num_tokens, prepend=cu_num_tokens.new_zeros(1))
    expanded = x.repeat_interleave(counts, output_size=num_tokens)
    return expanded.masked_fill(expanded == replace_from, replace_to)


@hook("v1", f"{RUNNER}:build_logitsprocs")
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
