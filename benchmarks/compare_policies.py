"""Every length policy on the shipped pair, side by side in one run, at its default parameters.

Measured as in `bench_offline`: held-out prompts, greedy, once untimed (which is also when a
learning policy learns) and once timed; engines take turns and every figure is the median over the
repeats. "+ reuse" lengthens doubtful drafts by what was rejected before.

    python benchmarks/compare_policies.py --json benchmarks/results/policies_cpu_float32.json

writes the table to the same path with `.md`, too.
"""

import argparse
import json
from pathlib import Path

from bench_offline import held_out_prompts, measure, provenance
from failfast_vllm.config import POLICIES

REUSING = ("failfast", "survival")


def methods(names):
    """Name -> speculative config, "none" first."""
    configs = {name: {"method": "failfast", "policy": name} for name in POLICIES}
    thompson = {"method": "failfast", "policy": "tapout", "bandit": "thompson"}
    configs["tapout thompson"] = thompson
    for name in REUSING:
        configs[f"{name} + reuse"] = {**configs[name], "reuse_rejected": True}
    return {"none": None, **{name: configs[name] for name in names or configs}}


def table(rows, batch_sizes):
    """Markdown: a line per policy; acceptance and passes are those of the smallest batch."""
    titles = ["policy", "acceptance length", "passes per round"]
    for size in batch_sizes:
        titles += [f"batch {size}: tokens/s", "speed-up"]
    lines = ["| " + " | ".join([*titles, "equal answers"]) + " |", "|" + "---|" * (len(titles) + 1)]
    found = {(row["method"], row["batch_size"]): row for row in rows}
    for name in dict.fromkeys(row["method"] for row in rows):
        first = found[name, batch_sizes[0]]
        cells = [name, f"{first['acceptance_length']:.2f}", f"{first['passes_per_round']:.2f}"]
        for size in batch_sizes:
            row = found[name, size]
            cells += [f"{row['tokens_per_second']:.0f}", f"{row['speedup']:.2f}x"]
        same = [found[name, size]["answers_equal_to_none"] for size in batch_sizes]
        lines.append("| " + " | ".join([*cells, ", ".join(same)]) + " |")
    return "\n".join(lines)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--num-prompts", type=int, default=10)
    parser.add_argument("--max-tokens", type=int, default=400)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--compile", action="store_true", help="torch.compile, vLLM's default")
    parser.add_argument("--policies", nargs="+", help="only these (names as in the table)")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args(argv)

    facts = provenance(args)
    print("\n".join(f"{key}: {value}" for key, value in facts.items()), flush=True)
    prompts = held_out_prompts(args.num_prompts)
    rows = measure(methods(args.policies), args, prompts)
    text = table(rows, args.batch_sizes)
    print(text)
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps({"provenance": facts, "rows": rows}, indent=1) + "\n")
        args.json.with_suffix(".md").write_text(text + "\n")


if __name__ == "__main__":
    main()
