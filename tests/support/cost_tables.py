"""What the load planner would know of an H200: times of a roofline, by rows and by tokens."""

from failfast_vllm.planning.costs import Costs, CostTable
from failfast_vllm.tools.model_size import shape_of
from failfast_vllm.tools.published_models import GPUS, PUBLISHED_DRAFTERS, PUBLISHED_TARGETS
from failfast_vllm.tools.sizing import pass_ms

DRAFTER = "Efficient-Large-Model/Fast_dLLM_v2_1.5B"
SIZES = [2**i for i in range(14)]  # rows or tokens of a pass


def cost_tables(target: str) -> Costs:
    """For Qwen2.5 of a size ("7B") with the 1.5B drafter; contexts cost nothing."""
    name = f"Qwen/Qwen2.5-{target}-Instruct"

    def table(shape):
        return CostTable(SIZES, [pass_ms(GPUS["H200"], shape, [size], [0]) for size in SIZES])

    return Costs(
        draft=table(shape_of(DRAFTER, PUBLISHED_DRAFTERS[DRAFTER])),
        verify=table(shape_of(name, PUBLISHED_TARGETS[name])),
    )
