"""What a single request may ask of its drafts, and the hooks that admit requests.

The keys below come in `SamplingParams.extra_args`, over HTTP in `vllm_xargs`. They only tighten
what the server was started with, and are checked where the request is admitted.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from failfast_vllm.config import METHOD
from failfast_vllm.errors import echo
from failfast_vllm.integration.hooks import asked_for, hook

MAX_LEN = "failfast_max_len"
CONFIDENCE_THRESHOLD = "failfast_confidence_threshold"
KEYS = (MAX_LEN, CONFIDENCE_THRESHOLD)


class Asked(NamedTuple):
    """What the requests of one step ask: arrays of [num_reqs]."""

    max_draft_lens: npt.NDArray[np.int64]  # most tokens per draft, whatever the engine allows
    min_confidences: npt.NDArray[np.float32]  # an increment with a token below it is the last
    stops_at_eos: npt.NDArray[np.bool_]
    ended: npt.NDArray[np.bool_]  # a stop token came: the scheduler finishes it there


def check(params: Any, num_speculative_tokens: int, confidence_threshold: float) -> None:
    """Refuse what a request may not ask of a server with these settings; raises ValueError."""
    if getattr(params, "logprob_token_ids", None):  # vLLM answers without them, or its engine dies
        raise ValueError(
            "failfast: 'logprob_token_ids' does not go with speculative decoding; "
            f"got {echo(params.logprob_token_ids)}. Use 'logprobs'."
        )
    extra_args: Mapping[str, Any] = getattr(params, "extra_args", None) or {}
    given = {k: v for k, v in extra_args.items() if isinstance(k, str) and k.startswith(METHOD)}
    for key in given:
        if key not in KEYS:
            must = f"use one of {', '.join(KEYS)}."
            raise ValueError(f"failfast: unknown key {echo(key)} in a request; {must}")
    for key, kind, types, low, high in (
        (MAX_LEN, "an integer", int, 0, num_speculative_tokens),
        (CONFIDENCE_THRESHOLD, "a probability", int | float, confidence_threshold, 1.0),
    ):
        value = given.get(key, low)
        if not _is(value, types) or not low <= value <= high:
            raise ValueError(
                f"failfast: {key!r} must be {kind} from {low} to {high} on this server; "
                f"got {echo(value)}."
            )


def asked(
    params: Sequence[Any],
    emitted: Sequence[Sequence[int]],
    eos_token_ids: frozenset[int],
    num_speculative_tokens: int,
) -> Asked:
    """Read vLLM's SamplingParams of a step's requests, and `emitted`, their tokens of the step.

    Not every front end checks them (`check`), so a value that is out of range is brought into it,
    and one of another kind is ignored: a request must not end the engine of all others.
    """
    num_reqs = len(params)
    found = Asked(
        max_draft_lens=np.full(num_reqs, num_speculative_tokens, dtype=np.int64),
        min_confidences=np.zeros(num_reqs, dtype=np.float32),
        stops_at_eos=np.array([not param.ignore_eos for param in params], dtype=bool),
        ended=np.empty(num_reqs, dtype=bool),
    )
    for i, (param, token_ids) in enumerate(zip(params, emitted, strict=True)):
        stops = eos_token_ids if found.stops_at_eos[i] else frozenset()
        found.ended[i] = not stops.union(param.stop_token_ids or ()).isdisjoint(token_ids)
        if param.extra_args:
            max_len = param.extra_args.get(MAX_LEN)
            if _is(max_len, int):
                found.max_draft_lens[i] = min(max(max_len, 0), num_speculative_tokens)
            threshold = param.extra_args.get(CONFIDENCE_THRESHOLD)
            if _is(threshold, int | float) and threshold == threshold:  # no NaN
                found.min_confidences[i] = min(max(threshold, 0.0), 1.0)
    return found


def _is(value: Any, types: Any) -> bool:
    """Whether it is of a type; `bool` is no number."""
    return isinstance(value, types) and not isinstance(value, bool)


@hook("requests", "vllm.v1.engine.input_processor:InputProcessor._validate_params")
def check_request(original: Any, self: Any, params: Any, supported_tasks: Any) -> Any:
    """Checks a request's own limits before it is admitted: they are the client's error.

    Goes when: vLLM lets plugins check a request's `extra_args`.
    """
    if asked_for(self.vllm_config):
        from vllm.exceptions import VLLMValidationError

        knobs = self.vllm_config.additional_config[METHOD]
        try:
            check(params, knobs["num_speculative_tokens"], knobs.get("confidence_threshold", 0.0))
        except ValueError as error:
            raise VLLMValidationError(str(error)) from None
    return original()


@hook("requests", "vllm.sampling_params:SamplingParams._validate_spec_decode")
def admit_undrafted(original: Any, self: Any, speculative_config: Any) -> None:
    """Serves requests with `min_p` or `logit_bias` without drafts, which vLLM would refuse.

    Goes when: vLLM admits them beside a drafter.
    """
    if not getattr(speculative_config, METHOD, False):
        original()
