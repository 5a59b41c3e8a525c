"""The doorway into vLLM: small hooks that fall through unless failfast was asked for.

`register` runs in every vLLM process and must be cheap, so it hooks only what an argument parser
and a configuration need. What a model runner needs is hooked by the worker that serves failfast.
docs/architecture.md lists the hooks; `failfast doctor` checks them.
"""

import contextlib
import copy
import functools
import importlib
import importlib.metadata
import inspect
import logging
import os
import re
import sys
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from failfast_vllm import config as user_config
from failfast_vllm.config import METHOD, FailFastConfig
from failfast_vllm.drafters import checks
from failfast_vllm.drafters.families import FAMILIES, MAX_DIFFUSION_BLOCK_SIZE, Family, family_of
from failfast_vllm.integration import requests as request

logger = logging.getLogger("vllm.failfast")  # vLLM's handlers and format

ENGINE_MODULE = "vllm.v1.engine.core"
VOCABULARIES = ("tokenizer.json", "vocab.json")
SUPPORTED_VLLM = ((0, 32), (0, 33))


class Hook(NamedTuple):
    """A function of vLLM that we wrap, and the parameters that we rely on."""

    module: str
    owner: str  # a class, or empty
    function: str
    parameters: tuple[str, ...]
    since: tuple[int, int] = SUPPORTED_VLLM[0]  # older versions lack it, and do not need the hook

    @property
    def name(self) -> str:
        return ".".join(part for part in self[:3] if part)


CONFIG_HOOKS = (
    Hook(
        "vllm.engine.arg_utils",
        "EngineArgs",
        "create_speculative_config",
        ("self", "target_model_config", "target_parallel_config"),
    ),
    Hook("vllm.engine.arg_utils", "EngineArgs", "add_cli_args", ("parser",)),
    Hook(
        "vllm.engine.arg_utils",
        "EngineArgs",
        "_set_default_max_num_seqs_and_batched_tokens_args",
        ("self", "usage_context", "model_config", "parallel_config"),
    ),
    Hook(
        "vllm.config.speculative",
        "SpeculativeConfig",
        "verify_equal_vocab_size_if_draft_model",
        ("self",),
    ),
    Hook(
        "vllm.config.vllm",
        "VllmConfig",
        "_limit_max_model_len_to_draft",
        ("self",),
        since=(0, 33),
    ),
)
REQUEST_HOOKS = (
    Hook(
        "vllm.v1.engine.input_processor",
        "InputProcessor",
        "_validate_params",
        ("self", "params", "supported_tasks"),
    ),
    Hook(
        "vllm.sampling_params",
        "SamplingParams",
        "_validate_spec_decode",
        ("self", "speculative_config"),
    ),
)
METRICS_HOOKS = (
    Hook(
        "vllm.v1.core.sched.scheduler",
        "Scheduler",
        "update_draft_token_ids",
        ("self", "draft_token_ids"),
    ),
    Hook(
        "vllm.v1.core.sched.scheduler", "Scheduler", "make_stats", ("self", "spec_decoding_stats")
    ),
    Hook(
        "vllm.v1.engine.async_llm",
        "AsyncLLM",
        "__init__",
        ("self", "vllm_config", "executor_class", "log_stats"),
    ),
)
ENGINE_HOOKS = (
    Hook("vllm.v1.core.sched.scheduler", "Scheduler", "__init__", ("self", "vllm_config")),
    Hook(
        "vllm.distributed.kv_transfer.kv_connector.factory",
        "KVConnectorFactory",
        "create_connector",
        ("config", "role", "kv_cache_config"),
    ),
)
WORKER_HOOK = Hook("vllm.v1.worker.worker_base", "WorkerBase", "__init__", ("self", "vllm_config"))
V1_HOOKS = (
    Hook(
        "vllm.v1.spec_decode.draft_model",
        "DraftModelProposer",
        "__init__",
        ("self", "vllm_config", "device", "runner"),
    ),
    Hook(
        "vllm.v1.worker.gpu_model_runner",
        "GPUModelRunner",
        "_input_fits_in_drafter",
        ("self", "common_attn_metadata"),
    ),
    Hook(
        "vllm.v1.worker.gpu_model_runner",
        "GPUModelRunner",
        "propose_draft_token_ids",
        (
            "self",
            "scheduler_output",
            "sampled_token_ids",
            "sampling_metadata",
            "hidden_states",
            "sample_hidden_states",
            "aux_hidden_states",
            "spec_decode_metadata",
            "common_attn_metadata",
            "slot_mappings",
        ),
    ),
    Hook(
        "vllm.v1.worker.gpu_model_runner",
        "GPUModelRunner",
        "_update_states",
        ("self", "scheduler_output"),
    ),
    Hook("vllm.v1.worker.gpu_model_runner", "GPUModelRunner", "take_draft_token_ids", ("self",)),
    Hook(
        "vllm.v1.worker.gpu_model_runner",
        "GPUModelRunner",
        "_sample",
        ("self", "logits", "spec_decode_metadata"),
    ),
    Hook(
        "vllm.v1.sample.rejection_sampler",
        "",
        "expand_batch_to_tokens",
        ("x", "cu_num_tokens", "num_tokens", "replace_from", "replace_to"),
    ),
    Hook(
        "vllm.v1.worker.gpu_model_runner",
        "",
        "build_logitsprocs",
        ("vllm_config", "device", "is_pin_memory", "is_pooling_model", "custom_logitsprocs"),
    ),
)
V2_HOOKS = (
    Hook(
        "vllm.v1.worker.gpu.model_runner",
        "",
        "init_speculator",
        ("vllm_config", "device", "req_states"),
    ),
    Hook(
        "vllm.v1.worker.gpu.model_runner",
        "GPUModelRunner",
        "initialize_kv_cache",
        ("self", "kv_cache_config"),
    ),
    Hook("vllm.v1.worker.gpu.model_runner", "GPUModelRunner", "take_draft_token_ids", ("self",)),
    Hook(
        "vllm.v1.worker.gpu.model_runner",
        "GPUModelRunner",
        "finish_requests",
        ("self", "scheduler_output"),
    ),
    Hook(
        "vllm.v1.worker.gpu.model_runner",
        "GPUModelRunner",
        "add_requests",
        ("self", "scheduler_output"),
    ),
)
ALL_HOOKS = (
    *CONFIG_HOOKS,
    *REQUEST_HOOKS,
    *METRICS_HOOKS,
    *ENGINE_HOOKS,
    WORKER_HOOK,
    *V1_HOOKS,
    *V2_HOOKS,
)


