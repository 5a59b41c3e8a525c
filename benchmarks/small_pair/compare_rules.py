"""What our differences from the authors' Algorithm 1 cost and save on the small pair.

The rules are those of `tests/literal.py`, which the engine's drafts are tested against: one
sequence, no cache. Drafts are checked against the target's greedy answers; every forward pass of
the drafter counts, those that only commit blocks as well. Intervals are 95 % of a bootstrap over
the prompts, which all rules share. `--cut-texts` takes cuts of a long text around multiples of 32
tokens instead, whose 64 next tokens are hard to guess.

    python benchmarks/small_pair/compare_rules.py --json benchmarks/results/rules_cpu_float32.json
"""

import argparse
import json
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch

from evaluate import Prompt, answered, load_model, target_answers
from failfast_vllm.tools.report import provenance
from failfast_vllm.tools.shipped import SHIPPED_PAIR
from train import MODELS_DIR

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests" / "support"))
from engine import mixed_prompts
from independent import IndependentDrafter
from literal import AUTHORS, AUTHORS_WITHOUT_KV, OURS, Rules, literal_draft

SETTINGS = {"increment": 10, "threshold": 0.45, "max_draft": 60}
RULES = {
    "authors": AUTHORS,
    "authors, KV not kept": AUTHORS_WITHOUT_KV,
    "ours": OURS,
    "ours, padded": replace(OURS, pads_blocks=True),
    "ours, passes end at blocks": replace(OURS, crosses_blocks=False),
    "ours, increments end at blocks": replace(OURS, ends_at_blocks=True),
    "ours, padded, passes end": replace(OURS, pads_blocks=True, crosses_blocks=False),
    "ours, padded, increments end": replace(OURS, pads_blocks=True, ends_at_blocks=True),
}


@dataclass
class Counts:
    """Sums over the rounds of one prompt."""

    rounds: int = 0
    tokens: int = 0
    passes: int = 0
    rows: int = 0
    drafted: int = 0


def cut_texts(tokenizer, count: int) -> tuple[list[Prompt], list[list[int]]]:
    """Cuts of up to 420 tokens, and the target's next 64 after each."""
    cuts = [ids for ids in mixed_prompts(tokenizer, 4 * count)[1::2] if len(ids) < 420][:count]
    prompts = [Prompt("cut", ids, "") for ids in cuts]
    answers = target_answers(load_model(MODELS_DIR / "target"), tokenizer, prompts)
    return prompts, [answer[:64] for answer in answers]


def answer_in_rounds(drafter, prompt: list[int], answer: list[int], eos: int, rules: Rules):
    """Draft and verify until `answer` has been emitted."""
    counts, kept = Counts(tokens=len(answer)), None
    emitted = 0
    while emitted < len(answer):
        known = prompt + answer[:emitted]
        draft = literal_draft(drafter, known, rules, stop_token_ids=(eos,), kept=kept, **SETTINGS)
        accepted = 0
        for drafted, expected in zip(draft.token_ids, answer[emitted:], strict=False):
            if drafted != expected:
                break
            accepted += 1
        emitted += accepted + 1
        kept = draft.kept
        counts.rounds += 1
        counts.passes += draft.num_passes
        counts.rows += draft.num_rows
        counts.drafted += len(draft.token_ids)
    return counts


def per_round(counts: list[Counts], what: str, picks: np.ndarray) -> np.ndarray:
    """[num_draws] a count per round, over each draw's prompts; `picks` is [num_draws, n]."""
    sums = np.array([getattr(c, what) for c in counts])[picks].sum(axis=1)
    return sums / np.array([c.rounds for c in counts])[picks].sum(axis=1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--num-prompts", type=int, default=60)
    parser.add_argument("--cut-texts", action="store_true", help="instead of held-out questions")
    parser.add_argument("--json", type=Path, help="write the results here")
    args = parser.parse_args()
    torch.set_num_threads(1)
    tokenizer, prompts, answers = answered(1 if args.cut_texts else args.num_prompts)
    if args.cut_texts:
        prompts, answers = cut_texts(tokenizer, args.num_prompts)
    drafter = IndependentDrafter(MODELS_DIR / "drafter", len(tokenizer))
    counted = {
        name: [
            answer_in_rounds(drafter, prompt.ids, answer, tokenizer.eos_token_id, rules)
            for prompt, answer in zip(prompts, answers, strict=True)
        ]
        for name, rules in RULES.items()
    }
    everything = np.arange(len(prompts))[None]
    draws = np.random.default_rng(0).integers(len(prompts), size=(10_000, len(prompts)))
    rows = []
    print(
        "| rules | rounds | tokens per round | to ours | passes per round | rows per round "
        "| drafted per round |\n| --- | --- | --- | --- | --- | --- | --- |"
    )
    for name, counts in counted.items():
        to_ours = [
            per_round(counts, "tokens", picks) / per_round(counted["ours"], "tokens", picks) - 1
            for picks in (everything, draws)
        ]
        low, high = np.quantile(to_ours[1], (0.025, 0.975))
        row = {
            "rules": name,
            "rounds": sum(c.rounds for c in counts),
            **{
                f"{what}_per_round": round(float(per_round(counts, what, everything)[0]), 3)
                for what in ("tokens", "passes", "rows", "drafted")
            },
            "tokens_to_ours": [round(float(x), 4) for x in (to_ours[0][0], low, high)],
            "settings": asdict(RULES[name]),
        }
        rows.append(row)
        print(
            f"| {name} | {row['rounds']} | {row['tokens_per_round']:.2f} "
            f"| {to_ours[0][0]:+.1%} ({low:+.1%} to {high:+.1%}) | {row['passes_per_round']:.2f} "
            f"| {row['rows_per_round']:.0f} | {row['drafted_per_round']:.1f} |",
            flush=True,
        )
    if args.json:
        found = provenance(
            target=SHIPPED_PAIR,
            drafter=SHIPPED_PAIR,
            dtype="float32",
            prompts=f"{'cut texts' if args.cut_texts else 'held-out'}, {len(prompts)} of them",
            **SETTINGS,
        )
        args.json.write_text(json.dumps({"provenance": found, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
