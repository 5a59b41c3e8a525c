"""What the load planner would know of an H200: times of a roofline, by rows and by tokens."""

from failfast_vllm.planning.costs import Costs, CostTable
from failfast_vllm.tools import sizing

DRAFTER = "Efficient-Large-Model/Fast_dLLM_v2_1.5B"
SIZES = [2**i for i in range(14)]  # rows or tokens of a pass


def cost_tables(target: str) -> Costs:
    """For Qwen2.5 of a size ("7B") with the 1.5B drafter; contexts cost nothing."""
    name = f"Qwen/Qwen2.5-{target}-Instruct"
    model = sizing.CostModel(
        sizing.GPUS["H200"],
        sizing.shape_of(name, sizing.PUBLISHED_TARGETS[name]),
        sizing.shape_of(DRAFTER, sizing.PUBLISHED_DRAFTERS[DRAFTER]),
    )
    return Costs(
        draft=CostTable(SIZES, [model.draft_ms([size], [0]) for size in SIZES]),
        verify=CostTable(SIZES, [model.verify_ms([size], [0]) for size in SIZES]),
    )
