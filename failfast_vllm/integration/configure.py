"""Hooks of the configuration: the user's speculative config, said in vLLM's terms.

vLLM sees a draft model whose drafts are made on the CPU and differ in length. What the drafter
needs to know travels in `additional_config["failfast"]`.
"""

import copy
import functools
from collections.abc import Iterator
from typing import Any

from failfast_vllm import config as user_config
from failfast_vllm.config import BLOCK_SIZE, METHOD, FailFastConfig
from failfast_vllm.drafters import checks
from failfast_vllm.drafters.families import MAX_DIFFUSION_BLOCK_SIZE, Family, family_of
from failfast_vllm.errors import reason, refusal
from failfast_vllm.integration.engine_hooks import install_metrics, register_model
from failfast_vllm.integration.hooks import asked_for, hook, install, logger

ENGINE_ARGS = "vllm.engine.arg_utils:EngineArgs"
SPECULATIVE_CONFIG = "vllm.config.speculative:SpeculativeConfig"

# in place of the facts about a drafter
NO_DRAFTER = {"drafts": False, "diffusion_block_size": 1, "logit_shift": 1, "mask_token_id": 0}

Problems = Iterator[tuple[str, Any, str]]  # what is wrong, the offending value, the remedy

_warn_once = functools.cache(logger.warning)


@hook("configuration", f"{ENGINE_ARGS}.create_speculative_config")
def create_speculative_config(
    original: Any, self: Any, target_model_config: Any, target_parallel_config: Any
) -> Any:
    """Checks the user's keys, then asks vLLM for a draft model with ragged CPU drafts.

    Goes when: vLLM lets plugins register speculative methods.
    """
    given = user_config.parse(self.speculative_config)
    if given is None:
        return original()
    drafter, copies = _drafter_for(target_model_config, given), {}
    if drafter is None:
        copies = {"copies": given.get("load_aware", True) is True}
    knobs = FailFastConfig.from_user({**copies, **given})
    for what, got, remedy in _problems(self, target_model_config, given, knobs, drafter):
        raise ValueError(f"failfast: {what}; got {got!r}. {remedy}")
    published = None if drafter is None else _read_drafter(drafter, self.load_format, given)
    register_model()
    install_metrics()
    for stage in ("worker", "requests", "engine"):
        install(stage)
    terms = _in_vllms_terms(drafter, given, knobs.num_speculative_tokens)
    speculative = _ask_vllm(original, self, target_model_config, target_parallel_config, terms)
    speculative.target_model_config = target_model_config
    setattr(speculative, METHOD, True)  # for who sees this config alone
    if drafter is None:
        logger.info("failfast: no drafter; drafts are copies of each sequence's own text")
        speculative.draft_model_config = target_model_config
        facts = {**knobs.to_dict(), **NO_DRAFTER}
    else:
        facts = _fit_drafter(speculative, published, knobs, given, self.enable_eplb)
    self.async_scheduling = False  # see `keep_asynchronous`
    self.additional_config = {**(self.additional_config or {}), METHOD: facts}
    return speculative


def _in_vllms_terms(drafter: str | None, given: dict[str, Any], cap: int) -> dict[str, Any]:
    """The speculative config that vLLM builds its own proposer from, which ours replaces."""
    if drafter is None:
        lookup = {"prompt_lookup_min": 1, "prompt_lookup_max": 1}
        return {"method": "ngram", "num_speculative_tokens": cap, **lookup}
    return {
        **{key: given[key] for key in user_config.PASSED_ON if key in given},
        "draft_tensor_parallel_size": 1,  # until its heads are known
        "method": "draft_model",
        "model": drafter,
        "num_speculative_tokens": cap,
        "disable_padded_drafter_batch": True,
    }


def _ask_vllm(original: Any, args: Any, target: Any, parallel: Any, terms: dict[str, Any]) -> Any:
    """vLLM's speculative config of `terms`; raises ValueError on fields that it trips over."""
    asking, guarded = copy.copy(args), copy.copy(target)
    asking.speculative_config = terms
    # the drafter's config takes the target's flag; remote code is never run for a drafter
    guarded.trust_remote_code = False
    try:
        speculative = original.func(asking, guarded, parallel)
    except (ValueError, OSError):
        raise  # vLLM's own: they say what to do
    except Exception as error:
        must = f"the drafter {terms.get('model')!r} must have a config.json that vLLM can read"
        got = f"{type(error).__name__} ({reason(error)})"
        raise refusal(must, got, "Use the one that was published.") from None
    assert speculative.method == terms["method"], speculative.method
    return speculative


@hook("configuration", f"{ENGINE_ARGS}.add_cli_args")
def add_cli_args(original: Any, parser: Any) -> Any:
    """Makes `--speculative-config` take the bare word `failfast` next to vLLM's JSON.

    Goes when: vLLM lets plugins register speculative methods.
    """
    parser = original()
    action = parser._option_string_actions.get("--speculative-config")
    if action is not None and action.type is not None:
        from_json = action.type

        def from_text(value: str) -> Any:
            return {"method": METHOD} if user_config.is_bare_word(value) else from_json(value)

        from_text.__name__ = "speculative config"  # argparse prints it in its own error
        action.type = from_text
    return parser


