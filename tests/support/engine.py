"""Start an in-process engine on the shipped pair and watch what its drafter does."""

import atexit
import contextlib
import gc
import json
import sys
from dataclasses import dataclass, field
from typing import NamedTuple

import pytest

from failfast_vllm.config import METHOD, MODELS_DIR, FailFastConfig
from failfast_vllm.drafting.interfaces import Planner
from failfast_vllm.policies.table import make_policy
from failfast_vllm.tools import offline

TARGET = str(MODELS_DIR / "target")
NUM_SLOTS = 2**15  # of the KV cache: a quarter of what vLLM would fill with zeros
unfreeze = gc.unfreeze
atexit.register(unfreeze)  # else libraries report what is never collected
num_modules = 0  # when kernels were last replaced


@contextlib.contextmanager
def quick_start():
    """Leave out what vLLM repeats for each engine of a process: 3 of 4 seconds of a start.

    It collects garbage ten times, each over all objects of torch and vLLM, since it freezes what is
    there while an engine runs and thaws it at its end; and it looks for kernels to replace in all
    modules.
    """
    from vllm.platforms import current_platform

    unfreeze()
    gc.collect()  # earlier engines, too
    gc.freeze()
    platform = type(current_platform)
    replace_kernels = platform.register_triton_kernel_overrides

    def replace_kernels_of_new_modules():
        global num_modules
        if len(sys.modules) != num_modules:
            replace_kernels()
            num_modules = len(sys.modules)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gc, "unfreeze", lambda: None)
        replace = staticmethod(replace_kernels_of_new_modules)
        patch.setattr(platform, "register_triton_kernel_overrides", replace)
        yield


@contextlib.contextmanager
def engine(speculative_config=None, **overrides):
    """A `vllm.LLM` in this process, float32 and eager unless overridden.

    Drafts do not follow the load unless asked to: they would depend on times.
    """
    if speculative_config == METHOD:
        speculative_config = {"method": METHOD}
    if speculative_config and speculative_config["method"] == METHOD:
        speculative_config = {"load_aware": False, **speculative_config}
    settings = {
        "dtype": "float32",
        "enforce_eager": True,
        "max_num_seqs": 16,
        "disable_log_stats": False,
        "num_gpu_blocks_override": NUM_SLOTS // overrides.get("block_size", 128),
        **overrides,
    }
    with quick_start(), offline.engine(speculative_config, **settings) as llm:
        yield llm


def core(llm):
    return llm.llm_engine.engine_core.engine_core


def proposer(llm):
    """The adapter of the only rank, which must be in this process."""
    return offline.adapter(llm)


def lower_max_model_len(llm, max_model_len):
    """As vLLM does once it knows how much KV cache there is (auto-fit); returns the runner's."""
    llm.collective_rpc("update_max_model_len", args=(max_model_len,))
    runner = core(llm).model_executor.driver_worker.worker.model_runner
    assert runner.max_model_len == max_model_len
    return runner.max_model_len


class Proposal(NamedTuple):
    """One draft, with what it was made from."""

    known: list[int]
    max_draft: int
    draft: list[int]
    num_passes: int


@dataclass
class Watch:
    """Everything that the drafter did while it was watched."""

    draft_lens: list[list[int]] = field(default_factory=list)  # per step, per request
    rounds: list = field(default_factory=list)  # verified drafts
    proposals: list[Proposal] = field(default_factory=list)

    @property
    def num_drafted(self):
        return sum(len(r.drafted) for r in self.rounds)

    @property
    def num_accepted(self):
        return sum(len(r.emitted) - 1 for r in self.rounds if r.drafted)

    def assert_not_vacuous(self):
        """Drafts were proposed and accepted, with three lengths within one step."""
        assert self.num_drafted > 0
        assert self.num_accepted > 0
        assert max(len(set(lens)) for lens in self.draft_lens) >= 3


@contextlib.contextmanager
def watch(llm):
    """Record the steps and rounds of an engine with failfast."""
    adapter = proposer(llm)
    propose = adapter.drafter.propose
    try:
        yield start_watching(adapter)
    finally:
        adapter.drafter.propose = propose
        adapter.stats.on_round = None


def start_watching(adapter):
    """Record the steps and rounds of one rank from now on."""
    propose = adapter.drafter.propose
    record = Watch()

    def recording_propose(step):
        drafts = propose(step)
        lists = drafts.to_lists()
        for i, max_draft in enumerate(step.max_draft_lens.tolist()):
            if max_draft:
                known = step.token_ids[step.slots[i], : step.known_lens[i]].tolist()
                record.proposals.append(
                    Proposal(known, max_draft, lists[i], int(drafts.num_passes[i]))
                )
        record.draft_lens.append(drafts.lens.tolist())
        return drafts

    adapter.drafter.propose = recording_propose
    adapter.stats.on_round = record.rounds.append
    return record


