"""The real engine with and without failfast on a GPU: is it lossless, and what does a step cost?

    python benchmarks/gpu/engine.py small    the shipped pair: answers compared, token by token
    python benchmarks/gpu/engine.py real     the shapes of 7B + 1.5B, RANDOM weights, SYNTHETIC
                                             acceptance: what a step costs, never what is accepted
    python benchmarks/gpu/engine.py small --tiny    the script itself, on a CPU

Engines stand side by side, each in a process of its own, so one failure costs one line; those that
are timed take turns. The exit status is 1 if an engine failed or had no time (the second wave of
`real` may), float32 answers differ, or nothing was drafted.
"""

import argparse
import contextlib
import itertools
import json
import os
import select
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
RANDOM = "RANDOM weights"
# engines stand side by side on one card: each takes what it needs, and this much for the KV cache
MEMORY = {"gpu_memory_utilization": 0.05, "kv_cache_memory_bytes": 2 << 30}
TIE = 2e-3  # a lead that rounding turns over in float32: so differ vLLM's own engines there
PROFILE = -1  # a load under a profiler
PROFILED_SHARE = 0.3  # of its time, the last: decoding
NO_TIME = "no time left"
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
    for dtype, how in pairs[: 1 if tiny else None]:
        methods = {"none": None, "failfast, not by load": alone}
        if how == "default":
            methods["failfast"] = {"method": "failfast"}
        if (dtype, how) == ("float32", "default"):  # copies, scheduled ahead
            methods["failfast without a drafter"] = {"method": "failfast", "model": None}
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
                    **({} if tiny else MEMORY),
                    **hows[how],
                },
            }


def real_waves(tiny, folder):
    """The shapes of Qwen2.5-7B and Fast-dLLM v2 1.5B; every line says what is made up.

    Engines of a wave stand on the card together and are timed in turn.
    """
    target, fast_dllm = QWEN_7B, FAST_DLLM_1B5
    if tiny:
        target, fast_dllm = {**target, **TINY}, {**fast_dllm, **TINY, "mask_token_id": 1999}
    paths = {}
    for name, config in (("target", target), ("drafter", fast_dllm)):
        (folder / name).mkdir()
        (folder / name / "config.json").write_text(json.dumps(config), encoding="utf-8")
        paths[name] = str(folder / name)

    def run(name, speculative=None, rate=None, if_time=False, drafter=True, **settings):
        rate = None if tiny else rate  # vLLM's sampler for CPUs knows no synthetic acceptance
        label = RANDOM + (f", SYNTHETIC acceptance: {rate} of each token" if rate else "")
        if speculative is not None:
            model = paths["drafter"] if drafter else None
            speculative = {"method": "failfast", "model": model, **speculative}
        return {
            "name": f"7B + 1.5B{' SHRUNKEN' if tiny else ''}, {name} ({label})",
            "label": label,
            "speculative": speculative,
            "synthetic_rate": rate,
            "must_draft": bool(speculative) and speculative.get("load_aware") is False,
            # of the last, 32 at once
            "loads": [(1, 24, 24)]
            if tiny
            else [(1, 512, 512), (8, 512, 256), (32, 512, 128), (96, 512, 128)],
            "token_ids_below": fast_dllm["vocab_size"] - 400,
            "engine": {
                "model": paths["target"],
                "load_format": "dummy",
                "skip_tokenizer_init": True,
                "dtype": "bfloat16",
                "max_num_seqs": 32,
                "max_num_batched_tokens": 4096,
                **({"enforce_eager": True} if tiny else MEMORY),
                **settings,
            },
            "own_process": not tiny,  # as it is served
            "if_time": if_time,
        }

    def fixed(k):  # always k tokens, in passes of ten: what a round costs, not how long it gets
        return {"num_speculative_tokens": k, "confidence_threshold": 0.0, "load_aware": False}

    by_load = {"confidence_threshold": 0.0}  # long drafts by the planner, as far as they pay
    k10 = run("failfast K10", fixed(10), 0.9, if_time=not tiny)
    if tiny:
        return [[run("none"), k10, run("failfast without a drafter", {}, drafter=False)]]
    first = [
        run("none"),
        run("failfast K60 by load", by_load, 0.9),
        run("failfast by load, nothing accepted", {}),
    ]
    full = {"compilation_config": NO_COMPILE, "if_time": True}
    second = [
        k10,
        run("none, synchronous", if_time=True, async_scheduling=False),
        run("failfast without a drafter", {}, if_time=True, drafter=False),
        run("none, full graphs", **full),
        run("failfast K10, full graphs", fixed(10), 0.9, **full),
        run("failfast K20, full graphs", fixed(20), 0.95, **full),
        run("failfast K10, eager", fixed(10), 0.9, True, enforce_eager=True),
    ]
    return [first, second]


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
    costs = getattr(adapter.drafter.planner, "costs", None) if stats else None
    if costs:  # as the planner believes them to be, by tokens
        sizes = (1, 8, 32, 88, 352)
        tables = {"draft": costs.draft, "verify": costs.verify, "plain": costs.plain}
        facts["costs"] = {name: table(sizes).round(2).tolist() for name, table in tables.items()}
        facts["costs"] |= {"look": round(costs.look_ms, 2), "overhead": round(costs.overhead_ms, 2)}
    if torch.cuda.is_available():
        facts["gpu_gib"] = torch.cuda.max_memory_allocated() / 2**30
    facts["planner"], worker.kit_planner = getattr(worker, "kit_planner", []), []
    return facts