def register() -> None:
    """Entry point of the group `vllm.general_plugins`. Idempotent; never raises."""
    problem = version_problem() or missing_hooks(CONFIG_HOOKS)
    if problem:
        logger.warning("failfast is off: %s", problem)
    _install_config_hooks(problem)


def asked_for(vllm_config: Any) -> bool:
    """Whether this engine was configured with failfast."""
    return METHOD in (vllm_config.additional_config or {})


def vllm_version() -> str:
    """Of the vLLM that is installed."""
    try:
        return importlib.metadata.version("vllm")
    except importlib.metadata.PackageNotFoundError:
        import vllm

        version: str = vllm.__version__
        return version


def minor(version: str) -> tuple[int, int] | None:
    """`0.33.0+cpu` -> (0, 33); None where there are no such numbers."""
    found = re.match(r"(\d+)\.(\d+)", version)
    return (int(found[1]), int(found[2])) if found else None


def version_problem() -> str | None:
    """Why this vLLM version is not supported, or None."""
    version = vllm_version()
    if minor(version) in SUPPORTED_VLLM:
        return None
    return f"vLLM {version} is not supported; install a version of 'vllm>=0.32,<0.34'."


def missing_hooks(hooks: tuple[Hook, ...]) -> str | None:
    """What of `hooks` this vLLM lacks or has changed, or None."""
    for hook in hooks:
        problem = hook_problem(hook)
        if problem:
            return f"{problem}; install a version of 'vllm>=0.32,<0.34'."
    return None


def is_due(hook: Hook) -> bool:
    """Whether this vLLM is new enough to need the hook."""
    version = minor(vllm_version())
    return version is None or version >= hook.since


def hooked(hook: Hook) -> Any:
    """vLLM's own function, also where we have wrapped it; ImportError, AttributeError: none."""
    module = importlib.import_module(hook.module)
    owner = getattr(module, hook.owner) if hook.owner else module
    return inspect.unwrap(getattr(owner, hook.function))


def hook_problem(hook: Hook) -> str | None:
    """Why one hook cannot be installed, or None."""
    if not is_due(hook):
        return None
    try:
        function = hooked(hook)
    except (ImportError, AttributeError):
        return f"vLLM has no {hook.name}"
    found = tuple(inspect.signature(function).parameters)[: len(hook.parameters)]
    if found != hook.parameters:
        return f"{hook.name} takes ({', '.join(found)}), not ({', '.join(hook.parameters)})"
    return None


def _wrap(owner: Any, name: str, make: Callable[[Any], Any]) -> None:
    """Replace `owner.name` by `make(original)`, once per process."""
    original = getattr(owner, name)
    if getattr(original, "_failfast", False):
        return
    wrapper: Any = functools.wraps(original)(make(original))
    wrapper._failfast = True
    # `original` of a class method is bound already
    is_static = isinstance(inspect.getattr_static(owner, name), staticmethod | classmethod)
    setattr(owner, name, staticmethod(wrapper) if is_static else wrapper)