@contextlib.contextmanager
def scheduled_drafts(llm):
    """Yields the drafts that the scheduler lets the target verify, by step."""
    scheduler = core(llm).scheduler
    schedule, steps = scheduler.schedule, []

    def recording_schedule(*args, **kwargs):
        output = schedule(*args, **kwargs)
        steps.append(dict(output.scheduled_spec_decode_tokens))
        return output

    scheduler.schedule = recording_schedule
    try:
        yield steps
    finally:
        scheduler.schedule = schedule


@contextlib.contextmanager
def only_drafts_are_verified(llm):
    """Whatever the target verifies and vLLM counts, a drafter has drafted; yields the watch."""
    with watch(llm) as record, scheduled_drafts(llm) as steps:
        before = num_draft_tokens(llm)
        yield record
    verified = [ids for step in steps for ids in step.values()]
    assert sum(map(len, verified)) == record.num_drafted > 0
    assert num_draft_tokens(llm) - before == record.num_drafted


def whole_pages_and_a_token(tokenizer, page, count):
    """Prompts of which a second run finds all but the last token in the prefix cache."""
    text = [i for prompt in mixed_prompts(tokenizer, 60) for i in prompt]
    return [text[37 * i : 37 * i + (1 + i % 2) * page + 1] for i in range(count)]


def count_preemptions(llm):
    """The ids of requests that the scheduler preempts from now on."""
    scheduler, preempted = core(llm).scheduler, []
    preempt = scheduler._preempt_request

    def counting_preempt(request, *args, **kwargs):
        preempted.append(request.request_id)
        return preempt(request, *args, **kwargs)

    scheduler._preempt_request = counting_preempt
    return preempted


def num_draft_tokens(llm):
    """As `/metrics` has it, over all engines of this process."""
    metrics = {metric.name: metric for metric in llm.get_metrics()}
    return metrics["vllm:spec_decode_num_draft_tokens"].value


@contextlib.contextmanager
def policy(llm, name, **given):
    """Exchange the policy of a running engine."""
    from failfast_vllm.integration.session import Session

    knobs = FailFastConfig.from_user({"policy": name, **given}).to_dict()
    own = proposer(llm)
    drafter = own.drafter
    before = {"policy": drafter.policy, "planner": drafter.planner}
    session = own.session
    drafter.planner = Planner(knobs["draft_increment"])
    drafter.policy = make_policy(knobs)
    own.session = Session(drafter, own.stats, own.eos_token_ids)
    try:
        yield drafter.policy
    finally:
        vars(drafter).update(before)
        own.session = session


def shipped_prompts():
    """The held-out prompts as chat messages, with their answers."""
    lines = (MODELS_DIR / "prompts.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def chat_ids(tokenizer, prompt):
    return offline.encode(tokenizer, prompt)["prompt_token_ids"]


def generate(llm, prompts, params, lora=None):
    """Token ids of the answers to token-id prompts, all submitted at once."""
    requests = [{"prompt_token_ids": list(ids)} for ids in prompts]
    outputs = llm.generate(requests, params, use_tqdm=False, lora_request=lora)
    return [list(output.outputs[0].token_ids) for output in outputs]


def mixed_prompts(tokenizer, count):
    """`count` prompts: real questions, and cuts of a long text around multiples of 32."""
    questions = [chat_ids(tokenizer, prompt) for prompt in shipped_prompts()]
    text = [i for ids in questions for i in ids]
    near = [n + d for n in (32, 64, 96, 128, 256, 512, 1024) for d in (-1, 0, 1)]
    lengths = [1, 2, 3, 5, 10, 15, 16, 17, 30, 200, 300, 400, 700, 1200, 1500, *near]
    prompts = []
    for i in range(count):
        if i % 2:
            length, offset = lengths[i // 2 % len(lengths)], i * 131 % (len(text) - 1600)
            prompts.append(text[offset : offset + length])
        else:
            prompts.append(questions[i // 2 % len(questions)])
    return prompts


def around_the_drafters_end(prompts, num_positions):
    """Prompts that begin behind the drafter's last position, before it, and far before it."""
    behind = [p for p in prompts if num_positions <= len(p) <= 300][:2]
    before = [p[: num_positions - n] for p, n in zip(behind, (30, 50), strict=True)]
    return behind + before + [p for p in prompts if len(p) < 60][:2]


def assert_drafts_end_there(record, num_positions):
    """Drafts came close to the drafter's end, none went past it, and others were made meanwhile."""
    drafted = [p for p in record.proposals if p.draft]
    ends = [len(p.known) + len(p.draft) for p in drafted]
    assert num_positions - 10 < max(ends) < num_positions
    assert all(len(r.drafted) == 0 for r in record.rounds if r.known_len >= num_positions)
    assert record.num_accepted > 0


def greedy_params(prompts, most=96):
    """Greedy, with output limits from 1 to `most` tokens: requests end in different steps."""
    from vllm import SamplingParams

    return [
        SamplingParams(temperature=0.0, max_tokens=1 + i * 37 % most) for i in range(len(prompts))
    ]
