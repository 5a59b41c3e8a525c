"""What the load planner would know of an H200: times of a roofline, by rows and by tokens."""

from failfast_vllm.planning.costs import Costs, CostTable
from failfast_vllm.tools.sizing import memory_of
from published_models import PUBLISHED_DRAFTERS, PUBLISHED_TARGETS

DRAFTER = "Efficient-Large-Model/Fast_dLLM_v2_1.5B"
SIZES = [2**i for i in range(14)]  # rows or tokens of a pass
BANDWIDTH = 4.8e12  # bytes/s, data sheet
COMPUTE = 790e12  # bf16 flop/s, measured on large products


def cost_tables(target: str) -> Costs:
    """For Qwen2.5 of a size ("7B") with the 1.5B drafter; contexts cost nothing."""
    name = f"Qwen/Qwen2.5-{target}-Instruct"
    return Costs(
        draft=roofline(PUBLISHED_DRAFTERS[DRAFTER]), verify=roofline(PUBLISHED_TARGETS[name])
    )


def roofline(config) -> CostTable:
    """Milliseconds of bfloat16 passes: max(bytes / bandwidth, flops / compute)."""
    weight_bytes = memory_of("", config).weight_bytes
    if not config["tie_word_embeddings"]:  # a pass reads its tokens' rows only: neglected
        weight_bytes -= 2 * config["vocab_size"] * config["hidden_size"]
    return CostTable(
        SIZES,
        [1e3 * max(weight_bytes / BANDWIDTH, weight_bytes * size / COMPUTE) for size in SIZES],
    )
