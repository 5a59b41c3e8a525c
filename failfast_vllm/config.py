"""What a user may ask for, checked once, before any weight is read. No vLLM, no torch.

Errors are one line: what is wrong, what was got, what to do.
"""

import difflib
import json
import os
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, NamedTuple

from failfast_vllm.drafters.checkpoint import check_config, check_files
from failfast_vllm.drafters.families import (
    DIFFUSION_BLOCK_SIZES,
    FAMILIES,
    QWEN_VOCAB_SIZES,
    Family,
    family_of,
    published_names,
)
from failfast_vllm.observe.trace import is_trace
from failfast_vllm.policies.parameters import read_flag, read_integer
from failfast_vllm.policies.table import PARAMETERS, POLICIES, policy_parameters

METHOD = "failfast"
MODELS_DIR = Path(__file__).parent / "small_pair"
# vLLM's SpeculativeConfig changes the method of a draft model whose path contains one of these
METHOD_WORDS = ("eagle-", "eagle3", "dflash", "dspark")
MAX_DRAFT_BUDGET = 65536
MAX_ECHO = 100  # characters of a user's value in an error
HUB_ID = re.compile(r"[\w.-]{1,96}(/[\w.-]{1,96})?", re.ASCII)
MAX_SPECULATIVE_TOKENS = 128  # MAX_SPEC_LEN of vLLM's rejection sampler


_NAMES = " or ".join(family.name for family in FAMILIES)
_SIZES = ", ".join(map(str, DIFFUSION_BLOCK_SIZES))


@dataclass(frozen=True)
class FailFastConfig:
    """The drafting knobs; defaults are the paper's (arXiv 2512.20573, section 5)."""

    num_speculative_tokens: int
    draft_increment: int
    policy: str
    draft_budget: int  # tokens drafted in one step, over all sequences
    reuse_rejected: bool  # experimental: lengthen doubtful drafts by what was rejected before
    path_search: bool  # experimental: choose among the candidates of a pass by earlier text
    load_aware: bool  # draft only where it is expected to raise throughput
    trace: str | None  # the file that rounds are written to
    trace_ids: bool  # with token ids
    parameters: Mapping[str, Any]  # of the policy

    @staticmethod
    def from_user(given: Mapping[str, Any]) -> "FailFastConfig":
        """Validate the drafting keys of `--speculative-config`; raises ValueError."""
        policy = given.get("policy", METHOD)
        if not isinstance(policy, str) or policy not in POLICIES:
            raise ValueError(
                f"failfast: 'policy' must be one of {', '.join(POLICIES)}; got {policy!r}."
            )
        rule = POLICIES[policy]
        cap = read_integer(
            given, "num_speculative_tokens", rule.default_cap, 1, MAX_SPECULATIVE_TOKENS
        )
        increment = cap if rule.one_pass else min(10, cap)
        increment = read_integer(given, "draft_increment", increment, 1, cap)
        budget = read_integer(given, "draft_budget", 512, 1, MAX_DRAFT_BUDGET)
        reuse = read_flag(given, "reuse_rejected", False)
        path_search = read_flag(given, "path_search", False)
        load_aware = read_flag(given, "load_aware", True)
        if rule.needs_planner and not load_aware:
            raise ValueError(
                f"failfast: the policy {policy!r} is made of measured times; "
                "got 'load_aware' false. Remove it or take another policy."
            )
        parameters = policy_parameters(policy, given, cap)
        trace, trace_ids = _trace_file(given), read_flag(given, "trace_ids", False)
        return FailFastConfig(
            cap,
            increment,
            policy,
            budget,
            reuse,
            path_search,
            load_aware,
            trace,
            trace_ids,
            parameters,
        )

    def for_block_size(self, size: int, given: Mapping[str, Any]) -> "FailFastConfig":
        """Unless the user set it, an increment is not longer than the drafter's block.

        Beyond it every mask of a pass would depend on blocks that hold only masks, which no
        drafter has seen in training.
        """
        if "draft_increment" in given or POLICIES[self.policy].one_pass:
            return self
        return replace(self, draft_increment=min(self.draft_increment, size))

    def to_dict(self) -> dict[str, Any]:
        """One flat table, as the user writes it."""
        knobs = asdict(self)
        parameters = knobs.pop("parameters")
        return {**knobs, **parameters}


