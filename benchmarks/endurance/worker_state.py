"""What a worker remembers of requests, for `--worker-extension-cls worker_state.WorkerState`.

vLLM's development endpoint `/collective_rpc` calls it by name.
"""

from typing import Any

from failfast_vllm.integration.session import adapter_of


class WorkerState:
    """Mixed into vLLM's worker, of the V1 model runner."""

    model_runner: Any

    def requests_remembered(self) -> dict[str, int]:
        """Requests that the runner knows, and drafts of failfast that are open."""
        runner = self.model_runner
        found = {"runner": len(runner.requests), "rows": runner.input_batch.num_reqs}
        adapter = adapter_of(runner)
        if adapter is not None:
            found["open_drafts"] = len(adapter.session.ledger)
            found["postponed_steps"] = int(adapter.postponed is not None)
        return found
