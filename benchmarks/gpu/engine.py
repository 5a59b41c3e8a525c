"""The real engine with and without failfast on a GPU: is it lossless, and what does a step cost?

Nothing here has run on a GPU yet.

    python benchmarks/gpu/engine.py small    the shipped pair: answers compared, token by token
    python benchmarks/gpu/engine.py real     the shapes of 7B + 1.5B, RANDOM weights, SYNTHETIC
                                             acceptance: what a step costs, never what is accepted
    python benchmarks/gpu/engine.py small --tiny    the script itself, on a CPU

Each engine is a process of its own with a time limit, so one failure costs one line. The exit
status is 1 if an engine failed or had no time (the last ones may), float32 answers differ, or
nothing was drafted.
"""

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

QWEN_7B = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "vocab_size": 152064,
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "tie_word_embeddings": False,
    "hidden_act": "silu",
    "torch_dtype": "bfloat16",
    "use_sliding_window": False,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
}
FAST_DLLM_1B5 = {
    **QWEN_7B,
    "architectures": ["Fast_dLLM_QwenForCausalLM"],
    "model_type": "Fast_dLLM_Qwen",
    "hidden_size": 1536,
    "intermediate_size": 8960,
    "num_attention_heads": 12,
    "num_key_value_heads": 2,
    "vocab_size": 151936,
    "tie_word_embeddings": True,
    "bd_size": 32,
    "mask_token_id": 151665,
}
TINY = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": 2000,
}
NO_COMPILE = {"mode": 0, "cudagraph_mode": "FULL"}  # full graphs, vLLM's kernels as they are
GRAPH_SIZES = [1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512]
RANDOM = "RANDOM weights"
MIN_SECONDS = 20  # below it an engine is not started: loading takes as long
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
    "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",  # `worker_facts` travels to the engine's process
    "OMP_NUM_THREADS": "1",  # as vLLM sets it
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
}


def small_runs(tiny):
    """The shipped pair: float32 and bfloat16; eager, full graphs, vLLM's default."""
    from transformers import AutoTokenizer

    from failfast_vllm.config import MODELS_DIR
    from failfast_vllm.tools.offline import encode

    lines = (MODELS_DIR / "prompts.jsonl").read_text(encoding="utf-8").splitlines()
    tokenizer = AutoTokenizer.from_pretrained(MODELS_DIR / "target")
    prompts = [encode(tokenizer, json.loads(line)) for line in lines[: 3 if tiny else 24]]
    loads = [(1, 24), (3, 24)] if tiny else [(1, 128), (24, 128)]  # (requests at once, tokens)
    hows = {
        "eager": {"enforce_eager": True},
        "full graphs": {"compilation_config": NO_COMPILE},
        "default": {},
    }
    alone = {"method": "failfast", "load_aware": False}
    pairs = [(dtype, how) for dtype in ("float32", "bfloat16") for how in hows]
    pairs.sort(key=("float32", "default").__eq__)  # last, if there is time
    for dtype, how in pairs[: 1 if tiny else None]:
        methods = {"none": None, "failfast, not by load": alone}
        if how == "default":
            methods["failfast"] = {"method": "failfast"}
        for method, speculative in methods.items():
            yield {
                "name": f"{dtype}, {how}: {method}",
                "pair": f"{dtype}, {how}",
                "speculative": speculative,
                "must_draft": speculative == alone,
                "must_agree": dtype == "float32",
                "prompts": prompts,
                "loads": loads,
                "engine": {
                    "dtype": dtype,
                    "max_num_seqs": 32,
                    **({} if tiny else {"gpu_memory_utilization": 0.3}),
                    **hows[how],
                },
                "if_time": (dtype, how) == ("float32", "default"),
                "limit_s": 100,
            }


