"""Several ranks answer as one does: a shared drafter, whole drafters, data parallel."""

import asyncio
import contextlib
import multiprocessing
import types
from collections import Counter

import pytest
import torch
from vllm import SamplingParams
from vllm.distributed import parallel_state
from vllm.engine.arg_utils import AsyncEngineArgs, EngineArgs
from vllm.v1.engine import coordinator, utils
from vllm.v1.executor import multiproc_executor

from checkpoints import tiny_config, write_checkpoint
from engine import TARGET, engine, generate, mixed_prompts, watch
from failfast_vllm.config import MODELS_DIR
from failfast_vllm.drafters import checks, hosted
from failfast_vllm.drafters import parallel as ranks
from failfast_vllm.drafters.families import SDAR, SDAR_MOE
from failfast_vllm.drafting.records import DraftBatch
from failfast_vllm.integration.configure import check_balancing
from failfast_vllm.integration.hooks import logger
from rank_worker import EXTENSION
from wide_models import equal_experts, four_heads, rewrite

TWO_RANKS = {"tensor_parallel_size": 2, "worker_extension_cls": EXTENSION}
NUM_PROMPTS = 18
NUM_REQUESTS = 30
HANG_SECONDS = 240  # a tenth of it on an idle machine
SHARED_DRAFTS = 0.98  # sharded sums round differently: a tie between two tokens may turn over


