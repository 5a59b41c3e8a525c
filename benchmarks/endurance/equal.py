"""Whether greedy answers stay the same, token for token, where drafts are made in every step.

Each chunk of prompts is answered by an engine without speculation and by one that drafts whenever
it can, whether it pays or not. The results are written after every chunk.

    python benchmarks/endurance/equal.py --method copies --target DIR --prompts FILE ... --json FILE
"""

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from failfast_vllm.config import MODELS_DIR
from failfast_vllm.tools.offline import (
    adapter,
    encode,
    engine,
    engine_environment,
    positive,
    read_prompts,
)
from failfast_vllm.tools.report import check_writable, provenance

sys.path.append(str(Path(__file__).resolve().parent))
from draws import METHODS, SETTINGS, always_drafting

CHUNK = 50  # prompts


def compare(
    config: dict[str, Any], target: str, prompts: list[Any], max_tokens: int, concurrency: int
) -> Iterator[dict[str, Any]]:
    """What was found so far, after each chunk."""
    from vllm import SamplingParams

    settings = {**SETTINGS, "model": target, "max_num_seqs": concurrency, "max_model_len": 4096}
    found = {"prompts": 0, "tokens": 0, "drafted": 0, "accepted": 0, "different": 0}
    rounds: list[Any] = []
    with engine(None, **settings) as plain, always_drafting(config, **settings) as drafting:
        adapter(drafting).stats.on_round = rounds.append
        encoded = [encode(plain.get_tokenizer(), prompt) for prompt in prompts]
        params = SamplingParams(temperature=0.0, max_tokens=max_tokens)
        for first in range(0, len(encoded), CHUNK):
            answers = [
                [
                    list(output.outputs[0].token_ids)
                    for output in llm.generate(
                        encoded[first : first + CHUNK], params, use_tqdm=False
                    )
                ]
                for llm in (plain, drafting)
            ]
            found["prompts"] += len(answers[0])
            found["tokens"] += sum(map(len, answers[0]))
            found["different"] += sum(a != b for a, b in zip(*answers, strict=True))
            found["drafted"] += sum(r.num_verified for r in rounds)
            found["accepted"] += sum(r.num_accepted for r in rounds)
            rounds.clear()
            yield dict(found)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--method", choices=METHODS, required=True)
    parser.add_argument("--target", default=str(MODELS_DIR / "target"), help="default: the shipped")
    parser.add_argument("--prompts", type=Path, nargs="+", required=True)
    parser.add_argument("--max-tokens", type=positive, default=64)
    parser.add_argument("--concurrency", type=positive, default=16)
    parser.add_argument("--json", type=Path, required=True)
    args = parser.parse_args(argv)
    check_writable(args.json)
    prompts = [prompt for path in args.prompts for prompt in read_prompts(path)]
    facts = provenance(
        target=Path(args.target).name,
        method=METHODS[args.method],
        prompts=[path.name for path in args.prompts],
        max_tokens=args.max_tokens,
        concurrency=args.concurrency,
        dtype="float32",
    )
    size = args.max_tokens, args.concurrency
    with engine_environment():
        for found in compare(METHODS[args.method], args.target, prompts, *size):
            report = {"provenance": facts, "found": found}
            args.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
            print(found, file=sys.stderr, flush=True)
    return int(found["different"] > 0)


if __name__ == "__main__":
    sys.exit(main())