def _install_config_hooks(problem: str | None) -> None:
    from vllm.engine.arg_utils import EngineArgs

    if problem:

        def refuse(original: Any) -> Any:
            def create_speculative_config(self: Any, *args: Any, **kwargs: Any) -> Any:
                if user_config.parse(self.speculative_config) is not None:
                    raise ValueError(f"failfast: this vLLM cannot run it: {problem}")
                return original(self, *args, **kwargs)

            return create_speculative_config

        if hasattr(EngineArgs, "create_speculative_config"):
            _wrap(EngineArgs, "create_speculative_config", refuse)
        if hasattr(EngineArgs, "add_cli_args"):  # so that the bare word meets the refusal
            _wrap(EngineArgs, "add_cli_args", _adding_cli_args)
        return

    from vllm.config import VllmConfig
    from vllm.config.speculative import SpeculativeConfig

    _wrap(EngineArgs, "create_speculative_config", _creating_speculative_config)
    _wrap(EngineArgs, "add_cli_args", _adding_cli_args)
    _wrap(
        EngineArgs,
        "_set_default_max_num_seqs_and_batched_tokens_args",
        _setting_batch_defaults,
    )
    _wrap(SpeculativeConfig, "verify_equal_vocab_size_if_draft_model", _verifying_vocab_sizes)
    if hasattr(VllmConfig, "_limit_max_model_len_to_draft"):  # 0.32 has none
        _wrap(VllmConfig, "_limit_max_model_len_to_draft", _limiting_max_model_len)
    if WORKER_HOOK.module in sys.modules:  # an engine or worker process, whose config is pickled
        _install_worker_hook()
    if REQUEST_HOOKS[0].module in sys.modules and not missing_hooks(REQUEST_HOOKS):
        _install_request_hooks()  # a front end that may be handed a pickled config
    if ENGINE_MODULE in sys.modules:
        _install_metrics_hooks()  # an engine's process, or a front end
        if not missing_hooks(ENGINE_HOOKS):
            _install_engine_hooks()


def _install_worker_hook() -> None:
    """Apart from the others: importing WorkerBase takes a second. Raises RuntimeError."""
    problem = missing_hooks((WORKER_HOOK,))
    if problem:
        raise RuntimeError(f"failfast cannot run: {problem}")
    from vllm.v1.worker.worker_base import WorkerBase

    _wrap(WorkerBase, "__init__", _initializing_worker)


def _install_request_hooks() -> None:
    """What admits requests in the front end. Raises RuntimeError."""
    problem = missing_hooks(REQUEST_HOOKS)
    if problem:
        raise RuntimeError(f"failfast cannot run: {problem}")
    from vllm.sampling_params import SamplingParams
    from vllm.v1.engine.input_processor import InputProcessor

    _wrap(InputProcessor, "_validate_params", _validating_params)
    _wrap(SamplingParams, "_validate_spec_decode", _validating_spec_decode)


def _install_engine_hooks() -> None:
    """What makes the scheduler, and its and the workers' KV connectors. Raises RuntimeError."""
    problem = missing_hooks(ENGINE_HOOKS)
    if problem:
        raise RuntimeError(f"failfast cannot run: {problem}")
    from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory
    from vllm.v1.core.sched.scheduler import Scheduler

    _wrap(Scheduler, "__init__", _initializing_scheduler)
    _wrap(KVConnectorFactory, "create_connector", _creating_connector)


def _initializing_scheduler(original: Any) -> Any:
    """vLLM pads a new request with one token left to compute by as many placeholders as a draft
    may have, unless drafts have a length by batch size. So ours have one: the same for all sizes.
    """

    def __init__(self: Any, vllm_config: Any, *args: Any, **more: Any) -> None:  # noqa: N807
        original(self, vllm_config, *args, **more)
        if asked_for(vllm_config):
            max_num_seqs = vllm_config.scheduler_config.max_num_seqs
            self.dynamic_sd_lookup = [self.num_spec_tokens] * (max_num_seqs + 1)

    return __init__


def _creating_connector(original: Any) -> Any:
    """Connectors move the target's layers only: see `kv_transfer`."""

    def create_connector(config: Any, role: Any, kv_cache_config: Any) -> Any:
        if not asked_for(config):
            return original(config, role, kv_cache_config)
        from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorRole

        from failfast_vllm.integration import kv_transfer

        connector = original(config, role, kv_transfer.targets_only(kv_cache_config))
        if role is KVConnectorRole.WORKER:
            kv_transfer.hide_drafter(connector)
        return connector

    return create_connector