@pytest.fixture(scope="module", autouse=True)
def _ranks_share_imports():
    """vLLM's processes begin as copies of one that has imported it and has no threads."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["vllm.v1.worker.cpu_worker", "vllm.v1.engine.core"])
    with pytest.MonkeyPatch.context() as patch:
        for module in (coordinator, utils, multiproc_executor):
            patch.setattr(module, "get_mp_context", lambda: context)
        yield


def limits(count):
    """Greedy, with output limits from 1 to 48 tokens."""
    return [SamplingParams(temperature=0.0, max_tokens=1 + i * 37 % 48) for i in range(count)]


@pytest.fixture(scope="module")
def shared_drafter(tmp_path_factory):
    """The shipped drafter has three heads; this one computes the same with four."""
    return rewrite("drafter", tmp_path_factory.mktemp("models") / "four-heads", four_heads)


@pytest.fixture(scope="module")
def expert_drafter(tmp_path_factory):
    """Random weights: it drafts, and little of it is accepted."""
    path = tmp_path_factory.mktemp("models") / "with-experts"
    write_checkpoint(path, SDAR_MOE, tiny_config(SDAR_MOE))
    return str(path)


@pytest.fixture(scope="module")
def plain():
    """Prompts, and what one rank answers without speculation."""
    with engine() as llm:
        prompts = mixed_prompts(llm.get_tokenizer(), NUM_PROMPTS)
        return prompts, generate(llm, prompts, limits(NUM_PROMPTS))


@pytest.fixture(scope="module")
def one_rank(plain):
    """What one rank drafts."""
    prompts, _ = plain
    with engine("failfast") as llm, watch(llm) as record:
        generate(llm, prompts, limits(NUM_PROMPTS))
    return record


@contextlib.contextmanager
def two_ranks(speculative_config):
    """Yields the engine and what asks it: prompts -> answers, and what each rank drafted."""
    with engine(speculative_config, **TWO_RANKS) as llm:

        def ask(prompts):
            llm.collective_rpc("start_watching")
            answers = generate(llm, prompts, limits(len(prompts)))
            return answers, llm.collective_rpc("watched")

        yield llm, ask


def decisions(record):
    rounds = [{**vars(r), "confidences": r.confidences.tolist()} for r in record.rounds]
    return record.proposals, record.draft_lens, rounds


@pytest.mark.slow
def test_whole_drafters_draft_what_one_rank_drafts(plain, one_rank):
    """Three heads cannot be shared by two ranks, so each holds all of them and asks nobody.

    Catches a layer or a gather that still uses the target's group: it would hang, or draft garbage.
    """
    prompts, expected = plain
    with two_ranks("failfast") as (llm, ask):
        answers, records = ask(prompts)
        shapes = llm.collective_rpc("drafter_shapes")
    assert answers == expected
    assert decisions(records[0]) == decisions(records[1])
    records[0].assert_not_vacuous()
    assert sorted(records[0].proposals) == sorted(one_rank.proposals)
    assert shapes[0] == shapes[1] == {"num_heads": 3, "num_kv_heads": 1, "vocab_rows": 1984}


@pytest.mark.slow
def test_a_shared_drafter_takes_the_same_decisions_on_every_rank(plain, one_rank, shared_drafter):
    """Catches ranks that see other logits: one would take a pass more than the other, and wait.

    And ranks that plan by their own times: one would draft where the other rests, and wait.
    """
    prompts, expected = plain
    asked = {"method": "failfast", "model": shared_drafter, "load_aware": True}
    with two_ranks(asked) as (llm, ask):
        answers, records = ask(prompts)
        assert answers == expected
        assert decisions(records[0]) == decisions(records[1])
        assert records[0].num_drafted > 0
        llm.collective_rpc("draft_at_any_load")
        answers, records = ask(prompts)
        shapes = llm.collective_rpc("drafter_shapes")
    assert answers == expected
    assert decisions(records[0]) == decisions(records[1])
    records[0].assert_not_vacuous()
    # A context in which the draft differed shifts those after it, so contexts are counted too.
    found, alone = (
        Counter((tuple(p.known), p.max_draft, tuple(p.draft), p.num_passes) for p in proposals)
        for proposals in (records[0].proposals, one_rank.proposals)
    )
    assert (found & alone).total() >= SHARED_DRAFTS * alone.total()
    assert shapes[0] == shapes[1] == {"num_heads": 2, "num_kv_heads": 1, "vocab_rows": 992}


@pytest.mark.slow
def test_two_ranks_share_the_experts_of_a_drafter(plain, expert_drafter):
    """Catches experts that are summed over the wrong ranks, or not at all."""
    prompts, expected = plain
    method = {"method": "failfast", "model": expert_drafter}
    with engine(method) as llm, watch(llm) as record:
        generate(llm, prompts, limits(NUM_PROMPTS))
    with two_ranks(method) as (llm, ask):
        answers, records = ask(prompts)
        shapes = llm.collective_rpc("drafter_shapes")
    assert answers == expected
    assert decisions(records[0]) == decisions(records[1])
    assert records[0].num_drafted > 0
    assert shapes[0] == shapes[1] == {"num_heads": 2, "num_kv_heads": 1, "vocab_rows": 992}
    found, alone = (
        Counter((tuple(p.known), p.max_draft, tuple(p.draft), p.num_passes) for p in proposals)
        for proposals in (records[0].proposals, record.proposals)
    )
    assert (found & alone).total() >= SHARED_DRAFTS * alone.total()


@pytest.fixture(scope="module")
def one_plain_rank(tmp_path_factory):
    """A target with experts, prompts, and what it answers to every fifth of them."""
    target = rewrite("target", tmp_path_factory.mktemp("models") / "experts", equal_experts)
    with engine(model=target) as llm:
        prompts = mixed_prompts(llm.get_tokenizer(), NUM_REQUESTS)
        return target, prompts, generate(llm, prompts[::5], limits(NUM_REQUESTS)[::5])


@pytest.mark.parametrize(
    "drafter",
    [
        pytest.param("dense", marks=pytest.mark.slow),
        pytest.param("experts", marks=pytest.mark.large),
    ],
)
def test_data_parallel_experts_never_wait_for_a_draft_pass(one_plain_rank, expert_drafter, drafter):
    """Two ranks step together through the experts, each with its own number of draft passes.

    Catches a draft pass that enters a collective of the data-parallel group: the ranks would hang.
    """
    target, prompts, expected = one_plain_rank
    method = {"method": "failfast", "model": str(MODELS_DIR / "drafter")}
    if drafter == "experts":
        method |= {"model": expert_drafter, "load_aware": False}
    answers, num_passes = asyncio.run(on_two_data_parallel_ranks(target, method, prompts))
    assert answers[::5] == expected
    assert [len(answer) > 0 for answer in answers] == [True] * NUM_REQUESTS
    assert num_passes > 0


async def on_two_data_parallel_ranks(target, method, prompts):
    from vllm.v1.engine.async_llm import AsyncLLM

    args = AsyncEngineArgs(
        model=target,
        dtype="float32",
        enforce_eager=True,
        max_model_len=2048,
        max_num_seqs=16,
        enable_prefix_caching=False,
        data_parallel_size=2,
        speculative_config=method,
        worker_extension_cls=EXTENSION,
    )
    llm = AsyncLLM.from_engine_args(args)

    async def answer(i, params):
        prompt = {"prompt_token_ids": prompts[i]}
        async for output in llm.generate(prompt, params, str(i)):
            last = output
        return list(last.outputs[0].token_ids)

    try:
        requests = [answer(i, params) for i, params in enumerate(limits(len(prompts)))]
        answers = await asyncio.wait_for(asyncio.gather(*requests), HANG_SECONDS)
        (num_passes,) = await llm.collective_rpc("num_draft_passes")  # the first rank's
        return answers, num_passes
    finally:
        llm.shutdown()


def a_config(num_ranks, num_drafter_ranks):
    drafter = types.SimpleNamespace(tensor_parallel_size=num_drafter_ranks)
    return types.SimpleNamespace(
        parallel_config=types.SimpleNamespace(
            tensor_parallel_size=num_ranks, data_parallel_size=2, is_moe_model=True
        ),
        speculative_config=types.SimpleNamespace(draft_parallel_config=drafter),
        compilation_config=types.SimpleNamespace(
            fast_moe_cold_start=False, static_forward_context={}
        ),
    )


@pytest.fixture
def groups(monkeypatch):
    """The target's group of two ranks, and the group of this rank alone."""
    shared, alone = (types.SimpleNamespace(world_size=n, rank_in_group=n - 1) for n in (2, 1))
    monkeypatch.setattr(parallel_state, "_TP", shared)
    monkeypatch.setattr(parallel_state, "_DP", shared)
    monkeypatch.setattr(parallel_state, "_EP", None)  # the target is dense
    monkeypatch.setattr(parallel_state, "_PP", alone)
    return shared, alone


