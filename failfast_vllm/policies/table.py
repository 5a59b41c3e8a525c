"""All policies by the names that users give."""

from collections.abc import Mapping
from typing import Any

from failfast_vllm.policies import alternatives, rules
from failfast_vllm.policies.parameters import parameters_of

POLICIES: dict[str, type[rules.NamedPolicy]] = {
    "failfast": rules.FailFast,
    "fixed": rules.Fixed,
    "confidence": rules.Confidence,
    "svip": alternatives.Svip,
    "adaedl": alternatives.AdaEdl,
    "specdec++": rules.SpecDecPlusPlus,
    "survival": alternatives.Survival,
    "goodput": rules.Goodput,
    "tapout": alternatives.TapOut,
    "diffuspec-adl": alternatives.DiffuSpecAdl,
}
PARAMETERS = {name: parameters_of(policy) for name, policy in POLICIES.items()}
# what a bandit may choose among: what decides by itself
ARMS = tuple(n for n, p in POLICIES.items() if not p.needs_planner and n != "tapout")


def policy_parameters(name: str, given: Mapping[str, Any], cap: int) -> dict[str, Any]:
    """All parameters of a policy, checked; raises ValueError, also on another policy's.

    `given` are the keys of the user, `cap` is `num_speculative_tokens`.
    """
    for key in given:
        owners = [owner for owner, parameters in PARAMETERS.items() if key in parameters]
        if owners and name not in owners:
            raise ValueError(
                f"failfast: {key!r} belongs to the policy {' or '.join(map(repr, owners))}; "
                f"got the policy {name!r}. Remove the key or change 'policy'."
            )
    return {key: item.check(given, key, cap, ARMS) for key, item in PARAMETERS[name].items()}


def make_policy(name: str, knobs: Mapping[str, Any], cap: int) -> rules.NamedPolicy:
    """Build a policy from `knobs`, among them all its parameters, checked; `cap` as above."""
    parameters = {key: knobs[key] for key in PARAMETERS[name]}
    policy = POLICIES[name]
    if policy is alternatives.TapOut:
        arms = [make_policy(arm, policy_parameters(arm, {}, cap), cap) for arm in knobs["arms"]]
        return alternatives.TapOut(**parameters, policies=arms, cap=cap)
    return policy(**parameters)