@hook("configuration", f"{ENGINE_ARGS}.create_engine_config")
def keep_asynchronous(original: Any, self: Any) -> Any:
    """Builds an engine that can schedule ahead, which it does while the planner rests.

    vLLM's configuration is made as for a synchronous one: it would refuse drafts of which only the
    worker knows the lengths. Engines that our tests do not cover in flight stay synchronous.

    Goes when: vLLM schedules ahead for drafts whose lengths only the worker knows.
    """
    asked = self.async_scheduling
    config = original()
    if not asked_for(config):
        return config
    self.async_scheduling = asked
    possible = _can_schedule_ahead(config)
    if asked and not possible:
        needs = "the V2 model runner, one rank, 'load_aware', a text target without recurrent state"
        remedy = "Leave it out: scheduling is asynchronous where it can be."
        must = f"--async-scheduling needs {needs}, and no KV connector"
        raise refusal(must, "True", remedy)
    config.scheduler_config.async_scheduling = possible and asked is not False
    return config


def _can_schedule_ahead(config: Any) -> bool:
    from vllm.v1.executor.abstract import Executor

    parallel, model = config.parallel_config, config.model_config
    return (
        config.use_v2_model_runner
        and config.additional_config[METHOD]["load_aware"] is True
        and parallel.world_size * parallel.data_parallel_size == 1
        and config.kv_transfer_config is None
        and config.scheduler_config.scheduler_cls is None
        and not model.has_inner_state
        and not model.is_multimodal_model  # vLLM 0.32 copies, and checks, its config for them
        and Executor.get_class(config).supports_async_scheduling()
    )


@hook("configuration", f"{SPECULATIVE_CONFIG}.verify_equal_vocab_size_if_draft_model")
def allow_other_padding(original: Any, self: Any) -> None:
    """Lets padded vocab sizes differ (Qwen2.5: 151,936 up to 3B, 152,064 from 7B on).

    Goes when: vLLM compares vocabularies without their padding.
    """
    drafter = self.draft_model_config
    if drafter is None or not family_of(drafter.architectures):
        original()


@hook("configuration", "vllm.config.vllm:VllmConfig._limit_max_model_len_to_draft", since=(0, 33))
def keep_max_model_len(original: Any, self: Any) -> None:
    """Lets a target that is longer than its drafter keep its length; ours stops at its own.

    Goes when: vLLM's V2 drafters skip a long sequence, too.
    """
    if not asked_for(self):
        original()


def _drafter_for(target: Any, given: dict[str, Any]) -> str | None:
    """The drafter's directory or hub id; None: drafts are copies alone."""
    if "model" in given:
        named: str | None = given["model"]
        return named
    if any(_page_problems(target)):
        return None
    return checks.choose_drafter(target.model, target.hf_config.model_type, target.get_vocab_size())


def _problems(
    args: Any, target: Any, given: dict[str, Any], knobs: FailFastConfig, drafter: str | None
) -> Problems:
    """What vLLM's arguments, or its ModelConfig of the target, ask for that cannot work."""
    for kind in ("pipeline", "decode_context", "prefill_context"):
        if (num_ranks := getattr(args, f"{kind}_parallel_size")) > 1:
            what = f"{kind.replace('_', '-')} parallelism is not supported"
            yield what, num_ranks, "Use --tensor-parallel-size instead."
    fewest = MAX_DIFFUSION_BLOCK_SIZE + knobs.num_speculative_tokens
    budget = args.max_num_batched_tokens
    if budget is not None and budget < fewest:
        sum_of = f"{MAX_DIFFUSION_BLOCK_SIZE} + num_speculative_tokens"
        what = f"max_num_batched_tokens must be at least {fewest} ({sum_of})"
        yield what, budget, "Raise it or lower 'num_speculative_tokens'."
    if target.runner_type != "generate" or target.is_encoder_decoder:
        what = "only text generation by decoder-only targets can be drafted for"
        yield what, target.architecture, "Leave the speculative config out."
    yield from _state_problems(target)
    if drafter is not None:
        yield from _page_problems(target)
        if args.block_size and args.block_size % MAX_DIFFUSION_BLOCK_SIZE:
            multiple = f"a multiple of {MAX_DIFFUSION_BLOCK_SIZE}"
            remedy = f"Leave --block-size out or use {multiple}."
            yield f"the KV page must be {multiple} tokens", args.block_size, remedy
    elif not knobs.copies:
        what = f"no drafter is known for the target {target.model!r}, and copies are switched off"
        got = {key: given[key] for key in ("copies", "load_aware") if key in given}
        remedy = "Remove these keys, or name a drafter with the same tokenizer: 'model'."
        yield what, got, remedy