def _install_metrics_hooks() -> None:
    """Carry the worker's counts to the API server; without them only metrics are missing."""
    problem = missing_hooks(METRICS_HOOKS)
    if problem:
        logger.warning("failfast shows no metrics: %s", problem)
        return
    from vllm.v1.core.sched.scheduler import Scheduler
    from vllm.v1.engine.async_llm import AsyncLLM

    def updating_drafts(original: Any) -> Any:
        def update_draft_token_ids(self: Any, draft_token_ids: Any, *args: Any) -> Any:
            counts = getattr(draft_token_ids, "failfast_counts", None)
            if counts and self.log_stats:  # else nobody would ever fetch them
                waiting = getattr(self, "failfast_counts", None) or [0] * len(counts)
                self.failfast_counts = [a + b for a, b in zip(waiting, counts, strict=True)]
            return original(self, draft_token_ids, *args)

        return update_draft_token_ids

    def making_stats(original: Any) -> Any:
        def make_stats(self: Any, spec_decoding_stats: Any = None, *args: Any, **more: Any) -> Any:
            if spec_decoding_stats is not None and getattr(self, "failfast_counts", None):
                spec_decoding_stats.num_draft_tokens_per_pos.extend(self.failfast_counts)
                self.failfast_counts = []
            return original(self, spec_decoding_stats, *args, **more)

        return make_stats

    def initializing_front_end(original: Any) -> Any:
        def __init__(  # noqa: N807
            self: Any,
            vllm_config: Any,
            executor_class: Any,
            log_stats: bool,
            *args: Any,
            **more: Any,
        ) -> None:
            if asked_for(vllm_config) and log_stats and len(args) < 5:
                from failfast_vllm.integration.metrics import FailFastStatLogger

                more["stat_loggers"] = [*(more.get("stat_loggers") or ()), FailFastStatLogger]
            original(self, vllm_config, executor_class, log_stats, *args, **more)

        return __init__

    _wrap(Scheduler, "update_draft_token_ids", updating_drafts)
    _wrap(Scheduler, "make_stats", making_stats)
    _wrap(AsyncLLM, "__init__", initializing_front_end)


def _validating_params(original: Any) -> Any:
    """A request's own failfast keys: refused here, they are the client's error."""
    from vllm.exceptions import VLLMValidationError

    class RequestError(VLLMValidationError, ValueError):
        """HTTP 400 on a server, which answers a mere ValueError with 500."""

    def _validate_params(self: Any, params: Any, supported_tasks: Any) -> Any:
        if asked_for(self.vllm_config):
            knobs = self.vllm_config.additional_config[METHOD]
            try:
                request.check(
                    params, knobs["num_speculative_tokens"], knobs.get("confidence_threshold", 0.0)
                )
            except ValueError as error:
                raise RequestError(str(error)) from None
        return original(self, params, supported_tasks)

    return _validate_params


def _validating_spec_decode(original: Any) -> Any:
    """vLLM refuses min_p and logit_bias beside any drafter; ours leaves such requests undrafted."""

    def _validate_spec_decode(self: Any, speculative_config: Any) -> None:
        drafter = getattr(speculative_config, "draft_model_config", None)
        if drafter is None or not family_of(drafter.architectures):
            original(self, speculative_config)

    return _validate_spec_decode


def _adding_cli_args(original: Any) -> Any:
    """`--speculative-config failfast`: the bare word next to vLLM's JSON."""

    def add_cli_args(parser: Any) -> Any:
        parser = original(parser)
        action = parser._option_string_actions.get("--speculative-config")
        if action is not None and action.type is not None:
            from_json = action.type

            def from_text(value: str) -> Any:
                return {"method": METHOD} if user_config.is_bare_word(value) else from_json(value)

            from_text.__name__ = "speculative config"  # argparse prints it in its own error
            action.type = from_text
        return parser

    return add_cli_args


def _creating_speculative_config(original: Any) -> Any:
    """Check the user's keys, then say it in vLLM's terms: a draft model with ragged CPU drafts."""

    def create_speculative_config(
        self: Any, target_model_config: Any, target_parallel_config: Any
    ) -> Any:
        given = user_config.parse(self.speculative_config)
        if given is None:
            return original(self, target_model_config, target_parallel_config)
        knobs = FailFastConfig.from_user(given)
        _check_engine_args(self, target_model_config, knobs, given)
        drafter = given.get("model") or checks.choose_drafter(
            target_model_config.model,
            target_model_config.hf_config.model_type,
            target_model_config.get_vocab_size(),
        )
        asked_size = given.get(user_config.BLOCK_SIZE)
        published = checks.check_local_drafter(drafter, self.load_format, asked_size)
        if published is None:
            published = _check_hub_config(drafter, given.get("revision"), asked_size)
        register_model()
        _install_worker_hook()
        _install_request_hooks()
        _install_metrics_hooks()
        _install_engine_hooks()

        # the drafter's config takes the target's flag; remote code is never run for a drafter
        guarded = copy.copy(target_model_config)
        guarded.trust_remote_code = False
        passed_on = {key: given[key] for key in user_config.PASSED_ON if key in given}
        passed_on["draft_tensor_parallel_size"] = 1  # until its heads are known
        asked = self.speculative_config
        self.speculative_config = {
            **passed_on,
            "method": "draft_model",
            "model": drafter,
            "num_speculative_tokens": knobs.num_speculative_tokens,
            "disable_padded_drafter_batch": True,
        }
        try:
            speculative = original(self, guarded, target_parallel_config)
        finally:
            self.speculative_config = asked
        speculative.target_model_config = target_model_config
        assert speculative.method == "draft_model", speculative.method
        hf_config = speculative.draft_model_config.hf_config.to_dict()
        family = checks.check_drafter_config(drafter, hf_config, asked_size)
        block = checks.find_block_size(drafter, family, published or hf_config, asked_size)
        if block.doubt:
            _warn_once(f"failfast: {drafter!r} drafts in blocks of {block.size}: {block.doubt}")
        knobs = knobs.for_block_size(block.size, given)
        _check_balancing(family, drafter, self.enable_eplb)
        _spread_drafter(speculative, drafter, hf_config, given)
        # cut like a dense MLP: ranks that hold different experts would wait for each other
        speculative.draft_parallel_config.enable_expert_parallel = False

        self.async_scheduling = False  # lengths per sequence need the synchronous scheduler
        self.additional_config = {
            **(self.additional_config or {}),
            METHOD: {
                **knobs.to_dict(),
                "diffusion_block_size": block.size,
                "logit_shift": family.logit_shift,
                **_token_facts(
                    target_model_config, drafter, given.get("revision"), family, hf_config
                ),
            },
        }
        return speculative

    return create_speculative_config


