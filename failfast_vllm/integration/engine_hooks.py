"""Hooks of front ends, engines and workers: metrics, scheduler, KV connectors, start and end."""

import functools
from typing import Any

from failfast_vllm.drafters.families import FAMILIES
from failfast_vllm.integration.hooks import asked_for, hook, install, logger, stage_problem

SCHEDULER = "vllm.v1.core.sched.scheduler:Scheduler"
COPY_PROPOSER = "failfast_vllm.integration.v1.CopyProposer"
NO_REST = (0, 0.0)  # see `Session`
CONNECTORS = "vllm.distributed.kv_transfer.kv_connector.factory:KVConnectorFactory"


def install_metrics() -> None:
    """Carry the worker's counts to the API server; without them only metrics are missing."""
    if problem := stage_problem("metrics"):
        logger.warning("failfast shows no metrics: %s", problem)
    else:
        install("metrics")


@hook("engine", f"{SCHEDULER}.update_draft_token_ids")
def hear_the_worker(original: Any, self: Any, draft_token_ids: Any) -> Any:
    """Reads what a worker sends with its drafts: its counts, and how long it rests.

    And makes room for copies in the next step where they are found on the device.

    Goes when: vLLM schedules ahead for drafts whose lengths only the worker knows.
    """
    counts = getattr(draft_token_ids, "failfast_counts", None)
    self.failfast_rest = getattr(draft_token_ids, "failfast_rest", None) or NO_REST
    if counts and self.log_stats:  # else nobody would ever fetch them
        waiting = getattr(self, "failfast_counts", None) or [0] * len(counts)
        self.failfast_counts = [a + b for a, b in zip(waiting, counts, strict=True)]
    ahead, went_ahead = getattr(draft_token_ids, "failfast_ahead", None), _goes_ahead(self)
    self.failfast_ahead = ahead is not None
    if self.failfast_ahead or went_ahead:
        for request in self.running:
            reads = request.is_prefill_chunk  # its prompt, after which no copy was found
            length = 0 if reads else (ahead or {}).get(request.request_id, 0)
            request.spec_token_ids = [-1] * length
    return original()


@hook("metrics", f"{SCHEDULER}.make_stats")
def send_counts(original: Any, self: Any, spec_decoding_stats: Any = None) -> Any:
    """Sends a worker's counts to the API server along with vLLM's own statistics.

    Goes when: vLLM carries statistics of the drafter from workers to the API server.
    """
    if spec_decoding_stats is not None and getattr(self, "failfast_counts", None):
        spec_decoding_stats.num_draft_tokens_per_pos.extend(self.failfast_counts)
        self.failfast_counts = []
    return original()


@hook("metrics", "vllm.v1.engine.async_llm:AsyncLLM.__init__")
def add_stat_logger(
    original: Any, self: Any, vllm_config: Any, executor_class: Any, log_stats: bool
) -> None:
    """Adds our stat logger to an engine that was asked for failfast.

    Goes when: a stat logger loaded by entry point no longer switches statistics on by itself.
    """
    if not asked_for(vllm_config) or not log_stats or len(original.args) > 8:
        original()
        return
    from failfast_vllm.integration.metrics import FailFastStatLogger

    theirs = original.keywords.get("stat_loggers") or ()
    original(stat_loggers=[*theirs, FailFastStatLogger])


@hook("engine", f"{SCHEDULER}.__init__")
def pad_no_new_requests(original: Any, self: Any, vllm_config: Any) -> None:
    """Keeps the scheduler from scheduling placeholders for drafts that nobody has made.

    vLLM pads a new request with one token left by a whole draft, unless drafts have a length by
    batch size. So ours have one: the same for all sizes.

    Goes when: vLLM pads no request that has no draft.
    """
    original()
    if asked_for(vllm_config):
        max_num_seqs = vllm_config.scheduler_config.max_num_seqs
        self.dynamic_sd_lookup = [self.num_spec_tokens] * (max_num_seqs + 1)


@hook("engine", "vllm.v1.core.sched.async_scheduler:AsyncScheduler._update_after_schedule")
def expect_no_drafts(original: Any, self: Any, scheduler_output: Any) -> None:
    """Keeps the asynchronous scheduler from counting on drafts before the worker reports them.

    Goes when: vLLM schedules ahead for drafts whose lengths only the worker knows.
    """
    original()
    if asked_for(self.vllm_config):
        for req_id in scheduler_output.num_scheduled_tokens:
            self.requests[req_id].spec_token_ids = []


@hook("engine", "vllm.v1.engine.core:EngineCore.step_with_batch_queue")
def schedule_ahead(original: Any, self: Any) -> Any:
    """Lets vLLM schedule ahead while the planner rests, or copies are found on the device.

    Lengths of drafts decide what is scheduled, so any other step that may draft waits for the one
    before: what was scheduled ahead is finished, as if no request were left to schedule. Then vLLM
    steps as it does without a queue, and asks for drafts behind the step.

    Goes when: vLLM schedules ahead for drafts whose lengths only the worker knows.
    """
    if not asked_for(self.vllm_config):
        return original()
    scheduler = self.scheduler
    rests = _rests(scheduler)
    if not rests and _goes_ahead(scheduler):
        scheduler.update_draft_token_ids(self.model_executor.take_draft_token_ids())
        rests = _rests(scheduler)
    # vLLM's own names for: whether to ask the worker for drafts
    self.async_scheduling, self.check_for_draft_tokens = rests, not rests
    if rests:
        return original()
    if not self.batch_queue:
        return self.step()
    scheduler.has_requests = lambda: False
    try:
        outputs, _ = original()
    finally:
        del scheduler.has_requests
    return outputs, True