def watch_planner(worker):
    """Keep its looks at drafting, and the times of the steps in between. Runs in the worker."""
    runner = worker.model_runner
    adapter = getattr(runner, "speculator", None) or getattr(runner, "drafter", None)
    planner = adapter.drafter.planner if hasattr(adapter, "stats") else None
    if not hasattr(planner, "costs"):
        return
    looked, rested = planner.step_began, planner.costs.rested

    def step_began(req_ids, num_tokens):
        looks = looked(req_ids, num_tokens)
        worker.kit_planner.append(["looks" if looks else "rests", len(req_ids), num_tokens])
        return looks

    def costs_rested(num_seqs, steps_ms):
        if steps_ms:
            worker.kit_planner.append(["steps", num_seqs, [round(ms, 2) for ms in steps_ms]])
        return rested(num_seqs, steps_ms)

    planner.step_began, planner.costs.rested = step_began, costs_rested


def start_profiler(worker):
    """Runs in the worker."""
    import torch

    if torch.cuda.is_available():
        activities = [torch.profiler.ProfilerActivity.CUDA]
        worker.kit_profiler = torch.profiler.profile(activities=activities)
        worker.kit_profiler.start()


def stop_profiler(worker, share):
    """What the GPU did in the last `share` of the time: ms, and calls by kernel. In the worker."""
    if not hasattr(worker, "kit_profiler"):
        return {}
    worker.kit_profiler.stop()
    events = gpu_events(worker.kit_profiler)
    end = max(event["ts"] + event["dur"] for event in events)
    since = end - share * (end - events[0]["ts"])
    events, kernels = [event for event in events if event["ts"] >= since], {}
    for event in events:
        calls = kernels.setdefault(event["name"][:90], [0, 0.0])
        calls[0], calls[1] = calls[0] + 1, calls[1] + event["dur"] / 1e3
    most = sorted(kernels.items(), key=lambda item: -item[1][1])[:40]
    return {
        "ms": round((end - since) / 1e3, 3),
        "busy_ms": round(busy_ms(events), 3),
        "kernels": [[name, calls, round(ms, 3)] for name, (calls, ms) in most],
    }