def _setting_batch_defaults(original: Any) -> Any:
    """vLLM's LoRA buffers must hold a full draft of every sequence: say which flags make it so."""

    def _set_default_max_num_seqs_and_batched_tokens_args(
        self: Any, usage_context: Any, model_config: Any, parallel_config: Any
    ) -> None:
        original(self, usage_context, model_config, parallel_config)
        if not self.enable_lora or METHOD not in (self.additional_config or {}):
            return
        per_seq = 1 + self.additional_config[METHOD]["num_speculative_tokens"]
        budget, needed = self.max_num_batched_tokens, self.max_num_seqs * per_seq
        if budget < needed:
            raise ValueError(
                f"failfast: LoRA needs max_num_batched_tokens of at least {needed} (max_num_seqs "
                f"{self.max_num_seqs} x (1 + num_speculative_tokens)); got {budget}. Use "
                f"--max-num-seqs {budget // per_seq} or --max-num-batched-tokens {needed}."
            )

    return _set_default_max_num_seqs_and_batched_tokens_args


def _check_hub_config(
    drafter: str, revision: str | None, asked_size: int | None
) -> dict[str, Any] | None:
    """Refuse before vLLM would offer to run remote code, or fail on a size; raises ValueError.

    Returns:
        The config.json, or None where the hub cannot be reached: vLLM says so itself.
    """
    from vllm.transformers_utils.repo_utils import get_hf_file_to_dict

    fields = get_hf_file_to_dict("config.json", drafter, revision)
    if not isinstance(fields, dict):
        return None
    checks.check_drafter_config(drafter, fields, asked_size)
    return fields


@functools.cache
def _warn_once(message: str) -> None:
    logger.warning(message)


def _check_balancing(family: Family, drafter: str, enable_eplb: bool) -> None:
    if family.has_experts and enable_eplb:
        raise ValueError(
            "failfast: vLLM would balance the experts of the drafter like the target's, but every "
            f"rank has them all; got --enable-eplb and the drafter {drafter!r}. "
            "Leave --enable-eplb out, or use a drafter without experts."
        )


def _spread_drafter(
    speculative: Any, drafter: str, hf_config: dict[str, Any], given: dict[str, Any]
) -> None:
    """Shard the drafter over the target's ranks, or let each of them hold the whole of it."""
    num_ranks = speculative.target_parallel_config.tensor_parallel_size
    if given.get("draft_tensor_parallel_size", num_ranks) == 1:
        return
    undivided = checks.undivided_size(hf_config, num_ranks)
    if undivided is None:
        speculative.draft_tensor_parallel_size = num_ranks
        speculative.draft_parallel_config = speculative.create_draft_parallel_config(
            speculative.target_parallel_config, num_ranks, speculative.draft_model_config
        )
    elif "draft_tensor_parallel_size" in given:
        raise ValueError(
            f"failfast: {num_ranks} ranks cannot share the drafter {drafter!r}; "
            f"got {undivided}. Set 'draft_tensor_parallel_size' to 1."
        )
    else:
        logger.info(
            "failfast: each of the %d ranks holds the whole drafter, which they cannot share (%s)",
            num_ranks,
            undivided,
        )


def _token_facts(
    target_model_config: Any,
    drafter: str,
    revision: str | None,
    family: Family,
    drafter_hf_config: dict[str, Any],
) -> dict[str, int]:
    """MASK, and how many ids may be drafted; refuses a drafter with another tokenizer."""
    from transformers import AutoTokenizer

    shared = min(target_model_config.get_vocab_size(), int(drafter_hf_config["vocab_size"]))
    if target_model_config.skip_tokenizer_init:  # the user vouches for the ids
        mask = checks.mask_token_id(family, drafter_hf_config, {})
        return {"mask_token_id": mask, "num_draftable_tokens": shared}
    from vllm.tokenizers.registry import cached_tokenizer_from_config

    try:
        files = [os.path.join(drafter, name) for name in VOCABULARIES]
        if os.path.isdir(drafter) and not any(map(os.path.isfile, files)):
            raise OSError(f"it has no {' or '.join(VOCABULARIES)}")  # else an empty one is made
        drafter_tokenizer = AutoTokenizer.from_pretrained(
            drafter, revision=revision, trust_remote_code=False
        )
    except Exception as error:  # of a damaged file the libraries raise anything
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(
            f"failfast: cannot load the tokenizer of the drafter {drafter!r} ({reason}); "
            f"give a complete {family.name} checkpoint."
        ) from None
    target_vocab = cached_tokenizer_from_config(target_model_config).get_vocab()
    drafter_vocab = drafter_tokenizer.get_vocab()
    mask = checks.mask_token_id(family, drafter_hf_config, drafter_vocab)
    checks.check_tokenizers(target_model_config.model, target_vocab, drafter, drafter_vocab, mask)
    return {
        "mask_token_id": mask,
        "num_draftable_tokens": min(shared, max(target_vocab.values()) + 1),
    }


