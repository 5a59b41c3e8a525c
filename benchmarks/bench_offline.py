"""Offline throughput of every drafting method on the shipped pair, side by side in one run.

Methods: no speculation, vLLM's `ngram`, vLLM's `draft_model` with the autoregressive drafter of the
drafter's own size (K 3, 5, 8), the diffusion drafter with a fixed length (K 8, 10, 16), failfast.
All answer the same held-out prompts greedily, once untimed (a CPU compiles its matrix kernels per
row count) and once timed; engines take turns and every figure is the median over the repeats.
Acceptance length = accepted + 1 per verified draft, over the whole run.

    python benchmarks/bench_offline.py --json benchmarks/results/offline_cpu.json
"""

import argparse
import json
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

from failfast_vllm.config import MODELS_DIR
from failfast_vllm.tools.bench import PROMPTS, SHIPPED_PAIR, provenance, read_prompts, spread
from failfast_vllm.tools.cli import ENGINE_ENVIRONMENT
from failfast_vllm.tools.load_generator import padded_ar_drafter
from failfast_vllm.tools.offline import encode, engine

# one thread, as a vLLM worker, which leaves a core to the rest; ngram's idle ones would spin there
for key, value in {
    "OMP_NUM_THREADS": "1",
    "NUMBA_NUM_THREADS": "1",
    **ENGINE_ENVIRONMENT,
}.items():
    os.environ.setdefault(key, value)


@dataclass(frozen=True)
class Run:
    """One method over all prompts, once."""

    tokens_per_second: float
    acceptance_length: float  # 1.0 without speculation
    passes_per_round: float  # forward passes of the drafter per verified draft
    draft_ms: float  # per engine step: proposing, drafter forwards included
    overhead_ms: float  # per engine step: proposing, drafter forwards excluded (ours only)
    verify_ms: float  # per engine step: target forward and sampling
    other_ms: float  # per engine step: scheduling, detokenising, bookkeeping
    answers: list[list[int]]


def methods(ar_drafter):
    """Name -> speculative config."""
    return {
        "none": None,
        "ngram K5": {
            "method": "ngram",
            "num_speculative_tokens": 5,
            "prompt_lookup_min": 2,
            "prompt_lookup_max": 4,
        },
        **{
            f"draft_model AR K{k}": {
                "method": "draft_model",
                "model": str(ar_drafter),
                "num_speculative_tokens": k,
            }
            for k in (3, 5, 8)
        },
        **{
            f"dLLM fixed K{k}": {
                "method": "failfast",
                "policy": "fixed",
                "num_speculative_tokens": k,
            }
            for k in (8, 10, 16)
        },
        "failfast": {"method": "failfast"},
    }


class Stopwatch:
    """Adds up the milliseconds inside wrapped calls."""

    def __init__(self):
        self.ms = defaultdict(float)
        self.calls = defaultdict(int)

    def wrap(self, owner, name, key):
        original = getattr(owner, name)

        def timed(*args, **kwargs):
            began = time.perf_counter()
            try:
                return original(*args, **kwargs)
            finally:
                self.ms[key] += (time.perf_counter() - began) * 1e3
                self.calls[key] += 1

        setattr(owner, name, timed)


def run_once(speculative_config, args, batch_size, prompts):
    from vllm import SamplingParams

    engine_args = {"dtype": args.dtype, "enforce_eager": not args.compile}
    with engine(speculative_config, **engine_args, max_num_seqs=batch_size) as llm:
        params = SamplingParams(temperature=0.0, max_tokens=args.max_tokens)

        def answer_all():
            if batch_size == 1:
                return [llm.generate([p], params, use_tqdm=False)[0] for p in prompts]
            return llm.generate(prompts, params, use_tqdm=False)

        answer_all()  # warm-up
        core = llm.llm_engine.engine_core.engine_core
        runner = core.model_executor.driver_worker.worker.model_runner
        verified = {"drafts": 0, "accepted": 0}
        observe = core.scheduler.make_spec_decoding_stats

        def counting_observe(stats, num_draft_tokens, num_accepted_tokens, *rest, **kwargs):
            if num_draft_tokens:
                verified["drafts"] += 1
                verified["accepted"] += num_accepted_tokens
            return observe(stats, num_draft_tokens, num_accepted_tokens, *rest, **kwargs)

        core.scheduler.make_spec_decoding_stats = counting_observe
        watch = Stopwatch()
        watch.wrap(llm.llm_engine, "step", "step")
        watch.wrap(runner, "execute_model", "execute")
        watch.wrap(runner, "sample_tokens", "sample")
        passes = {"sequence": 0}
        if speculative_config:
            watch.wrap(runner, "propose_draft_token_ids", "propose")
        drafter = getattr(runner, "drafter", None)
        stats = getattr(drafter, "stats", None)
        before = (stats.total_ms, stats.forward_ms) if stats else (0.0, 0.0)
        if stats:

            def count(round_):
                passes["sequence"] += round_.num_passes if round_.drafted else 0

            stats.on_round = count

        began = time.perf_counter()
        outputs = answer_all()
        seconds = time.perf_counter() - began

        answers = [list(output.outputs[0].token_ids) for output in outputs]
        steps = watch.calls["execute"]
        rounds = max(1, verified["drafts"])
        per_round = passes["sequence"] / rounds
        if speculative_config and speculative_config["method"] == "draft_model":
            per_round = float(speculative_config["num_speculative_tokens"])
        overhead = 0.0
        if stats:
            overhead = (stats.total_ms - before[0] - (stats.forward_ms - before[1])) / steps
        target_ms = watch.ms["execute"] + watch.ms["sample"]
        return Run(
            tokens_per_second=sum(map(len, answers)) / seconds,
            acceptance_length=1.0 + verified["accepted"] / rounds,
            passes_per_round=per_round,
            draft_ms=watch.ms["propose"] / steps,
            overhead_ms=overhead,
            verify_ms=(target_ms - watch.ms["propose"]) / steps,
            other_ms=(watch.ms["step"] - target_ms) / steps,
            answers=answers,
        )


