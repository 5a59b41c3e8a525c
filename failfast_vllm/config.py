"""What a user may ask for, checked once, before any weight is read. No vLLM, no torch.

Errors are one line: what is wrong, what was got, what to do.
"""

import difflib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from failfast_vllm.families import (
    DIFFUSION_BLOCK_SIZES,
    FAMILIES,
    QWEN_VOCAB_SIZES,
    Family,
    family_of,
)

METHOD = "failfast"
POLICIES = ("failfast", "fixed")
MODELS_DIR = Path(__file__).parent / "models"
# vLLM's SpeculativeConfig changes the method of a draft model whose path contains one of these
METHOD_WORDS = ("eagle-", "eagle3", "dflash", "dspark")
MAX_SPECULATIVE_TOKENS = 128  # MAX_SPEC_LEN of vLLM's rejection sampler


_NAMES = " or ".join(family.name for family in FAMILIES)


@dataclass(frozen=True)
class FailFastConfig:
    """The drafting knobs; defaults are the paper's (arXiv 2512.20573, section 5)."""

    num_speculative_tokens: int = 60
    confidence_threshold: float = 0.45
    draft_increment: int = 10
    policy: str = "failfast"

    @staticmethod
    def from_user(given: Mapping[str, Any]) -> "FailFastConfig":
        """Validate the drafting keys of `--speculative-config`; raises ValueError."""
        num_tokens = _integer(given, "num_speculative_tokens", 60, 1, MAX_SPECULATIVE_TOKENS)
        policy = given.get("policy", "failfast")
        if policy not in POLICIES:
            raise ValueError(
                f"failfast: 'policy' must be one of {', '.join(POLICIES)}; got {policy!r}."
            )
        threshold = given.get("confidence_threshold", 0.45)
        is_number = isinstance(threshold, int | float) and not isinstance(threshold, bool)
        if not is_number or not 0.0 <= threshold <= 1.0:
            raise ValueError(
                "failfast: 'confidence_threshold' must be a probability between 0 and 1; "
                f"got {threshold!r}."
            )
        # a fixed draft needs no second look: one pass fills it
        increment = num_tokens if policy == "fixed" else min(10, num_tokens)
        increment = _integer(given, "draft_increment", increment, 1, num_tokens)
        return FailFastConfig(num_tokens, float(threshold), increment, policy)

    def for_block_size(self, size: int, given: Mapping[str, Any]) -> "FailFastConfig":
        """Unless the user set it, an increment is not longer than the drafter's block.

        Beyond it every mask of a pass would depend on blocks that hold only masks, which no
        drafter has seen in training.
        """
        if "draft_increment" in given or self.policy == "fixed":
            return self
        return replace(self, draft_increment=min(self.draft_increment, size))

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