def _check_engine_args(
    args: Any, target_model_config: Any, knobs: FailFastConfig, given: dict[str, Any]
) -> None:
    """Refuse what cannot work, before any weight is read; raises ValueError."""

    def refuse(what: str, got: Any, remedy: str) -> None:
        raise ValueError(f"failfast: {what}; got {got!r}. {remedy}")

    for flag in ("spec_method", "spec_model", "spec_tokens"):
        if getattr(args, flag, None) is not None:
            refuse(
                f"--{flag.replace('_', '-')} does not go with --speculative-config",
                getattr(args, flag),
                "Put the key into the JSON of --speculative-config.",
            )
    if given.get("draft_tensor_parallel_size", 1) not in (1, args.tensor_parallel_size):
        refuse(
            "'draft_tensor_parallel_size' must be 1 or the target's "
            f"tensor_parallel_size ({args.tensor_parallel_size})",
            given["draft_tensor_parallel_size"],
            "Leave it out.",
        )
    for kind in ("pipeline", "decode_context", "prefill_context"):
        num_ranks = getattr(args, f"{kind}_parallel_size")
        if num_ranks > 1:
            refuse(
                f"{kind.replace('_', '-')} parallelism is not supported",
                num_ranks,
                "Use --tensor-parallel-size instead.",
            )
    if args.block_size and args.block_size % MAX_DIFFUSION_BLOCK_SIZE:
        refuse(
            f"the KV page must be a multiple of {MAX_DIFFUSION_BLOCK_SIZE} tokens",
            args.block_size,
            f"Leave --block-size out or use a multiple of {MAX_DIFFUSION_BLOCK_SIZE}.",
        )
    if args.async_scheduling:
        refuse(
            "asynchronous scheduling assumes one draft length for all sequences",
            args.async_scheduling,
            "Leave --async-scheduling out.",
        )
    needed = MAX_DIFFUSION_BLOCK_SIZE + knobs.num_speculative_tokens
    budget = args.max_num_batched_tokens
    if budget is not None and budget < needed:
        refuse(
            f"max_num_batched_tokens must be at least {needed} "
            f"({MAX_DIFFUSION_BLOCK_SIZE} + num_speculative_tokens)",
            budget,
            "Raise it or lower 'num_speculative_tokens'.",
        )
    if target_model_config.runner_type != "generate":
        refuse(
            "only text generation can be drafted for",
            target_model_config.runner_type,
            "Leave the speculative config out.",
        )
    if target_model_config.is_encoder_decoder:
        refuse(
            "encoder-decoder targets are not supported: the drafter sees text only",
            target_model_config.architecture,
            "Use a decoder-only target, or leave the speculative config out.",
        )
    if target_model_config.is_hybrid or target_model_config.use_mla:
        refuse(
            "hybrid (Mamba, linear attention) and MLA targets have no KV page that is shared "
            "with the drafter",
            target_model_config.architecture,
            "Use a target with full attention.",
        )
    window = target_model_config.get_sliding_window() or target_model_config.attention_chunk_size
    if window:
        refuse(
            "targets with sliding-window or chunked attention have no KV page that is shared with "
            "the drafter",
            window,
            "Use a target with full attention, or --disable-sliding-window.",
        )


def _verifying_vocab_sizes(original: Any) -> Any:
    """Padded vocab sizes may differ (Qwen2.5: 151,936 up to 3B, 152,064 from 7B on)."""

    def verify_equal_vocab_size_if_draft_model(self: Any) -> None:
        drafter = self.draft_model_config
        if drafter is not None and family_of(drafter.architectures):
            return
        original(self)

    return verify_equal_vocab_size_if_draft_model


def _limiting_max_model_len(original: Any) -> Any:
    """vLLM's own V2 drafters cannot skip a long sequence; ours stops at its last position."""

    def _limit_max_model_len_to_draft(self: Any) -> None:
        if not asked_for(self):
            original(self)

    return _limit_max_model_len_to_draft


def _initializing_worker(original: Any) -> Any:
    """Runner hooks import CUDA libraries, so they wait for a worker process that needs them."""

    def __init__(self: Any, vllm_config: Any, *args: Any, **kwargs: Any) -> None:  # noqa: N807
        if asked_for(vllm_config):
            register_model()
            _install_engine_hooks()
            if vllm_config.use_v2_model_runner:
                install_v2_hooks()
            else:
                install_v1_hooks()
        original(self, vllm_config, *args, **kwargs)
        if asked_for(vllm_config):
            self.compile_or_warm_up_model = _warming_up(self)
            self.shutdown = _closing_the_trace(self)

    return __init__


