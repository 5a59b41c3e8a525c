"""A correction to vLLM on CPUs without Triton, where drafts would spoil sampled requests.

The rejection sampler of vLLM 0.32 spreads each request's temperature, top-k and top-p over its
draft tokens with a kernel whose C++ stand-in writes into a temporary copy (`_expand_kernel_impl`
converts its output to int64 first), so the sampler divides the logits by unset memory - those of
greedy requests in the same batch too. Greedy-only batches never get there.
"""

import torch


def expand_batch_to_tokens(
    x: torch.Tensor,
    cu_num_tokens: torch.Tensor,
    num_tokens: int,
    replace_from: int = 0,
    replace_to: int = 0,
) -> torch.Tensor:
    """What the docstring of `vllm.v1.sample.rejection_sampler.expand_batch_to_tokens` says."""
    counts = torch.diff(cu_num_tokens, prepend=cu_num_tokens.new_zeros(1))
    expanded = x.repeat_interleave(counts, output_size=num_tokens)
    return expanded.masked_fill(expanded == replace_from, replace_to)