# keys of vLLM's SpeculativeConfig that mean the same for a failfast drafter
PASSED_ON = ("model", "revision", "draft_tensor_parallel_size")
KNOWN_KEYS = ("method", *PASSED_ON, *(field.name for field in fields(FailFastConfig)))


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
    if not isinstance(speculative_config, Mapping) or speculative_config.get("method") != METHOD:
        return None
    given = {str(key).replace("-", "_"): value for key, value in speculative_config.items()}
    for key in given:
        if key not in KNOWN_KEYS:
            near = difflib.get_close_matches(key, KNOWN_KEYS, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"use one of {', '.join(KNOWN_KEYS)}."
            raise ValueError(f"failfast: unknown key {key!r} in the speculative config; {hint}")
    for key in ("model", "revision"):
        value = given.get(key)
        if key in given and (not isinstance(value, str) or not value.strip()):
            raise ValueError(f"failfast: {key!r} must be a non-empty string; got {value!r}.")
    if "draft_tensor_parallel_size" in given:
        _integer(given, "draft_tensor_parallel_size", 1, 1, 1024)
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


def check_local_drafter(model: str) -> None:
    """Refuse a local drafter that cannot be one, before vLLM loads anything; raises ValueError."""
    for word in METHOD_WORDS:
        if word in model.lower():
            raise ValueError(
                f"failfast: vLLM takes a drafter with {word!r} in its path for another method; "
                f"got {model!r}. Rename the directory."
            )
    path = Path(model)
    if not path.is_dir():
        if model.startswith(("/", ".", "~")) or model.count("/") > 1:  # no hub id looks so
            raise ValueError(
                f"failfast: the drafter {model!r} is not a directory; "
                "give a checkpoint directory or a hub id."
            )
        return
    config_path = path / "config.json"
    try:
        config = json.loads(config_path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(
            f"failfast: cannot read the drafter's {config_path} ({error}); "
            f"give a complete {_NAMES} checkpoint."
        ) from None
    check_drafter_config(model, config if isinstance(config, dict) else {})
    if not any(path.glob("*.safetensors")):
        others = sorted(p.name for p in (*path.glob("*.bin"), *path.glob("*.pt")))
        raise ValueError(
            f"failfast: the drafter {model!r} has no .safetensors file "
            f"(got {', '.join(others) or 'no weights'}); convert it, pickles are never loaded."
        )


def check_drafter_config(model: str, config: Mapping[str, Any]) -> Family:
    """The drafter's family; raises ValueError on another architecture or block size."""
    architectures = config.get("architectures")
    family = family_of(architectures)
    if family is None:
        found = architectures if isinstance(architectures, list) else []
        known = " or ".join(family.architecture for family in FAMILIES)
        raise ValueError(
            f"failfast: the drafter {model!r} must be a {known}; "
            f"got {', '.join(map(str, found)) or 'no architecture'}. "
            "For an autoregressive drafter use vLLM's own method 'draft_model'."
        )
    if config.get("model_type") not in family.model_types:
        raise ValueError(
            f"failfast: the drafter {model!r} must have the 'model_type' "
            f"{family.model_types[0]!r}; got {config.get('model_type')!r}. "
            "Set it in its config.json."
        )
    size = family.block_size(config)
    if isinstance(size, bool) or size not in DIFFUSION_BLOCK_SIZES:
        raise ValueError(
            f"failfast: the drafter {model!r} must have a {family.block_size_key!r} of "
            f"{', '.join(map(str, DIFFUSION_BLOCK_SIZES))}; got {size!r}."
        )
    return family


def undivided_size(config: Mapping[str, Any], num_ranks: int) -> str | None:
    """The first size of a drafter that `num_ranks` tensor-parallel ranks cannot share, or None.

    Fewer KV heads than ranks are copied, as vLLM does it; the vocabulary is padded to 64.
    """
    num_kv_heads = config.get("num_key_value_heads") or config["num_attention_heads"]
    remainders = {
        "num_attention_heads": config["num_attention_heads"] % num_ranks,
        "num_key_value_heads": num_kv_heads % num_ranks and num_ranks % num_kv_heads,
        "intermediate_size": config["intermediate_size"] % num_ranks,
        "vocab_size": -(-config["vocab_size"] // 64) * 64 % num_ranks,
    }
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
        return _integer(config, "mask_token_id", 0, 0, config["vocab_size"] - 1)
    if family.mask_token in drafter_vocab:
        return drafter_vocab[family.mask_token]
    if config.get("vocab_size") in QWEN_VOCAB_SIZES:
        return family.published_mask_token_id
    raise ValueError(
        f"failfast: the drafter's MASK token is unknown (no {family.mask_token!r} in its "
        "tokenizer); "
        "set 'mask_token_id' in its config.json."
    )


def _integer(given: Mapping[str, Any], key: str, default: int, low: int, high: int) -> int:
    value = given.get(key, default)
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise ValueError(
            f"failfast: {key!r} must be an integer from {low} to {high}; got {value!r}."
        )
    return value