def test_the_targets_group_is_back_after_a_failed_pass(groups):
    """Catches a target that sums over one rank only, from the first failed pass on."""
    shared, alone = groups

    def fail():
        with ranks.drafter_group(a_config(2, 1)):
            assert parallel_state.get_tp_group() is alone
            assert parallel_state.get_tensor_model_parallel_world_size() == 1
            raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        fail()
    assert parallel_state.get_tp_group() is shared


def test_a_shared_drafter_stays_in_the_targets_group(groups):
    shared, _ = groups
    with ranks.drafter_group(a_config(2, 2)):
        assert parallel_state.get_tp_group() is shared


def test_a_drafters_experts_are_spread_over_no_group(groups):
    """Catches layers cut over data-parallel ranks, and a group that dense targets lack."""
    shared, alone = groups
    with ranks.drafter_group(a_config(2, 2)):
        assert parallel_state.get_dp_group() is alone
        assert parallel_state.get_ep_group() is alone
    assert parallel_state.get_dp_group() is shared
    assert parallel_state._EP is None


def test_expert_parallelism_ends_at_the_target(expert_drafter, tmp_path):
    """Catches a drafter that inherits it; vLLM gives it to every drafter with experts."""
    target = rewrite("target", tmp_path / "experts", equal_experts)
    for num_ranks in (1, 2):
        given = {"model": expert_drafter}
        built = build(given, num_ranks, target, enable_expert_parallel=True)
        assert built.parallel_config.enable_expert_parallel
        assert num_drafter_ranks(built) == num_ranks
        assert not built.speculative_config.draft_parallel_config.enable_expert_parallel


def test_experts_of_a_drafter_are_not_balanced():
    """Catches vLLM's balancer (no CPU has it) on a drafter whose experts are all on each rank."""
    check_balancing(SDAR_MOE, "a-drafter", enable_eplb=False)
    check_balancing(SDAR, "a-drafter", enable_eplb=True)
    with pytest.raises(ValueError, match=r"\Afailfast: [^\n]*got --enable-eplb") as caught:
        check_balancing(SDAR_MOE, "a-drafter", enable_eplb=True)
    assert "'a-drafter'" in str(caught.value)
    assert "use a drafter without experts" in str(caught.value)


def test_no_draft_pass_asks_other_data_parallel_ranks(groups, monkeypatch):
    """Catches `set_forward_context`, which does where the target has experts."""

    def ask(*args, **kwargs):
        raise AssertionError("a collective of the data-parallel group")

    monkeypatch.setattr("vllm.forward_context.coordinate_batch_across_dp", ask)
    config = a_config(2, 1)
    with ranks.draft_context({}, config) as _:
        from vllm.forward_context import get_forward_context

        assert get_forward_context().dp_metadata is None


QWEN_1_5B = {  # the drafter of Qwen2.5 targets
    "num_attention_heads": 12,
    "num_key_value_heads": 2,
    "intermediate_size": 8960,
    "vocab_size": 151936,
}


@pytest.mark.parametrize(
    ("num_ranks", "problem"),
    [
        (1, None),
        (2, None),
        (4, None),
        (8, "'num_attention_heads': 12"),
        (3, "'num_key_value_heads': 2"),
        (6, "'intermediate_size': 8960"),
        (16, "'num_attention_heads': 12"),
    ],
)
def test_which_ranks_can_share_the_published_drafter(num_ranks, problem):
    """Catches a rule that divides too much: vLLM would stop in an assertion while loading."""
    assert checks.undivided_size(QWEN_1_5B, num_ranks) == problem


