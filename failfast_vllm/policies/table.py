"""All policies by the names that users give."""

from collections.abc import Mapping
from typing import Any

from failfast_vllm.policies.alternatives import AdaEdl, DiffuSpecAdl, Survival, Svip
from failfast_vllm.policies.bandit import TapOut
from failfast_vllm.policies.parameters import Limits, parameters_of
from failfast_vllm.policies.rules import (
    Confidence,
    FailFast,
    Fixed,
    Goodput,
    NamedPolicy,
    SpecDecPlusPlus,
)

POLICIES: dict[str, type[NamedPolicy]] = {
    "failfast": FailFast,
    "fixed": Fixed,
    "confidence": Confidence,
    "svip": Svip,
    "adaedl": AdaEdl,
    "specdec++": SpecDecPlusPlus,
    "survival": Survival,
    "goodput": Goodput,
    "tapout": TapOut,
    "diffuspec-adl": DiffuSpecAdl,
}
PARAMETERS = {name: parameters_of(policy) for name, policy in POLICIES.items()}
ARMS = tuple(name for name, policy in POLICIES.items() if policy.is_arm)


def policy_parameters(name: str, given: Mapping[str, Any], cap: int) -> dict[str, Any]:
    """All parameters of a policy, checked; raises ValueError, also on another policy's.

    Args:
        given: the keys of the user; the others have their defaults.
        cap: `num_speculative_tokens`.
    """
    for key in given:
        owners = [owner for owner, parameters in PARAMETERS.items() if key in parameters]
        if owners and name not in owners:
            raise ValueError(
                f"failfast: {key!r} belongs to the policy {' or '.join(map(repr, owners))}; "
                f"got the policy {name!r}. Remove the key or change 'policy'."
            )
    limits = Limits(cap, ARMS)
    return {key: item.check(given, key, limits) for key, item in PARAMETERS[name].items()}


def make_policy(name: str, knobs: Mapping[str, Any], cap: int) -> NamedPolicy:
    """Build the policy that the configuration names.

    Args:
        knobs: all of its parameters, checked; other keys are ignored.
        cap: `num_speculative_tokens`.
    """
    parameters = {key: knobs[key] for key in PARAMETERS[name]}
    policy = POLICIES[name]
    if policy is TapOut:
        arms = [make_policy(arm, policy_parameters(arm, {}, cap), cap) for arm in knobs["arms"]]
        return TapOut(**parameters, policies=arms, cap=cap)
    return policy(**parameters)