def gpu_events(profiler):
    """What ran on the GPU under a profiler that has stopped, in order: in microseconds."""
    with tempfile.NamedTemporaryFile(suffix=".json") as file:
        profiler.export_chrome_trace(file.name)
        events = json.loads(Path(file.name).read_text(encoding="utf-8"))["traceEvents"]
    ran = [e for e in events if e.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")]
    return sorted(ran, key=lambda event: event["ts"])


def busy_ms(events):
    """ms in which something ran: some overlap."""
    busy, until = 0.0, 0.0
    for event in events:
        end = event["ts"] + event["dur"]
        busy += max(0.0, end - max(event["ts"], until))
        until = max(until, end)
    return busy / 1e3


def be_confident(worker, rate):
    """The drafter, whose weights are random, shall claim what is accepted. Runs in the worker."""
    import torch

    model = worker.model_runner.speculator.drafter.model
    confidence = model.confidence

    def claim(rows):
        found = confidence(rows)
        return found._replace(probabilities=torch.full_like(found.probabilities, rate))

    model.confidence = claim


def drawn_prompts(spec, num_requests, length):
    """Prompts of `length` tokens, the same for the same number."""
    import torch

    generator = torch.Generator().manual_seed(num_requests)
    ids = torch.randint(10, spec["token_ids_below"], (num_requests, length), generator=generator)
    return [{"prompt_token_ids": row} for row in ids.tolist()]


def serve(spec, indices, send):
    """Start one engine and send facts about it; run the loads of `indices`, sending a line each."""
    from vllm import SamplingParams

    from failfast_vllm.tools import offline

    if spec.get("synthetic_rate"):
        accept_synthetically(spec["synthetic_rate"])
    began = time.perf_counter()
    with offline.engine(spec["speculative"], **spec["engine"]) as llm:
        config = llm.llm_engine.vllm_config
        facts = {
            "start_s": round(time.perf_counter() - began, 1),
            "async": bool(config.scheduler_config.async_scheduling),
            "graphs": str(config.compilation_config.cudagraph_mode),
        }
        if spec.get("synthetic_rate") and spec["speculative"]["model"]:
            llm.collective_rpc(be_confident, args=(spec["synthetic_rate"],))
        llm.collective_rpc(watch_planner)
        at_start = llm.collective_rpc(worker_facts)[0]
        send(facts | {key: at_start[key] for key in ("gpu_gib", "costs") if key in at_start})

        def generate(prompts, max_tokens, **options):
            options |= {"temperature": 0.0, "max_tokens": max_tokens, "ignore_eos": True}
            outputs = llm.generate(prompts, SamplingParams(**options), use_tqdm=False)
            return [output.outputs[0] for output in outputs]

        def answer(prompts, max_tokens):
            began = time.perf_counter()
            outputs = generate(prompts, max_tokens)
            seconds = time.perf_counter() - began
            return [list(output.token_ids) for output in outputs], seconds

        def leads(prompts, max_tokens):
            """By how much the first token of each place leads the second: log probabilities."""
            for output in generate(prompts, max_tokens, logprobs=2):
                best = [sorted(x.logprob for x in place.values())[-2:] for place in output.logprobs]
                yield [round(first - second, 6) for second, first in best]

        warm = set()
        for index in indices:
            if index == PROFILE:
                num_requests, *length, num_tokens = spec["loads"][-1]
                prompts = drawn_prompts(spec, min(32, num_requests), *length)
                llm.collective_rpc(start_profiler)
                answer(prompts, num_tokens)
                send({"profile": llm.collective_rpc(stop_profiler, args=(PROFILED_SHARE,))[0]})
                continue
            num_requests, *length, num_tokens = spec["loads"][index]
            prompts = spec.get("prompts", [])[:num_requests]
            if length:
                prompts = drawn_prompts(spec, num_requests, *length)
            if index not in warm:
                answer(prompts, min(16, num_tokens))  # compiles, and fills caches
                warm.add(index)
            _, first = answer(prompts, 1)
            before = llm.collective_rpc(worker_facts)[0]
            answers, seconds = answer(prompts, num_tokens)
            after = llm.collective_rpc(worker_facts)[0]
            load = {
                "requests": num_requests,
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
                    **({"costs": after["costs"]} if "costs" in after else {}),
                    "planner": after["planner"],
                }
            if "pair" in spec:
                load["answers"] = answers
                if not spec["speculative"]:
                    load["leads"] = list(leads(prompts, num_tokens))
            send(load)


def first_difference(ours, plain):
    """Index of the first token in which two answers differ, None where they are equal."""
    for i, (a, b) in enumerate(zip(ours, plain, strict=False)):
        if a != b:
            return i
    return None if len(ours) == len(plain) else min(len(ours), len(plain))


def compare(ours, plain, leads):
    """How many of two engines' answers are the same, and where the others part.

    Args:
        leads: at each place of `plain`, of the most likely token over the next: log probability.
    """
    assert len(ours) == len(plain)
    places = [first_difference(a, b) for a, b in zip(ours, plain, strict=True)]
    differing = [
        (place, lead[place] if place < len(lead) else None)
        for place, lead in zip(places, leads, strict=True)
        if place is not None
    ]
    differing.sort(key=lambda found: found[0])
    return {
        "same_answers": f"{len(ours) - len(differing)} of {len(ours)}",
        "first_differences": [place for place, _ in differing[:5]],
        "leads_there": [lead for _, lead in differing[:5]],
        "all_tied": all(lead is not None and lead <= TIE for _, lead in differing),
    }


def judge(spec, result, plain, leads):
    """Add the comparison to `result` and take the answers out of it; returns what is wrong.

    Args:
        plain: the answers of the same engine without drafts, None where there are none.
        leads: see `compare`.
    """
    answers = of_all_loads(spec, result, "answers")
    for load in result["loads"]:
        load.pop("answers", None)
        load.pop("leads", None)
    problems = []
    if spec["speculative"] and "pair" in spec:
        if plain is None or len(plain) != len(answers):
            problems.append("nothing to compare with: the engine without drafts gave no answers")
        else:
            result |= compare(answers, plain, leads)
            if spec["must_agree"] and not result["all_tied"]:
                problems.append(f"only {result['same_answers']} answers are the same")
    if spec.get("must_draft") and not all(load.get("passes") for load in result["loads"]):
        problems.append("nothing was drafted")
    return "; ".join(problems)


def of_all_loads(spec, result, key):
    """All answers of an engine, or their leads; None of one whose answers are not compared."""
    if "pair" not in spec:
        return None
    return [answer for load in result["loads"] for answer in load.get(key, [])]


class Engine:
    """An engine in a process of its own, which starts at once and runs a load when told to."""

    def __init__(self, spec, folder):
        self.spec, self.result, self.problem = spec, {"loads": []}, ""
        self.log = folder / "log"
        reader, writer = os.pipe()
        self.lines = os.fdopen(reader, "rb", buffering=0)  # `select` sees all that is unread
        env = {**ENVIRONMENT, **os.environ}
        env["VLLM_ENABLE_V1_MULTIPROCESSING"] = "1" if spec.get("own_process") else "0"
        (folder / "spec.json").write_text(json.dumps(spec), encoding="utf-8")
        with self.log.open("w") as log:
            # a session of its own: what the engine has started must end with it
            self.process = subprocess.Popen(
                [sys.executable, __file__, "--one", str(folder / "spec.json"), str(writer)],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                text=True,
                env=env,
                start_new_session=True,
                pass_fds=(writer,),
            )
        os.close(writer)

    def tell(self, index):
        """Let it run the load of this index."""
        if not self.problem:
            with contextlib.suppress(BrokenPipeError):
                print(index, file=self.process.stdin, flush=True)

    def receive(self, until):
        """The next line of the engine; None, and `problem`, if none comes before `until`."""
        if self.problem:
            return None
        left = max(0, until - time.monotonic())
        if not select.select([self.lines], [], [], left)[0]:
            self.stop(NO_TIME)
        elif not (line := self.lines.readline()):
            self.stop(f"exit status {self.process.wait()}")
        else:
            return json.loads(line)
        return None

    def stop(self, problem=""):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        if problem:
            output = self.log.read_text(errors="replace")
            last = [line.strip()[-300:] for line in output.splitlines() if line.strip()][-3:]
            self.problem = " | ".join([problem, *last])


def run_together(specs, folder, until, *, in_turn, rounds=1):
    """Start engines side by side and run every load on each; returns the engines, stopped.

    Args:
        in_turn: one at a time, as times are taken; else all at once, for their answers.
    """
    engines = []
    try:
        for i, spec in enumerate(specs):
            (folder / str(i)).mkdir()
            engines.append(Engine(spec, folder / str(i)))
        indices = list(range(len(specs[0]["loads"]))) * rounds + [PROFILE] * in_turn
        if not in_turn:  # each as soon as it has started
            for engine, index in itertools.product(engines, indices):
                engine.tell(index)
        for engine in engines:
            engine.result |= engine.receive(until) or {}
        for index, engine in itertools.product(indices, engines):
            if in_turn:
                engine.tell(index)
            if load := engine.receive(until):
                if index == PROFILE:
                    engine.result |= load
                else:
                    engine.result["loads"].append(load)
    finally:
        for engine in engines:
            engine.stop()
    return engines


def run_all(waves, until, report, **how):
    """Run waves of specs and hand each engine's line to `report`; returns how many were wrong."""
    num_wrong = 0
    for specs in waves:
        left = until - time.monotonic()
        if left < MIN_SECONDS:
            for spec in specs:
                why = "left out" if spec.get("if_time") else "problem"
                num_wrong += why == "problem"
                report({"name": spec["name"], why: NO_TIME})
            continue
        with tempfile.TemporaryDirectory() as name:
            engines = run_together(specs, Path(name), until, **how)
            plain = {
                engine.spec["pair"]: [
                    of_all_loads(engine.spec, engine.result, key) for key in ("answers", "leads")
                ]
                for engine in engines
                if not engine.spec["speculative"] and "pair" in engine.spec
            }
            for engine in engines:
                output = engine.log.read_text(errors="replace")
                title = f"===== {engine.spec['name']}"
                print(f"{title}\n{output[-60_000:]}", file=sys.stderr, flush=True)
        for engine in engines:
            line = {key: engine.spec[key] for key in ("name", "label") if key in engine.spec}
            pair = engine.spec.get("pair", "")
            answers = of_all_loads(engine.spec, engine.result, "answers")
            wrong = judge(engine.spec, engine.result, *plain.get(pair, (None, None)))
            line |= engine.result
            other, leads = plain.get(f"{pair.partition(',')[0]}, default", (None, None))
            if other and len(answers) == len(other):  # vLLM's own engines differ, too
                line |= {"as_by_default": compare(answers, other, leads)}
            if problem := "; ".join(filter(None, [engine.problem, wrong])):
                late = engine.spec.get("if_time") and engine.problem.startswith(NO_TIME)
                line["left out" if late else "problem"] = problem
                num_wrong += not late
            report(line)
    return num_wrong


def main():
    if sys.argv[1:2] == ["--one"]:
        spec = json.loads(Path(sys.argv[2]).read_text(encoding="utf-8"))
        with os.fdopen(int(sys.argv[3]), "w") as results:
            serve(
                spec,
                map(int, sys.stdin),
                lambda line: print(json.dumps(line), file=results, flush=True),
            )
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
        if args.kind == "small":
            waves, how = [list(small_runs(args.tiny))], {"in_turn": False}
        else:
            waves, how = real_waves(args.tiny, Path(name)), {"in_turn": True, "rounds": 3}
        num_wrong = run_all(waves, until, report, **how)
    return 1 if num_wrong else 0


if __name__ == "__main__":
    sys.exit(main())
