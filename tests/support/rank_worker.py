"""What tests of several ranks add to vLLM's workers (`worker_extension_cls`).

Importing it also gives vLLM's CPU communicator the two collectives that it lacks and that experts
spread over data-parallel ranks need.
"""

import torch
import torch.distributed
from vllm.distributed.device_communicators.cpu_communicator import CpuCommunicator

from engine import start_watching
from failfast_vllm.drafting.interfaces import Planner
from failfast_vllm.integration.session import adapter_of

EXTENSION = f"{__name__}.RankWorker"


class RankWorker:
    """Methods for `collective_rpc`."""

    def start_watching(self):
        self.record = start_watching(adapter_of(self.model_runner))

    def watched(self):
        return self.record

    def draft_at_any_load(self):
        drafter = adapter_of(self.model_runner).drafter
        drafter.planner = Planner(drafter.planner.draft_increment)

    def drafter_shapes(self):
        """What of the drafter this rank holds."""
        model = adapter_of(self.model_runner).model
        attention = model.model.layers[0].self_attn
        return {
            "num_heads": attention.num_heads,
            "num_kv_heads": attention.num_kv_heads,
            "vocab_rows": model.model.embed_tokens.weight.shape[0],
        }

    def num_draft_passes(self):
        return adapter_of(self.model_runner).stats.num_forwards


def all_gatherv(self, input_, dim=0, sizes=None):
    assert dim == 0
    if isinstance(input_, list):
        return [all_gatherv(self, tensor, dim, sizes) for tensor in input_]
    if sizes is None:
        return self.all_gather(input_, 0)
    padded = input_.new_zeros(max(sizes), *input_.shape[1:])
    padded[: input_.shape[0]] = input_
    parts = [torch.empty_like(padded) for _ in sizes]
    torch.distributed.all_gather(parts, padded, group=self.cpu_group)
    return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])


def reduce_scatterv(self, input_, dim=-1, sizes=None):
    assert dim == 0
    total = input_.clone()
    torch.distributed.all_reduce(total, group=self.cpu_group)
    sizes = sizes or [total.shape[0] // self.world_size] * self.world_size
    return total.split(sizes)[self.rank_in_group]


CpuCommunicator.all_gatherv = all_gatherv
CpuCommunicator.reduce_scatterv = reduce_scatterv
