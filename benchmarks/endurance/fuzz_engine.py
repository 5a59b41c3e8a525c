"""Random lives of requests against a model of what the drafter's cache must hold.

A life is a short random sequence of events on a running engine: requests that arrive, prompts in
parts, prefix hits, steps, aborts (one of them while a step is under way), preemption, resumption, a
reset of the prefix cache, other weights, requests that ask for no drafts, a step whose drafts
nobody takes. It drafts by a random policy, and by a planner that postpones commits and rests as it
pleases. What must hold: greedy answers are those of vLLM alone; what a pass reads as committed was
committed, to this page, from these tokens (`tests/support/cache_model.py`); every fourth pass
computes what a full recompute gives; nothing is left of requests that have ended.

Each seed makes one life. A life that fails is cut down to the events that still fail.

    python benchmarks/endurance/fuzz_engine.py --json FILE
    TRITON_INTERPRET=1 python benchmarks/endurance/fuzz_engine.py --runner v2 --lives 8 --json FILE
"""

import argparse
import contextlib
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from failfast_vllm.config import MODELS_DIR
from failfast_vllm.tools.offline import ENGINE_ENVIRONMENT
from failfast_vllm.tools.report import provenance
from failfast_vllm.tools.shipped import SHIPPED_PAIR

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests" / "support"))

ALONE = {"method": "failfast", "model": None, "load_aware": True}
SHOWN = 5  # lines of a life that went wrong


@contextlib.contextmanager
def world(runner: str, page: int, known: Any) -> Iterator[Any]:
    """An engine with pages of so many tokens and a drafter; page 0: without one."""
    import fuzzing
    from cache_model import modelled
    from engine import engine
    from independent import IndependentDrafter

    start: Any = engine
    if runner == "v2":
        from runners import v2_engine as start
    if not page:
        with start(ALONE, **fuzzing.small(64)) as llm:
            yield fuzzing.World(llm, known)
        return
    dense = IndependentDrafter(MODELS_DIR / "drafter", num_draftable_tokens=1)
    with start("failfast", **fuzzing.small(page)) as llm, modelled(llm, dense) as model:
        yield fuzzing.World(llm, known, model)


def plain_answers(runner: str, folder: Path) -> Any:
    """What vLLM alone answers, on V1."""
    import fuzzing
    from engine import TARGET, engine
    from live_weights import other_weights

    start: Any = engine
    if runner == "v2":
        from runners import v1_engine as start
    paths = [TARGET, other_weights(folder / "other")]
    with start(None, **fuzzing.ENGINE) as llm:
        return fuzzing.learn(llm, paths)


def fuzz(found: Any, seeds: range, **kinds: Any) -> dict[str, Any]:
    """Let the lives of these seeds go through a world."""
    import fuzzing

    began, wrong = time.perf_counter(), []
    for seed in seeds:
        life = fuzzing.make(seed, len(found.known.prompts), **kinds)
        if lines := found.live(life):
            wrong.append(explain(found, life, lines))
            print(json.dumps(wrong[-1], indent=1), flush=True)
    counts = dict(found.counts)
    if found.model is not None:
        counts |= found.model.counts
    return {
        "lives": len(seeds),
        "seconds": round(time.perf_counter() - began, 1),
        "counts": dict(sorted(counts.items())),
        "wrong": wrong,
    }


def explain(found: Any, life: Any, lines: list[str]) -> dict[str, Any]:
    """A life that went wrong, as short as it still does on its own."""
    import fuzzing

    def fails(shorter: Any) -> bool:
        found.llm.reset_prefix_cache()
        return bool(found.live(shorter))

    alone = fails(life)
    if alone:
        life = fuzzing.shrink(life, fails)
    return {"alone": alone, "lines": lines[:SHOWN], "num_lines": len(lines), **life._asdict()}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runner", choices=("v1", "v2"), default="v1")
    text = "an engine for each: tokens of a KV page; 0: without a drafter"
    parser.add_argument("--pages", type=int, nargs="+", default=[32, 64, 128, 0], help=text)
    parser.add_argument("--lives", type=int, default=600, help="of each engine")
    parser.add_argument("--seed", type=int, default=0, help="of the first life")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args(argv)
    if args.runner == "v2" and os.environ.get("TRITON_INTERPRET") != "1":
        parser.error("--runner v2 needs TRITON_INTERPRET=1 from the start of the process")
    facts = provenance(models=SHIPPED_PAIR, dtype="float32", runner=args.runner)
    engines = {}
    with tempfile.TemporaryDirectory() as folder:
        known = plain_answers(args.runner, Path(folder))
        first = args.seed
        for page in args.pages:
            seeds, first = range(first, first + args.lives), first + args.lives
            name = f"pages of {page} tokens" if page else "without a drafter"
            with world(args.runner, page, known) as found:
                engines[name] = fuzz(found, seeds, drafter=bool(page), reloads=args.runner == "v1")
            print(name, json.dumps({**engines[name], "wrong": len(engines[name]["wrong"])}))
            if args.json:
                report = {"provenance": facts, "engines": engines}
                args.json.write_text(json.dumps(report, indent=1) + "\n")
    return int(any(each["wrong"] for each in engines.values()))


if __name__ == "__main__":
    if os.environ.get("TRITON_INTERPRET") == "1":
        import triton_on_cpu  # noqa: F401 - before vLLM looks for Triton
    for name, value in ENGINE_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    sys.exit(main())
