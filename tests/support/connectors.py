"""A store of KV on disk, filled and read by engines with and without a drafter."""

from engine import core, generate, mixed_prompts, proposer, watch
from failfast_vllm.planning.costs import Costs, CostTable
from state_check import TOLERANCE, largest_error

PAGE = 64


def connected(path):
    """Engine arguments."""
    return {
        "block_size": PAGE,
        "kv_transfer_config": {
            "kv_connector": "ExampleConnector",
            "kv_role": "kv_both",
            "kv_connector_extra_config": {"shared_storage_path": str(path)},
        },
    }


def prompts_of_pages(tokenizer, count):
    """Prompts of one page or two and some tokens; of a single one the connector finds nothing."""
    text = [i for prompt in mixed_prompts(tokenizer, 60) for i in prompt]
    return [text[41 * i : 41 * i + PAGE + 2 + 13 * (i % 6)] for i in range(count)]


def answers(llm, prompts, params, *, hits):
    """Token ids, all submitted at once; `hits`: whether the store must have the prompts."""
    connector = core(llm).scheduler.connector
    find, found = connector.get_num_new_matched_tokens, {}

    def recording_find(request, num_computed_tokens):
        result = find(request, num_computed_tokens)
        found[request.request_id] = result[0] >= PAGE
        return result

    connector.get_num_new_matched_tokens = recording_find
    try:
        answered = generate(llm, prompts, params)
    finally:
        connector.get_num_new_matched_tokens = find
    assert list(found.values()) == [hits] * len(prompts)
    return answered


def let_drafting_cost(llm, milliseconds):
    """Make the load planner rest, or end its rest."""
    planner = proposer(llm).drafter.planner
    planner.learns, planner.guard.steps_to_rest = False, 0
    tables = CostTable([1, 256], [milliseconds, 9 * milliseconds]), CostTable([1, 256], [9.0, 18.0])
    planner.costs = Costs(*tables)


def assert_stores_are_shared(path, dense, asked, prompts, params, expected, start_plain, start):
    """Plain vLLM fills a store, failfast reads and fills it, plain vLLM reads it.

    Args:
        start_plain, start: open an engine with these arguments.
        asked: the configuration with a drafter, load-aware.
    """
    old, new = slice(0, len(prompts) // 2), slice(len(prompts) // 2, None)
    with start_plain(**connected(path)) as llm:
        assert answers(llm, prompts[old], params[old], hits=False) == expected[old]
    with start(asked, **connected(path)) as llm:
        let_drafting_cost(llm, 1e6)
        assert answers(llm, prompts[new], params[new], hits=False) == expected[new]
        assert proposer(llm).stats.num_forwards == 0, "the planner rested"
        let_drafting_cost(llm, 1e-3)
        with watch(llm) as record:
            for part in (new, old, new):
                found = []

                def run(part=part, found=found):
                    found.extend(answers(llm, prompts[part], params[part], hits=True))

                error, num_checked = largest_error(llm, dense, run)
                assert found == expected[part]
                assert error < TOLERANCE
                assert num_checked > 10
        record.assert_not_vacuous()
    stored = {file.name for file in path.rglob("*.safetensors")}
    assert stored
    assert not [name for name in stored if name.startswith("draft_model")]
    with start_plain(**connected(path)) as llm:
        assert answers(llm, prompts, params, hits=True) == expected