# keys of vLLM's SpeculativeConfig that mean the same for a failfast drafter
PASSED_ON = ("model", "revision", "draft_tensor_parallel_size")
BLOCK_SIZE = "diffusion_block_size"
KNOWN_KEYS = (
    "method",
    *PASSED_ON,
    BLOCK_SIZE,
    *(field.name for field in fields(FailFastConfig) if field.name != "parameters"),
    *dict.fromkeys(key for parameters in PARAMETERS.values() for key in parameters),
)


def _echo(value: Any) -> str:
    """A user's value in an error of one line, whatever its length."""
    text = repr(value)
    return text if len(text) <= MAX_ECHO else f"{text[:MAX_ECHO]}... ({len(text)} characters)"


def is_bare_word(text: str) -> bool:
    """Whether the whole speculative config is the word `failfast`."""
    return text.strip().lower() == METHOD


def parse(speculative_config: str | Mapping[str, Any] | None) -> dict[str, Any] | None:
    """The keys that the user gave, or None when failfast was not asked for.

    Raises:
        ValueError: an unknown key, with the nearest known one.
    """
    if isinstance(speculative_config, str):
        return {} if is_bare_word(speculative_config) else None
    if not isinstance(speculative_config, Mapping):
        return None
    method = speculative_config.get("method")
    if not isinstance(method, str) or not is_bare_word(method):
        return None
    given: dict[str, Any] = {}
    for spelt, value in speculative_config.items():
        key = str(spelt).replace("-", "_")
        if key not in KNOWN_KEYS:
            near = difflib.get_close_matches(key[:MAX_ECHO], KNOWN_KEYS, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"use one of {', '.join(KNOWN_KEYS)}."
            raise ValueError(
                f"failfast: unknown key {_echo(key)} in the speculative config; {hint}"
            )
        if key in given:
            raise ValueError(
                f"failfast: {key!r} must be given once; got it with '-' and with '_'. Remove one."
            )
        given[key] = value
    for key in ("model", "revision"):
        value = given.get(key)
        if key in given and (not isinstance(value, str) or not value.strip()):
            raise ValueError(f"failfast: {key!r} must be a non-empty string; got {_echo(value)}.")
    if "draft_tensor_parallel_size" in given:
        read_integer(given, "draft_tensor_parallel_size", 1, 1, 1024)
    if BLOCK_SIZE in given and not _is_block_size(given[BLOCK_SIZE]):
        raise ValueError(
            f"failfast: {BLOCK_SIZE!r} must be one of {_SIZES}; got {given[BLOCK_SIZE]!r}."
        )
    del given["method"]
    return given


def choose_drafter(target: str, model_type: str, vocab_size: int) -> str:
    """The drafter for a target when the user names none; raises ValueError if there is none."""
    if Path(target).exists() and Path(target).resolve() == (MODELS_DIR / "target").resolve():
        return str(MODELS_DIR / "drafter")
    for family in FAMILIES:
        if model_type in family.targets and vocab_size in QWEN_VOCAB_SIZES:
            return family.drafter
    raise ValueError(
        f"failfast: no drafter is known for the target {target!r} (model type {model_type!r}, "
        f"{vocab_size} tokens); name a {_NAMES} checkpoint with the same tokenizer: "
        '--speculative-config \'{"method": "failfast", "model": "PATH_OR_HUB_ID"}\'.'
    )


def check_local_drafter(
    model: str, load_format: str = "auto", asked_size: int | None = None
) -> dict[str, Any] | None:
    """Refuse a local drafter that cannot be one, before vLLM loads anything; raises ValueError.

    vLLM's `load_format` "dummy" reads no weights, so none are asked for.

    Args:
        asked_size: the user's diffusion block size.

    Returns:
        Its `config.json`, or None where it is not a directory.
    """
    for word in METHOD_WORDS:
        if word in model.lower():
            raise ValueError(
                f"failfast: vLLM takes a drafter with {word!r} in its path for another method; "
                f"got {_echo(model)}. Rename the directory."
            )
    if not os.path.isdir(model):  # where Path.is_dir raises on an impossible name, this is False
        if model.startswith(("/", ".", "~")) or not HUB_ID.fullmatch(model):
            raise ValueError(
                f"failfast: the drafter {_echo(model)} is not a directory; "
                "give a checkpoint directory or a hub id."
            )
        return None
    path = Path(model)
    config_path = path / "config.json"
    try:
        if config_path.exists() and not config_path.is_file():
            raise ValueError("it is not a file")  # a pipe would be read for ever
        config = json.loads(config_path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(
            f"failfast: cannot read the drafter's {config_path} ({error}); "
            f"give a complete {_NAMES} checkpoint."
        ) from None
    config = config if isinstance(config, dict) else {}
    family = check_drafter_config(model, config, asked_size)
    if load_format == "dummy":
        return config
    if not any(path.glob("*.safetensors")):
        others = sorted(p.name for p in (*path.glob("*.bin"), *path.glob("*.pt")))
        raise ValueError(
            f"failfast: the drafter {model!r} has no .safetensors file "
            f"(got {', '.join(others) or 'no weights'}); convert it, pickles are never loaded."
        )
    check_files(path, family, config)
    return config


def check_drafter_config(
    model: str, config: Mapping[str, Any], asked_size: int | None = None
) -> Family:
    """The drafter's family; raises ValueError on another architecture, layout or block size."""
    architectures = config.get("architectures")
    family = family_of(architectures)
    if family is None:
        found = architectures if isinstance(architectures, list) else []
        known = " or ".join(family.architecture for family in FAMILIES)
        hint = (
            "Its 'auto_map' is of no use: a drafter's own code is never run."
            if config.get("auto_map")
            else "For an autoregressive drafter use vLLM's own method 'draft_model'."
        )
        raise ValueError(
            f"failfast: the drafter {model!r} must be a {known}; "
            f"got {', '.join(map(str, found)) or 'no architecture'}. {hint}"
        )
    if config.get("model_type") not in family.model_types:
        raise ValueError(
            f"failfast: the drafter {model!r} must have the 'model_type' "
            f"{family.model_types[0]!r}; got {config.get('model_type')!r}. "
            "Set it in its config.json."
        )
    find_block_size(model, family, config, asked_size)
    check_config(model, family, config)
    return family


class BlockSize(NamedTuple):
    """Of a drafter's diffusion blocks, in tokens."""

    size: int
    doubt: str | None  # one line: what a user should know about where it comes from


def find_block_size(
    model: str, family: Family, config: Mapping[str, Any], asked_size: int | None = None
) -> BlockSize:
    """What a drafter's config.json states, else the user, else its name, else the family's default.

    SDAR is published without a size in its config.json. A name is only a hint, which the user may
    overrule; what the config states stands.

    Args:
        model: hub id or directory.
        config: its `config.json` as published, not as a configuration class has filled it.
        asked_size: `diffusion_block_size` of the speculative config.

    Raises:
        ValueError: a size that no kernel has, or one that contradicts the config.json.
    """
    key = family.block_size_key
    names = published_names(model, config)
    found = [(name, size) for name in names if (size := family.size_in_name(name)) is not None]
    if key in config:
        if not _is_block_size(config[key]):
            raise ValueError(
                f"failfast: the drafter {model!r} must have a {key!r} of {_SIZES}; "
                f"got {config[key]!r}. Use another checkpoint."
            )
        if asked_size not in (None, config[key]):
            raise ValueError(
                f"failfast: {BLOCK_SIZE!r} must be the {key!r} in the config.json of the drafter "
                f"{model!r}, {config[key]}; got {asked_size}. Leave it out."
            )
        return BlockSize(config[key], None)
    if asked_size is not None:
        doubt = None
        if found and found[0][1] != asked_size:
            doubt = f"as {BLOCK_SIZE!r} says, though {found[0][0]!r} stands for {found[0][1]}"
        return BlockSize(asked_size, doubt)
    if not found:
        doubt = (
            f"the default of {family.name}, as neither its config.json nor its name says it; "
            f"set {BLOCK_SIZE!r} if it was trained with other blocks"
        )
        return BlockSize(family.default_block_size, doubt)
    name, size = found[0]
    if not _is_block_size(size):
        raise ValueError(
            f"failfast: the drafter {model!r} must have blocks of {_SIZES} tokens; got {size} "
            f"(from the name {name!r}). Use another checkpoint, or set {BLOCK_SIZE!r} if the "
            "name means something else."
        )
    return BlockSize(size, None)


def _is_block_size(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value in DIFFUSION_BLOCK_SIZES


def undivided_size(config: Mapping[str, Any], num_ranks: int) -> str | None:
    """The first size of a drafter that `num_ranks` tensor-parallel ranks cannot share, or None.

    Fewer KV heads than ranks are copied, as vLLM does it; the vocabulary is padded to 64; each
    expert is cut like a dense MLP, and `config` has all its sizes.
    """
    num_kv_heads = config.get("num_key_value_heads") or config["num_attention_heads"]
    remainders = {
        "num_attention_heads": config["num_attention_heads"] % num_ranks,
        "num_key_value_heads": num_kv_heads % num_ranks and num_ranks % num_kv_heads,
        "intermediate_size": config["intermediate_size"] % num_ranks,
        "vocab_size": -(-config["vocab_size"] // 64) * 64 % num_ranks,
    }
    if "moe_intermediate_size" in config:
        remainders["moe_intermediate_size"] = config["moe_intermediate_size"] % num_ranks
    return next((f"'{key}': {config[key]}" for key, rest in remainders.items() if rest), None)


def check_tokenizers(
    target_name: str,
    target: Mapping[str, int],
    drafter_name: str,
    drafter: Mapping[str, int],
    mask_token_id: int,
) -> None:
    """Refuse a drafter whose token ids mean something else; raises ValueError.

    Padding differs and MASK may be the drafter's own: only ids that both use must agree.
    """
    by_id = {i: token for token, i in drafter.items() if i != mask_token_id}
    clash = next((i for token, i in target.items() if i in by_id and by_id[i] != token), None)
    missing = len([i for i in target.values() if i not in by_id and i != mask_token_id])
    if clash is not None or missing > len(target) // 100:
        reason = (
            f"{missing} of its {len(target)} tokens are unknown to the drafter"
            if clash is None
            else f"id {clash} is {by_id[clash]!r} there"
        )
        raise ValueError(
            f"failfast: the drafter {drafter_name!r} has another tokenizer than the target "
            f"{target_name!r} ({reason}); use a drafter of the target's family."
        )


def mask_token_id(
    family: Family, config: Mapping[str, Any], drafter_vocab: Mapping[str, int]
) -> int:
    """MASK of a drafter: from its config, its tokenizer, or the table; raises ValueError."""
    if config.get("mask_token_id") is not None:
        return read_integer(config, "mask_token_id", 0, 0, config["vocab_size"] - 1)
    if family.mask_token in drafter_vocab:
        return drafter_vocab[family.mask_token]
    if config.get("vocab_size") in QWEN_VOCAB_SIZES:
        return family.published_mask_token_id
    raise ValueError(
        f"failfast: the drafter's MASK token is unknown (no {family.mask_token!r} in its "
        "tokenizer); "
        "set 'mask_token_id' in its config.json."
    )


def _trace_file(given: Mapping[str, Any]) -> str | None:
    """The absolute path of the trace, or None."""
    if "trace" not in given:
        if given.get("trace_ids"):
            raise ValueError(
                "failfast: 'trace_ids' belongs to a trace; got none. Name a file: 'trace'."
            )
        return None
    value = given["trace"]
    if not isinstance(value, str) or not value.strip() or not value.isprintable():
        raise ValueError(f"failfast: 'trace' must be the name of a file; got {_echo(value)}.")
    path = Path(value).expanduser().absolute()
    try:
        if not path.parent.is_dir():
            raise OSError("no such folder")
        is_new = not path.exists()
        if not is_new and not is_trace(path):
            raise ValueError(
                f"failfast: 'trace' must be a new file, or a trace to go on with; got {value!r}. "
                "Name another file."
            )
        path.open("ab").close()  # /proc lets nobody write, whatever its permissions say
        if is_new:
            path.unlink()
    except OSError as error:
        raise ValueError(
            "failfast: 'trace' must be a file in an existing, writable folder; "
            f"got {_echo(value)} ({error.strerror or error}). Create the folder."
        ) from None
    return str(path)