def real_runs(tiny, folder):
    """The shapes of Qwen2.5-7B and Fast-dLLM v2 1.5B; every line says what is made up."""
    target, drafter = QWEN_7B, FAST_DLLM_1B5
    if tiny:
        target, drafter = {**target, **TINY}, {**drafter, **TINY, "mask_token_id": 1999}
    paths = {}
    for name, config in (("target", target), ("drafter", drafter)):
        (folder / name).mkdir()
        (folder / name / "config.json").write_text(json.dumps(config), encoding="utf-8")
        paths[name] = str(folder / name)
    graphs = {"cudagraph_capture_sizes": GRAPH_SIZES}
    full, compiled, eager = (
        {"compilation_config": {**NO_COMPILE, **graphs}},
        {"compilation_config": graphs},
        {"enforce_eager": True},
    )
    if tiny:
        full = compiled = eager

    def run(how, settings, speculative=None, rate=None, if_time=False):
        rate = None if tiny else rate  # vLLM's sampler for CPUs knows no synthetic acceptance
        label = RANDOM + (f", SYNTHETIC acceptance: {rate} of each token" if rate else "")
        if speculative:
            speculative = {"method": "failfast", "model": paths["drafter"], **speculative}
        return {
            "name": f"7B + 1.5B{' SHRUNKEN' if tiny else ''}, {how} ({label})",
            "label": label,
            "speculative": speculative,
            "synthetic_rate": rate,
            "must_draft": bool(speculative) and speculative["load_aware"] is False,
            "loads": [(1, 24, 24)] if tiny else [(1, 512, 256), (8, 512, 128), (32, 512, 64)],
            "token_ids_below": drafter["vocab_size"] - 400,
            "engine": {
                "model": paths["target"],
                "load_format": "dummy",
                "skip_tokenizer_init": True,
                "dtype": "bfloat16",
                "max_num_seqs": 32,
                "max_num_batched_tokens": 4096,
                **({} if tiny else {"gpu_memory_utilization": 0.85}),
                **settings,
            },
            "own_process": not tiny,  # as it is served
            "if_time": if_time,
            "limit_s": 120,
        }

    def fixed(k):  # always k tokens, in passes of ten: what a round costs, not how long it gets
        return {"num_speculative_tokens": k, "confidence_threshold": 0.0, "load_aware": False}

    k10, k20 = fixed(10), fixed(20)
    by_load = {"num_speculative_tokens": 60, "confidence_threshold": 0.0, "load_aware": True}
    sync = {"async_scheduling": False}
    yield run("none, full graphs", full)
    yield run("failfast K10, full graphs", full, k10, 0.9)
    if tiny:
        return
    yield run("none, synchronous, full graphs", {**full, **sync})
    yield run("failfast K20, full graphs", full, k20, 0.95, if_time=True)
    yield run("failfast K10, eager", eager, k10, 0.9, if_time=True)
    yield run("failfast K60 by load, full graphs", full, by_load, 0.9, if_time=True)
    yield run("none, default", compiled, if_time=True)
    yield run("failfast K10, default", compiled, k10, 0.9, if_time=True)


def accept_synthetically(rate):
    """vLLM's rejection sampler shall accept `rate` of the tokens, whatever the target says.

    Set on vLLM's own config behind failfast, which does not offer it: answers become meaningless.
    """
    from vllm.engine.arg_utils import EngineArgs
    from vllm.plugins import load_general_plugins

    load_general_plugins()
    original = EngineArgs.create_speculative_config

    def create_speculative_config(self, *args, **kwargs):
        config = original(self, *args, **kwargs)
        config.rejection_sample_method = "synthetic"
        config.synthetic_acceptance_rates = [  # unconditional, by position
            rate ** (i + 1) for i in range(config.num_speculative_tokens)
        ]
        return config

    EngineArgs.create_speculative_config = create_speculative_config


def worker_facts(worker):
    """What only the worker knows: the drafter's counters, and memory. Runs in its process."""
    import torch

    runner = worker.model_runner
    adapter = getattr(runner, "speculator", None) or getattr(runner, "drafter", None)
    stats = getattr(adapter, "stats", None)
    names = ("num_steps", "num_forwards", "forward_ms", "total_ms")
    facts = {name: getattr(stats, name) for name in names if hasattr(stats, name)}
    if torch.cuda.is_available():
        facts["gpu_gib"] = torch.cuda.max_memory_allocated() / 2**30
    return facts


def one_engine(spec):
    """Start one engine and time its loads; returns the line of results."""
    import torch
    from vllm import SamplingParams

    from failfast_vllm.tools import offline

    if spec.get("synthetic_rate"):
        accept_synthetically(spec["synthetic_rate"])
    began = time.perf_counter()
    with offline.engine(spec["speculative"], **spec["engine"]) as llm:
        config = llm.llm_engine.vllm_config
        result = {
            "start_s": round(time.perf_counter() - began, 1),
            "async": bool(config.scheduler_config.async_scheduling),
            "graphs": str(config.compilation_config.cudagraph_mode),
        }

        def answer(prompts, max_tokens):
            params = SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True)
            began = time.perf_counter()
            outputs = llm.generate(prompts, params, use_tqdm=False)
            seconds = time.perf_counter() - began
            return [list(output.outputs[0].token_ids) for output in outputs], seconds

        for num_requests, *length, num_tokens in spec["loads"]:
            prompts = spec.get("prompts", [])[:num_requests]
            if length:
                generator = torch.Generator().manual_seed(num_requests)
                shape = (num_requests, *length)
                ids = torch.randint(10, spec["token_ids_below"], shape, generator=generator)
                prompts = [{"prompt_token_ids": row} for row in ids.tolist()]
            answer(prompts, min(16, num_tokens))  # compiles, and fills caches
            _, first = answer(prompts, 1)
            before = llm.collective_rpc(worker_facts)[0]
            answers, seconds = answer(prompts, num_tokens)
            after = llm.collective_rpc(worker_facts)[0]
            load = {
                "tokens_per_s": round(num_requests * num_tokens / seconds, 1),
                "ms_per_token": round((seconds - first) / (num_tokens - 1) * 1e3, 3),
                "first_token_ms": round(first * 1e3, 1),
            }
            if "num_steps" in after:
                steps, passes, pass_ms, draft_ms = (
                    after[key] - before[key]
                    for key in ("num_steps", "num_forwards", "forward_ms", "total_ms")
                )
                load |= {
                    "steps": steps,
                    "passes": passes,
                    "tokens_per_step": round(num_tokens / max(1, steps), 2),
                    "draft_ms_per_step": round(draft_ms / max(1, steps), 3),
                    "pass_ms": round(pass_ms / max(1, passes), 3),
                }
            result[f"{num_requests} requests"] = load
            if "pair" in spec:
                result.setdefault("answers", []).extend(answers)
        if "gpu_gib" in after:
            result["gpu_gib"] = round(after["gpu_gib"], 2)
    return result


