"""What passes of the drafter and steps of the target take on this machine, for the planner."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from vllm.config import VllmConfig

from failfast_vllm import METHOD
from failfast_vllm.drafters.hosted import HostedDraftModel, row_class
from failfast_vllm.planning.costs import Costs, CostTable

MAX_TURNS, MIN_TURNS, TURNS_SECONDS = 10, 3, 12.0  # of timing the models
SLOW_MS = 500.0  # wider passes than one that takes longer are extrapolated
WARM_UP_MS = 8000.0  # of that for each model, on a CPU; a busy one has it seem longer
MAX_WARM_ROWS = 128  # of the target: with the drafter's they fit into oneDNN's cache of 1024


@torch.inference_mode()
def measure_costs(
    target_step: Callable[[int], torch.Tensor],
    drafter: HostedDraftModel,
    vllm_config: VllmConfig,
    clock: Callable[[], float] = time.perf_counter,
) -> Costs:
    """Time steps of the target and passes of the drafter, in a few seconds; on all ranks alike.

    A step takes more than its forward pass: the planner learns the rest.

    Args:
        target_step: runs the target over a number of tokens and returns logits of them.
    """
    knobs = vllm_config.additional_config[METHOD]
    scheduler, ranks = vllm_config.scheduler_config, vllm_config.parallel_config
    widest = min(scheduler.max_num_seqs + knobs["draft_budget"], scheduler.max_num_batched_tokens)
    in_lockstep = max(ranks.data_parallel_size, ranks.tensor_parallel_size) > 1
    sizes = [2**i for i in range(widest.bit_length())]
    target = _Timed(target_step, clock)
    draft = _Timed(lambda size: _draft_pass(drafter, size), clock)
    # a CPU compiles kernels per row count
    classes = sorted({row_class(size) for size in range(1, widest + 1)})
    warm_sizes = list(range(1, min(widest, MAX_WARM_ROWS) + 1)), classes
    for model, warm in zip((target, draft), warm_sizes, strict=True):
        sizes = model.first_times(sizes, until_slow=not in_lockstep)
        if drafter.device.type == "cpu" and not in_lockstep:
            model.warm_up(warm, sizes)
    ends = clock() + TURNS_SECONDS
    # in turns: a second that another process takes is not all of one model or size
    for turn in range(1, MAX_TURNS):
        if turn >= MIN_TURNS and clock() > ends and not in_lockstep:
            break
        for size in sizes:
            target.time(size)
            draft.time(size)
    return Costs(draft.table(sizes), target.table(sizes))


@dataclass
class _Timed:
    """A model, and the shortest time that each number of rows took it."""

    run: Callable[[int], torch.Tensor]
    clock: Callable[[], float]  # seconds
    best: dict[int, float] = field(default_factory=dict)  # milliseconds by rows

    def milliseconds(self, size: int) -> float:
        began = self.clock()
        self.run(size).amax().item()  # waits for the device
        return (self.clock() - began) * 1e3

    def time(self, size: int) -> float:
        self.best[size] = min(self.best.get(size, float("inf")), self.milliseconds(size))
        return self.best[size]

    def first_times(self, sizes: list[int], *, until_slow: bool) -> list[int]:
        """Time each size; returns those that are worth more of it."""
        for i, size in enumerate(sizes):
            self.time(size)  # warms up
            if self.time(size) > SLOW_MS and until_slow:
                return sizes[: i + 1]
        return sizes

    def warm_up(self, warm_sizes: list[int], sizes: list[int]) -> None:
        """Run as many of `warm_sizes` as there is time for, by the times of `sizes`."""
        num = int((self.table(sizes)(warm_sizes).cumsum() < WARM_UP_MS).sum())
        # widest first: else the kernels of each size take a part of what the size before has
        # freed, and glibc searches all the gaps in between whenever a step allocates
        for size in reversed(warm_sizes[:num]):
            self.milliseconds(size)

    def table(self, sizes: list[int]) -> CostTable:
        return CostTable(sizes, [self.best[size] for size in sizes])


def _draft_pass(drafter: HostedDraftModel, size: int) -> torch.Tensor:
    """Sequences in the middle of a live block, each with an increment of masks."""
    rows_each = drafter.diffusion_block_size // 2 + drafter.draft_increment
    num_seqs = max(1, size // rows_each)
    hidden_states = drafter.forward(drafter.idle_pass(num_seqs, size))
    masks = hidden_states[: num_seqs * drafter.draft_increment]
    return drafter.confidence(masks).probabilities
