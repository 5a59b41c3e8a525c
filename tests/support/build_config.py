"""The engine config that vLLM builds of what a user gives, and its refusals."""

import json

import pytest
from vllm.engine.arg_utils import EngineArgs

from failfast_vllm.config import MODELS_DIR

TARGET = MODELS_DIR / "target"


def build(speculative_config, model=TARGET, **engine_args):
    """The engine config of a server started this way; no weights are loaded."""
    args = EngineArgs(model=str(model), speculative_config=speculative_config, **engine_args)
    return args.create_engine_config()


def refusal(speculative_config, **engine_args):
    """The message of the ValueError that a config must raise."""
    with pytest.raises(ValueError, match=r"\Afailfast: ") as caught:
        build(speculative_config, **engine_args)
    message = str(caught.value)
    assert "\n" not in message
    return message


def edit(path, **changes):
    """Replace fields of a JSON file; None removes one."""
    fields = {**json.loads(path.read_text(encoding="utf-8")), **changes}
    fields = {key: value for key, value in fields.items() if value is not None}
    path.write_text(json.dumps(fields), encoding="utf-8")