def _state_problems(target: Any) -> Problems:
    """Where a rejected draft would leave its mark on the answer, with vLLM's own methods, too."""
    from vllm.platforms import current_platform

    remedy = "Leave the speculative config out."
    if target.is_attention_free:
        what = "vLLM does not roll back the states of targets without attention"
        yield what, target.architecture, remedy
    elif current_platform.is_cpu() and (target.is_hybrid or target.use_mla):
        what = "on CPUs, vLLM does not verify drafts exactly for hybrid (Mamba, linear attention)"
        yield f"{what} and MLA targets", target.architecture, remedy


def _page_problems(target: Any) -> Problems:
    windowed = target.get_sliding_window() or target.attention_chunk_size
    if target.is_hybrid or target.use_mla or windowed:
        kinds = "hybrid, MLA, sliding-window and chunked-attention targets"
        remedy = "Leave 'model' out: drafts are then copies. Or try --disable-sliding-window."
        yield f"{kinds} have no KV page for a drafter", target.architecture, remedy


def _read_drafter(drafter: str, load_format: Any, given: dict[str, Any]) -> dict[str, Any] | None:
    """The drafter's config.json; raises ValueError on one unfit.

    It is read before vLLM would offer to run remote code, or fail on a size. None where the hub
    cannot be reached, as vLLM says itself.
    """
    asked_size = given.get(BLOCK_SIZE)
    published = checks.check_local_drafter(drafter, load_format, asked_size)
    if published is None:
        from vllm.transformers_utils.repo_utils import get_hf_file_to_dict

        published = get_hf_file_to_dict("config.json", drafter, given.get("revision"))
        if not isinstance(published, dict):
            return None
        checks.check_drafter_config(drafter, published, asked_size)
    return published


def _fit_drafter(
    speculative: Any,
    published: dict[str, Any] | None,
    knobs: FailFastConfig,
    given: dict[str, Any],
    enable_eplb: bool,
) -> dict[str, Any]:
    """Check the drafter that vLLM has found, and spread it; returns what the worker must know."""
    drafter, hf_config = speculative.model, speculative.draft_model_config.hf_config.to_dict()
    asked_size = given.get(BLOCK_SIZE)
    family = checks.check_drafter_config(drafter, hf_config, asked_size)
    size, doubt = checks.find_block_size(drafter, family, published or hf_config, asked_size)
    if doubt:
        _warn_once(f"failfast: {drafter!r} drafts in blocks of {size}: {doubt}")
    check_balancing(family, drafter, enable_eplb)
    _spread_drafter(speculative, hf_config)
    # cut like a dense MLP: ranks that hold different experts would wait for each other
    speculative.draft_parallel_config.enable_expert_parallel = False
    return {
        **knobs.for_block_size(size, given).to_dict(),
        "diffusion_block_size": size,
        "logit_shift": family.logit_shift,
        "drafts": True,
        **_token_facts(speculative, family, hf_config),
    }


def check_balancing(family: Family, drafter: str, enable_eplb: bool) -> None:
    if family.has_experts and enable_eplb:
        must = "vLLM would balance the drafter's experts, but every rank must have them all"
        remedy = "Leave --enable-eplb out, or use a drafter without experts."
        raise refusal(must, f"--enable-eplb and the drafter {drafter!r}", remedy)


def _spread_drafter(speculative: Any, hf_config: dict[str, Any]) -> None:
    """Shard the drafter over the target's ranks, or have each hold the whole of it."""
    num_ranks = speculative.target_parallel_config.tensor_parallel_size
    if undivided := checks.undivided_size(hf_config, num_ranks):
        text = "each of the %d ranks holds the whole drafter, which they cannot share (%s)"
        logger.info(f"failfast: {text}", num_ranks, undivided)
    elif num_ranks > 1:
        speculative.draft_tensor_parallel_size = num_ranks
        speculative.draft_parallel_config = speculative.create_draft_parallel_config(
            speculative.target_parallel_config, num_ranks, speculative.draft_model_config
        )


def _token_facts(speculative: Any, family: Family, hf_config: dict[str, Any]) -> dict[str, int]:
    """MASK, and how many ids may be drafted; refuses a drafter with another tokenizer."""
    from transformers import AutoTokenizer

    drafter, target = speculative.model, speculative.target_model_config
    shared = min(target.get_vocab_size(), int(hf_config["vocab_size"]))
    if target.skip_tokenizer_init:  # the user vouches for the ids
        mask = checks.mask_token_id(family, hf_config, {})
        return {"mask_token_id": mask, "num_draftable_tokens": shared}
    from vllm.tokenizers.registry import cached_tokenizer_from_config

    try:
        tokenizer = AutoTokenizer.from_pretrained(
            drafter, revision=speculative.revision, trust_remote_code=False
        )
    except Exception as error:  # of a damaged file the libraries raise anything
        raise ValueError(
            f"failfast: cannot load the tokenizer of the drafter {drafter!r} ({reason(error)}); "
            f"give a complete {family.name} checkpoint."
        ) from None
    theirs, ours = cached_tokenizer_from_config(target).get_vocab(), tokenizer.get_vocab()
    mask = checks.mask_token_id(family, hf_config, ours)
    checks.check_tokenizers(target.model, theirs, drafter, ours, mask)
    return {"mask_token_id": mask, "num_draftable_tokens": min(shared, max(theirs.values()) + 1)}
