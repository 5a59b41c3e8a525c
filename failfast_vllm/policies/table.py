"""All policies by the names that users give."""

from collections.abc import Mapping
from typing import Any

from failfast_vllm.drafting.interfaces import Policy
from failfast_vllm.policies import rules
from failfast_vllm.policies.parameters import parameters_of

POLICIES: dict[str, type[Policy]] = {
    "failfast": rules.FailFast,
    "fixed": rules.Fixed,
}
PARAMETERS = {name: parameters_of(policy) for name, policy in POLICIES.items()}


def policy_parameters(name: str, given: Mapping[str, Any]) -> dict[str, float]:
    """All parameters of a policy, checked; raises ValueError, also on another policy's.

    `given` are the keys of the user.
    """
    for key in given:
        owners = [owner for owner, parameters in PARAMETERS.items() if key in parameters]
        if owners and name not in owners:
            raise ValueError(
                f"failfast: {key!r} belongs to the policy {' or '.join(map(repr, owners))}; "
                f"got the policy {name!r}. Remove the key or change 'policy'."
            )
    return {key: item.read(given, key) for key, item in PARAMETERS[name].items()}


def make_policy(knobs: Mapping[str, Any]) -> Policy:
    """Build the policy that checked `knobs` name, with its parameters."""
    name = knobs["policy"]
    return POLICIES[name](**{key: knobs[key] for key in PARAMETERS[name]})