def first_difference(ours, plain):
    """Index of the first token in which two answers differ, None where they are equal."""
    for i, (a, b) in enumerate(zip(ours, plain, strict=False)):
        if a != b:
            return i
    return None if len(ours) == len(plain) else min(len(ours), len(plain))


def compare(ours, plain):
    """How many of two engines' answers are the same, and where the others part."""
    assert len(ours) == len(plain)
    places = [first_difference(a, b) for a, b in zip(ours, plain, strict=True)]
    differing = sorted(place for place in places if place is not None)
    return {
        "same_answers": f"{len(ours) - len(differing)} of {len(ours)}",
        "first_differences": differing[:5],
    }


def judge(spec, result, plain):
    """Add the comparison to `result` and take the answers out of it; returns what is wrong.

    Args:
        plain: the answers of the same engine without drafts, None where there are none.
    """
    answers = result.pop("answers", None)
    problems = []
    if spec["speculative"] and answers is not None:
        if plain is None:
            problems.append("nothing to compare with: the engine without drafts gave no answers")
        else:
            result |= compare(answers, plain)
            if result["first_differences"] and spec["must_agree"]:
                problems.append(f"only {result['same_answers']} answers are the same")
    loads = [value for key, value in result.items() if key.endswith(" requests")]
    if spec.get("must_draft") and not all(load.get("passes") for load in loads):
        problems.append("nothing was drafted")
    return "; ".join(problems)


def run_process(spec, folder, seconds):
    """`one_engine` in a process of its own; returns (result or None, why not, its output)."""
    spec_path, result_path, log_path = (
        folder / name for name in ("spec.json", "result.json", "log")
    )
    result_path.unlink(missing_ok=True)
    spec_path.write_text(json.dumps(spec), encoding="utf-8")
    env = {**ENVIRONMENT, **os.environ}
    env["VLLM_ENABLE_V1_MULTIPROCESSING"] = "1" if spec.get("own_process") else "0"
    command = [sys.executable, __file__, "--one", str(spec_path), str(result_path)]
    with log_path.open("w") as log:
        # a session of its own: what the engine has started must end with it
        process = subprocess.Popen(
            command, env=env, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            problem = f"exit status {process.wait(timeout=seconds)}"
        except subprocess.TimeoutExpired:
            problem = f"no result after {seconds:.0f} s"
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    output = log_path.read_text(errors="replace")
    if result_path.exists():
        return json.loads(result_path.read_text(encoding="utf-8")), "", output
    last = [line.strip()[-300:] for line in output.splitlines() if line.strip()][-3:]
    return None, " | ".join([problem, *last]), output


def run_all(runs, folder, until, report):
    """Run each spec and hand its line to `report`; returns how many were wrong."""
    plain, num_wrong = {}, 0
    for spec in runs:
        line = {key: spec[key] for key in ("name", "label") if key in spec}
        left = until - time.monotonic()
        if left < MIN_SECONDS:
            line["left out" if spec.get("if_time") else "problem"] = "no time left"
        else:
            result, problem, output = run_process(spec, folder, min(spec["limit_s"], left))
            print(f"===== {spec['name']}\n{output[-60_000:]}", file=sys.stderr, flush=True)
            if result is not None:
                if not spec["speculative"]:
                    plain[spec.get("pair")] = result.get("answers")
                problem = judge(spec, result, plain.get(spec.get("pair")))
                line |= result
            if problem:
                line["problem"] = problem
        num_wrong += "problem" in line
        report(line)
    return num_wrong


def main():
    if sys.argv[1:2] == ["--one"]:
        spec = json.loads(Path(sys.argv[2]).read_text(encoding="utf-8"))
        Path(sys.argv[3]).write_text(json.dumps(one_engine(spec)), encoding="utf-8")
        return 0
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("kind", choices=("small", "real"))
    parser.add_argument("--seconds", type=float, default=3600, help="no engine starts after these")
    parser.add_argument("--json", type=Path, help="written after every engine")
    parser.add_argument("--tiny", action="store_true", help="the script itself, on a CPU")
    args = parser.parse_args()
    until = time.monotonic() + args.seconds
    lines = []

    def report(line):
        lines.append(line)
        print(json.dumps(line), flush=True)
        if args.json:
            args.json.write_text(json.dumps({"engines": lines}, indent=1) + "\n", encoding="utf-8")

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        runs = small_runs(args.tiny) if args.kind == "small" else real_runs(args.tiny, folder)
        num_wrong = run_all(runs, folder, until, report)
    return 1 if num_wrong else 0


if __name__ == "__main__":
    sys.exit(main())