def test_experts_that_ranks_cannot_share():
    """Each expert is cut, so their number does not matter and their width does."""
    experts = {**QWEN_1_5B, "num_experts": 3, "moe_intermediate_size": 770}
    assert checks.undivided_size(experts, 2) is None
    assert checks.undivided_size(experts, 4) == "'moe_intermediate_size': 770"


def test_a_vocabulary_that_ranks_cannot_share():
    even = {**QWEN_1_5B, "num_key_value_heads": 12, "intermediate_size": 8961}
    assert checks.undivided_size(even, 3) == "'vocab_size': 151936"


def build(given, num_ranks=2, model=TARGET, **settings):
    asked = {"method": "failfast", **given}
    args = EngineArgs(
        model=model, speculative_config=asked, tensor_parallel_size=num_ranks, **settings
    )
    return args.create_engine_config()


def num_drafter_ranks(built):
    speculative = built.speculative_config
    assert speculative.draft_tensor_parallel_size == (
        speculative.draft_parallel_config.tensor_parallel_size
    )
    return speculative.draft_tensor_parallel_size


def test_a_drafter_is_shared_where_possible(shared_drafter, monkeypatch):
    lines = []
    monkeypatch.setattr(logger, "info", lambda text, *args: lines.append(text % args))
    assert num_drafter_ranks(build({"model": shared_drafter})) == 2
    assert num_drafter_ranks(build({}, num_ranks=1)) == 1
    assert not lines
    assert num_drafter_ranks(build({})) == 1
    assert lines == [
        "failfast: each of the 2 ranks holds the whole drafter, which they cannot share "
        "('num_attention_heads': 3)"
    ]


def test_the_drafters_rank_is_numbered_as_the_targets():
    """Catches ranks that write compiled code into one folder: with one rank each is rank 0."""
    built = build({})
    built.parallel_config.rank, built.parallel_config.data_parallel_index = 1, 3
    drafter = types.SimpleNamespace(parallel_config=built.speculative_config.draft_parallel_config)
    numbered = ranks.keep_apart(drafter, built).parallel_config
    assert (numbered.rank, numbered.data_parallel_index) == (1, 3)
    assert numbered.tensor_parallel_size == 1


class GroupWatchingModel:
    """Notes the tensor-parallel group of every call, and how many rows want logits."""

    def __init__(self):
        self.groups = []
        self.num_logits = []

    def __call__(self, input_ids, positions):
        self.groups.append(parallel_state.get_tp_group())
        return torch.zeros(input_ids.numel(), 4)

    def compute_logits(self, hidden_states):
        self.groups.append(parallel_state.get_tp_group())
        self.num_logits.append(hidden_states.shape[0])
        return hidden_states


def test_passes_run_in_the_drafters_group(groups):
    """Catches a profile, a pass or its logits that could wait for the other ranks."""
    shared, alone = groups
    config = a_config(2, 1)
    config.speculative_config.num_speculative_tokens = 5
    config.speculative_config.draft_model_config = types.SimpleNamespace(
        hf_config=types.SimpleNamespace(max_position_embeddings=64)
    )
    config.model_config = types.SimpleNamespace(max_model_len=32)
    config.scheduler_config = types.SimpleNamespace(max_num_seqs=3, max_num_batched_tokens=64)
    config.additional_config = {
        "failfast": {
            "draft_budget": 12,
            "num_draftable_tokens": 4,
            "mask_token_id": 3,
            "diffusion_block_size": 32,
            "draft_increment": 10,
        }
    }
    config.use_v2_model_runner = False
    model = GroupWatchingModel()
    hosted.profile_pass(model, config, 40, torch.device("cpu"))
    assert model.num_logits == [15]

    model_in_vllm = hosted.HostedDraftModel(model, config, ["layer"], 1, torch.device("cpu"))
    rows, ends = torch.arange(2), torch.tensor([0, 2])
    batch = DraftBatch(
        input_ids=rows,
        positions=rows,
        query_start_loc=ends,
        committed_lens=torch.zeros(1, dtype=torch.int64),
        slot_mapping=None,
        block_table=torch.zeros(1, 1, dtype=torch.int32),
    )
    model_in_vllm.confidence(model_in_vllm.forward(batch))
    assert model.groups == [alone] * 4
    assert parallel_state.get_tp_group() is shared