def _warming_up(worker: Any) -> Any:
    """The worker's last step before it serves."""
    warm_up = worker.compile_or_warm_up_model

    def compile_or_warm_up_model(*args: Any, **kwargs: Any) -> Any:
        from failfast_vllm.integration.session import adapter_of
        from failfast_vllm.integration.startup import start_serving

        drafter = adapter_of(worker.model_runner).drafter
        drafter.model.warm_up_kernels(details=drafter.policy.needs_entropy)
        with _compiling_unmonitored(worker):
            result = warm_up(*args, **kwargs)
            start_serving(worker.model_runner)
        return result

    return compile_or_warm_up_model


@contextlib.contextmanager
def _compiling_unmonitored(worker: Any) -> Iterator[None]:
    """vLLM's monitor of compilation starts at the end of its warm-up: let it wait for ours."""
    activate = worker._maybe_activate_jit_monitor
    wanted: list[None] = []
    worker._maybe_activate_jit_monitor = lambda: wanted.append(None)
    try:
        yield
    finally:
        del worker._maybe_activate_jit_monitor
    if wanted:
        activate()


def _closing_the_trace(worker: Any) -> Any:
    """The worker's last call: rounds that wait for the disk are written."""
    end = worker.shutdown

    def shutdown() -> None:
        from failfast_vllm.integration.session import adapter_of

        adapter = adapter_of(getattr(worker, "model_runner", None))  # none: start-up failed
        if adapter is not None and adapter.stats.trace is not None:
            adapter.stats.trace.close()
        end()

    return shutdown


def register_model() -> None:
    """Make the drafters' configs and architectures known to vLLM."""
    from vllm.model_executor.models.registry import ModelRegistry
    from vllm.transformers_utils.config import _CONFIG_REGISTRY

    for family in FAMILIES:
        architecture = family.architecture
        if architecture not in ModelRegistry.get_supported_archs():
            ModelRegistry.register_model(
                architecture, f"failfast_vllm.drafters.model:{architecture}"
            )
        if family.model_types[0] not in _CONFIG_REGISTRY:
            from failfast_vllm.drafters import hf_config

            _CONFIG_REGISTRY[family.model_types[0]] = hf_config.CONFIGS[family.model_types[0]]


def install_v2_hooks() -> None:
    """Build `FailFastSpeculator` where asked for; raises RuntimeError on a changed vLLM."""
    problem = missing_hooks(V2_HOOKS)
    if problem:
        raise RuntimeError(f"failfast cannot run: {problem}")
    from vllm.v1.worker.gpu import model_runner

    from failfast_vllm.integration import target_graphs
    from failfast_vllm.integration.v2 import FailFastSpeculator

    def building_speculator(original: Any) -> Any:
        def init_speculator(vllm_config: Any, device: Any, req_states: Any) -> Any:
            if asked_for(vllm_config):
                return FailFastSpeculator(vllm_config, device, req_states)
            return original(vllm_config, device, req_states)

        return init_speculator

    def taking_drafts(original: Any) -> Any:
        def take_draft_token_ids(self: Any) -> Any:
            if isinstance(self.speculator, FailFastSpeculator):
                return self.speculator.take_drafts()
            return original(self)

        return take_draft_token_ids

    def widening_graphs(original: Any) -> Any:
        def initialize_kv_cache(self: Any, kv_cache_config: Any, *args: Any, **more: Any) -> None:
            original(self, kv_cache_config, *args, **more)
            if isinstance(self.speculator, FailFastSpeculator):
                target_graphs.widen(self)

        return initialize_kv_cache

    def finishing_requests(original: Any) -> Any:
        def finish_requests(self: Any, scheduler_output: Any) -> None:
            original(self, scheduler_output)  # takes preempted requests for finished ones
            if isinstance(self.speculator, FailFastSpeculator):
                self.speculator.forget(scheduler_output.finished_req_ids)

        return finish_requests

    def adding_requests(original: Any) -> Any:
        def add_requests(self: Any, scheduler_output: Any) -> None:
            original(self, scheduler_output)
            if isinstance(self.speculator, FailFastSpeculator):
                self.speculator.add_requests(scheduler_output)

        return add_requests

    _wrap(model_runner, "init_speculator", building_speculator)
    _wrap(model_runner.GPUModelRunner, "initialize_kv_cache", widening_graphs)
    _wrap(model_runner.GPUModelRunner, "add_requests", adding_requests)
    _wrap(model_runner.GPUModelRunner, "take_draft_token_ids", taking_drafts)
    _wrap(model_runner.GPUModelRunner, "finish_requests", finishing_requests)