@hook("engine", "vllm.v1.engine.core:EngineCore.post_step")
def let_it_rest(original: Any, self: Any, model_executed: bool) -> None:
    """Asks no worker for drafts while the planner rests; an asynchronous engine asks none anyway.

    Goes when: vLLM lets a worker say that it will have no drafts for a while.
    """
    waits = model_executed and asked_for(self.vllm_config) and not self.async_scheduling
    if not (waits and _rests(self.scheduler, 1)):
        original()


def _goes_ahead(scheduler: Any) -> bool:
    """Whether copies are scheduled ahead; the worker then chooses lengths before each step."""
    return bool(getattr(scheduler, "failfast_ahead", False))


def _rests(scheduler: Any, num_looking: int = 0) -> bool:
    """Counts a step of the planner's rest; returns whether it is one.

    Args:
        num_looking: of the rest's last steps, those that are none: drafts are asked for.
    """
    steps, fewest = getattr(scheduler, "failfast_rest", NO_REST)
    if steps <= num_looking or len(scheduler.running) < fewest:
        scheduler.failfast_rest = NO_REST
        return False
    scheduler.failfast_rest = steps - 1, fewest
    return True


@hook("engine", f"{CONNECTORS}.create_connector")
def connect_the_target(original: Any, config: Any, role: Any, kv_cache_config: Any) -> Any:
    """Lets KV connectors move the target's layers only.

    Goes when: vLLM can leave a drafter's layers out of transfers.
    """
    if not asked_for(config):
        return original()
    from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorRole

    from failfast_vllm.integration import kv_transfer

    connector = original.func(config, role, kv_transfer.targets_only(kv_cache_config))
    if role is KVConnectorRole.WORKER:
        kv_transfer.hide_drafter(connector)
    return connector


@hook("worker", "vllm.v1.worker.worker_base:WorkerBase.__init__")
def prepare_worker(original: Any, self: Any, vllm_config: Any) -> None:
    """Installs the hooks of the model runner, and wraps the worker's start-up and shutdown.

    Runner hooks import CUDA libraries, so they wait for a worker process that needs them.

    Goes when: vLLM lets plugins register speculative methods, with a start-up of their own.
    """
    if not asked_for(vllm_config):
        original()
        return
    register_model()
    install("engine")
    is_v2, speculative = vllm_config.use_v2_model_runner, vllm_config.speculative_config
    install("v2" if is_v2 else "v1")
    if speculative.method == "ngram" and not is_v2:  # without a drafter; V1 builds what is named
        speculative.method, speculative.model = "custom_class", COPY_PROPOSER
    original()
    for function, ours in (("compile_or_warm_up_model", _warm_up), ("shutdown", _shut_down)):
        setattr(self, function, functools.partial(ours, self, getattr(self, function)))


def register_model() -> None:
    """Make the drafters' configs and architectures known to vLLM."""
    from vllm.model_executor.models.registry import ModelRegistry
    from vllm.transformers_utils.config import _CONFIG_REGISTRY

    from failfast_vllm.drafters.hf_config import CONFIGS

    known = ModelRegistry.get_supported_archs()
    for name in (family.architecture for family in FAMILIES):
        if name not in known:
            ModelRegistry.register_model(name, f"failfast_vllm.drafters.model:{name}")
    for model_type, config in CONFIGS.items():
        _CONFIG_REGISTRY.setdefault(model_type, config)


def _warm_up(worker: Any, original: Any, *args: Any, **kwargs: Any) -> Any:
    from failfast_vllm.integration.session import adapter_of
    from failfast_vllm.integration.startup import start_serving

    adapter, activate = adapter_of(worker.model_runner), worker._maybe_activate_jit_monitor
    drafter = adapter.drafter
    drafter.model.warm_up_kernels()
    drafter.copies.warm_up()
    postponed: list[Any] = []  # vLLM's monitor of compilation: it waits for our start-up
    worker._maybe_activate_jit_monitor = lambda: postponed.append(activate)
    result = original(*args, **kwargs)
    start_serving(adapter, worker.model_runner)
    worker._maybe_activate_jit_monitor = activate
    for activation in postponed:
        activation()
    return result


def _shut_down(worker: Any, original: Any) -> None:
    from failfast_vllm.integration.session import adapter_of

    adapter = adapter_of(getattr(worker, "model_runner", None))  # none: start-up failed
    if adapter is not None and adapter.stats.trace is not None:
        adapter.stats.trace.close()  # rounds that wait for the disk are written
    original()