def median_row(name, batch_size, runs, baselines, expected):
    """Medians over the repeats; the speed-up is the median of the ratios within a repeat."""
    fields = [f for f in asdict(runs[0]) if f != "answers"]
    row = {f: round(statistics.median(getattr(run, f) for run in runs), 3) for f in fields}
    ratios = [
        run.tokens_per_second / base.tokens_per_second
        for run, base in zip(runs, baselines, strict=True)
    ]
    same = sum(a == b for a, b in zip(runs[0].answers, expected, strict=True))
    return {
        "method": name,
        "batch_size": batch_size,
        "speedup": round(statistics.median(ratios), 3),
        **row,
        "answers_equal_to_none": f"{same}/{len(expected)}",
    }


def held_out_prompts(count):
    """Questions that neither model was trained on, as vLLM takes them."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(MODELS_DIR / "target")
    return [encode(tokenizer, prompt) for prompt in spread(read_prompts(PROMPTS), count)]


def measure(chosen, args, prompts):
    """One row per batch size and method of `chosen`, which holds "none"; engines take turns."""
    from tqdm import tqdm

    jobs = [(b, r, m) for b in args.batch_sizes for r in range(args.repeats) for m in chosen]
    runs = defaultdict(list)
    for batch_size, _, name in tqdm(jobs, file=sys.stderr):
        job = (chosen[name], args, batch_size, prompts)
        if name.startswith("ngram"):  # imports numba, and then vLLM starts no second engine
            with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
                run = process.submit(run_once, *job).result()
        else:
            run = run_once(*job)
        runs[batch_size, name].append(run)
    rows = []
    for batch_size in args.batch_sizes:
        baselines = runs[batch_size, "none"]
        expected = baselines[0].answers
        for name in chosen:
            rows.append(median_row(name, batch_size, runs[batch_size, name], baselines, expected))
    return rows


def table(rows):
    columns = [
        ("batch", "batch_size", "{}"),
        ("method", "method", "{}"),
        ("tokens/s", "tokens_per_second", "{:.0f}"),
        ("speed-up", "speedup", "{:.2f}x"),
        ("acceptance length", "acceptance_length", "{:.2f}"),
        ("passes/round", "passes_per_round", "{:.2f}"),
        ("draft ms", "draft_ms", "{:.2f}"),
        ("of it ours", "overhead_ms", "{:.2f}"),
        ("verify ms", "verify_ms", "{:.2f}"),
        ("other ms", "other_ms", "{:.2f}"),
        ("equal answers", "answers_equal_to_none", "{}"),
    ]
    lines = ["| " + " | ".join(title for title, _, _ in columns) + " |"]
    lines.append("|" + "---|" * len(columns))
    for row in rows:
        lines.append("| " + " | ".join(form.format(row[key]) for _, key, form in columns) + " |")
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--num-prompts", type=int, default=12)
    parser.add_argument("--max-tokens", type=int, default=400)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--compile", action="store_true", help="torch.compile, vLLM's default")
    parser.add_argument("--methods", nargs="+", help="only these (names as in the table)")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()

    facts = provenance(
        target=SHIPPED_PAIR,
        dtype=args.dtype,
        compiled=args.compile,
        prompts=args.num_prompts,
        repeats=args.repeats,
    )
    print("\n".join(f"{key}: {value}" for key, value in facts.items()), flush=True)

    with tempfile.TemporaryDirectory() as folder:
        chosen = methods(padded_ar_drafter(Path(folder)))
        if args.methods:
            chosen = {name: chosen[name] for name in ["none", *args.methods]}
        rows = measure(chosen, args, held_out_prompts(args.num_prompts))
    print(table(rows))
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps({"provenance": facts, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