def install_v1_hooks() -> None:
    """Hand failfast's engine steps to `FailFastProposer`; raises RuntimeError on a changed vLLM."""
    problem = missing_hooks(V1_HOOKS)
    if problem:
        raise RuntimeError(f"failfast cannot run: {problem}")
    from vllm.triton_utils import HAS_TRITON
    from vllm.v1.sample import rejection_sampler
    from vllm.v1.sample.logits_processor import BUILTIN_LOGITS_PROCESSORS, LogitsProcessors
    from vllm.v1.spec_decode.draft_model import DraftModelProposer
    from vllm.v1.worker import gpu_model_runner
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    from failfast_vllm.integration import cpu_sampling
    from failfast_vllm.integration.v1 import FailFastProposer

    def constructing_proposer(original: Any) -> Any:
        def __new__(cls: Any, vllm_config: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N807
            if cls is DraftModelProposer and asked_for(vllm_config):
                return object.__new__(FailFastProposer)
            return object.__new__(cls)

        return __new__

    def fitting_drafter(original: Any) -> Any:
        def _input_fits_in_drafter(self: Any, common_attn_metadata: Any) -> bool:
            if isinstance(self.drafter, FailFastProposer):  # it clamps per sequence
                return common_attn_metadata is not None
            fits: bool = original(self, common_attn_metadata)
            return fits

        return _input_fits_in_drafter

    def proposing(original: Any) -> Any:
        def propose_draft_token_ids(
            self: Any,
            scheduler_output: Any,
            sampled_token_ids: Any,
            sampling_metadata: Any,
            hidden_states: Any,
            sample_hidden_states: Any,
            aux_hidden_states: Any,
            spec_decode_metadata: Any,
            common_attn_metadata: Any,
            slot_mappings: Any,
        ) -> Any:
            if isinstance(self.drafter, FailFastProposer):
                return self.drafter.postpone(
                    scheduler_output, sampled_token_ids, common_attn_metadata
                )
            return original(
                self,
                scheduler_output,
                sampled_token_ids,
                sampling_metadata,
                hidden_states,
                sample_hidden_states,
                aux_hidden_states,
                spec_decode_metadata,
                common_attn_metadata,
                slot_mappings,
            )

        return propose_draft_token_ids

    def updating_states(original: Any) -> Any:
        def _update_states(self: Any, scheduler_output: Any) -> Any:
            drafter = getattr(self, "drafter", None)  # only a runner that speculates has one
            if not isinstance(drafter, FailFastProposer):
                return original(self, scheduler_output)
            drafter.begin(scheduler_output)
            corrections = original(self, scheduler_output)
            drafter.drop_stale_budgets()
            return corrections

        return _update_states

    def taking_drafts(original: Any) -> Any:
        def take_draft_token_ids(self: Any) -> Any:
            drafter = getattr(self, "drafter", None)  # only a runner that speculates has one
            return (
                drafter.take_drafts() if isinstance(drafter, FailFastProposer) else original(self)
            )

        return take_draft_token_ids

    def sampling(original: Any) -> Any:
        """vLLM verifies in every step of an engine that may speculate, with or without drafts.

        Without drafts each row is the token behind a draft of length 0: sampled as vLLM samples
        that, thinking budgets included, and not verified, which is slow and, for top-k on a CPU,
        fails on no rows.
        """

        def _sample(self: Any, logits: Any, spec_decode_metadata: Any) -> Any:
            drafter = getattr(self, "drafter", None)
            ours = isinstance(drafter, FailFastProposer) and spec_decode_metadata is not None
            if ours and not any(spec_decode_metadata.num_draft_tokens):
                return self.sampler(
                    logits=logits,
                    sampling_metadata=self.input_batch.sampling_metadata,
                    predict_bonus_token=True,
                )
            return original(self, logits, spec_decode_metadata)

        return _sample

    def building_logitsprocs(original: Any) -> Any:
        """vLLM drops min_p and logit_bias beside any drafter; undrafted requests can have them."""

        def build_logitsprocs(
            vllm_config: Any,
            device: Any,
            is_pin_memory: bool,
            is_pooling_model: bool,
            custom_logitsprocs: Any = (),
        ) -> Any:
            if asked_for(vllm_config) and not custom_logitsprocs:
                return LogitsProcessors(
                    make(vllm_config, device, is_pin_memory) for make in BUILTIN_LOGITS_PROCESSORS
                )
            return original(
                vllm_config, device, is_pin_memory, is_pooling_model, custom_logitsprocs
            )

        return build_logitsprocs

    _wrap(GPUModelRunner, "_update_states", updating_states)
    _wrap(GPUModelRunner, "take_draft_token_ids", taking_drafts)
    _wrap(GPUModelRunner, "_sample", sampling)
    _wrap(DraftModelProposer, "__new__", constructing_proposer)
    _wrap(gpu_model_runner, "build_logitsprocs", building_logitsprocs)
    _wrap(GPUModelRunner, "_input_fits_in_drafter", fitting_drafter)
    _wrap(GPUModelRunner, "propose_draft_token_ids", proposing)
    if not HAS_TRITON:
        _wrap(rejection_sampler, "expand_batch_to_tokens", cpu_sampling.expanding)
