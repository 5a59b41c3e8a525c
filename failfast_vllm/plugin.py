"""Plugin entry point; hooks do nothing unless the engine uses failfast.

`register` runs in every vLLM process and must be cheap, so it hooks only what an argument parser
and a configuration need. docs/architecture.md lists the hooks; `failfast doctor` checks them.
"""

import sys
from typing import Any

from failfast_vllm.config import parse
from failfast_vllm.integration import hooks
from failfast_vllm.integration.engine_hooks import install_metrics


def register() -> None:
    """Entry point of the group `vllm.general_plugins`. Idempotent; never raises."""
    if problem := hooks.version_problem() or hooks.stage_problem("configuration"):
        hooks.logger.warning("failfast is off: %s", problem)
        _refuse(problem)
        return
    hooks.install("configuration")
    # a process that has one of these modules may be handed a pickled config
    if "vllm.v1.worker.worker_base" in sys.modules:
        hooks.install("worker")
    if "vllm.v1.engine.input_processor" in sys.modules and not hooks.stage_problem("requests"):
        hooks.install("requests")
    if "vllm.v1.engine.core" in sys.modules:  # an engine's process, or a front end
        install_metrics()
        if not hooks.stage_problem("engine"):
            hooks.install("engine")


def _refuse(problem: str) -> None:
    """Let this vLLM serve everything but failfast."""
    from vllm.engine.arg_utils import EngineArgs

    def refuse(original: Any, self: Any) -> Any:
        if parse(self.speculative_config) is not None:
            raise ValueError(f"failfast: this vLLM cannot run it: {problem}")
        return original()

    creation, arguments = hooks.hooks_of("configuration")[:2]
    if hasattr(EngineArgs, "create_speculative_config"):
        hooks.wrap(creation._replace(body=refuse))
    if hasattr(EngineArgs, "add_cli_args"):  # so that the bare word meets the refusal
        hooks.wrap(arguments)
