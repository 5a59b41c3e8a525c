"""Where does a round with drafts go? Time of the host by function, and of the GPU.

    python benchmarks/gpu/rounds.py [--json FILE] [--tiny]

The engine of `engine.py real` that drafts ten tokens in each step: RANDOM weights, SYNTHETIC
acceptance. In one process, unlike a server. A function's time holds that of those it calls, and
where it waits for the GPU, the GPU's. The busy time of the GPU is of rounds under a profiler.
"""

import argparse
import collections
import contextlib
import functools
import importlib
import itertools
import json
import os
import sys
import tempfile
import time
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1]))
from gpu import engine as kit

FUNCTIONS = {
    "vllm.v1.engine.core:EngineCore": "post_step",
    "vllm.v1.core.sched.scheduler:Scheduler": "schedule update_from_output",
    "vllm.v1.worker.gpu.model_runner:GPUModelRunner": (
        "execute_model add_requests prepare_inputs prepare_attn sample_tokens sample"
    ),
    "vllm.v1.worker.gpu.async_utils:AsyncOutput": "get_output",
    "failfast_vllm.integration.session:Session": "step _gather",
    "failfast_vllm.integration.v2:StepView": "start_reading read_outcome read_state hand_out",
    "failfast_vllm.drafting.drafter:Drafter": "propose _begin _pass _judge _increments _keep",
    "failfast_vllm.drafting.workspace:Workspace": "__init__ rows masks fill settle",
    "failfast_vllm.drafters.hosted:HostedDraftModel": "forward _run confidence",
}
REQUESTS, TOKENS = (1, 8, 32), 160
PROFILED = 48  # tokens under the profiler


def timed(times, stack):
    """Add up calls and seconds of `FUNCTIONS` in `times`, {name: [calls, seconds]}."""

    def wrap(label, original):
        @functools.wraps(original)
        def call(*args, **more):
            began = time.perf_counter()
            try:
                return original(*args, **more)
            finally:
                times[label][0] += 1
                times[label][1] += time.perf_counter() - began

        return call

    for place, names in FUNCTIONS.items():
        module, name = place.split(":")
        owner = getattr(importlib.import_module(module), name)
        for method in names.split():
            original = getattr(owner, method)
            setattr(owner, method, wrap(f"{name}.{method}", original))
            stack.callback(setattr, owner, method, original)


def busy_ms(answer):
    """What `answer` returns, and ms in which the GPU ran something meanwhile; None without one."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    if not torch.cuda.is_available():
        return answer(), None
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        found = answer()
    return found, kit.busy_ms(kit.gpu_events(profiler))


def run(spec, loads, num_tokens, report):
    """Time an engine's rounds at each number of requests, and report what was found."""
    from vllm import SamplingParams

    from failfast_vllm.tools import offline

    times = collections.defaultdict(lambda: [0, 0.0])
    with offline.engine(spec["speculative"], **spec["engine"]) as llm, contextlib.ExitStack() as s:
        timed(times, s)

        def answer(num_requests, max_tokens):
            prompts = kit.drawn_prompts(spec, num_requests, spec["loads"][0][1])
            params = SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True)
            began = time.perf_counter()
            llm.generate(prompts, params, use_tqdm=False)
            return (time.perf_counter() - began) * 1e3

        def rounds(num_requests, max_tokens):
            times.clear()
            ms = answer(num_requests, max_tokens)
            return ms, max(1, times["Session.step"][0])

        for num_requests in loads:
            answer(num_requests, num_tokens)  # compiles, and fills caches
            first_ms = answer(num_requests, 1)
            ms, steps = rounds(num_requests, num_tokens)
            found = {
                "requests": num_requests,
                "rounds": steps,
                "ms_per_round": round((ms - first_ms) / steps, 3),
                "host_ms_per_round": {k: round(s / steps * 1e3, 3) for k, (_, s) in times.items()},
            }
            few = functools.partial(rounds, num_requests, min(PROFILED, num_tokens))
            (_, steps), gpu_ms = busy_ms(few)
            if gpu_ms is not None:
                found["gpu_busy_ms_per_round"] = round(gpu_ms / steps, 3)
            report(found)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="written after every load")
    parser.add_argument("--tiny", action="store_true", help="the script itself, on a CPU")
    args = parser.parse_args()
    os.environ |= {**kit.ENVIRONMENT, "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    with tempfile.TemporaryDirectory() as name:
        specs = itertools.chain.from_iterable(kit.real_waves(args.tiny, Path(name)))
        spec = next(spec for spec in specs if "failfast K10" in spec["name"])
        if spec["synthetic_rate"]:
            kit.accept_synthetically(spec["synthetic_rate"])
        found = {"engine": spec["name"], "loads": []}

        def report(load):
            found["loads"].append(load)
            print(json.dumps(load), flush=True)
            if args.json:
                args.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")

        run(spec, (1, 3) if args.tiny else REQUESTS, 16 if args.tiny else TOKENS, report)


if __name__ == "__main__":
    main()
