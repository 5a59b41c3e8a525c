"""What our differences from the authors' Algorithm 1 cost and save on the small pair.

Both rule sets are those of `tests/literal.py`, which the engine's drafts are tested against: one
sequence, no cache. Drafts are checked against the target's greedy answers, and passes that commit
a block count as passes.
"""

import argparse
import sys
from pathlib import Path

import torch

from evaluate import answered
from train import MODELS_DIR

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests"))
from independent import IndependentDrafter
from literal import AUTHORS, OURS, literal_draft


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--num-prompts", type=int, default=60)
    args = parser.parse_args()
    torch.set_num_threads(1)
    tokenizer, prompts, answers = answered(args.num_prompts)
    drafter = IndependentDrafter(MODELS_DIR / "drafter", len(tokenizer))
    for name, rules in (("authors", AUTHORS), ("ours", OURS)):
        rounds = passes = tokens = 0
        for prompt, answer in zip(prompts, answers, strict=True):
            emitted = 0
            while emitted < len(answer):
                draft = literal_draft(
                    drafter,
                    prompt.ids + answer[:emitted],
                    rules,
                    increment=10,
                    threshold=0.45,
                    max_draft=60,
                    stop_token_ids=(tokenizer.eos_token_id,),
                )
                accepted = 0
                for drafted, expected in zip(draft.token_ids, answer[emitted:], strict=False):
                    if drafted != expected:
                        break
                    accepted += 1
                emitted += accepted + 1
                rounds, passes = rounds + 1, passes + draft.num_passes
            tokens += len(answer)
        print(
            f"{name:8} {len(prompts)} prompts, {rounds} rounds: "
            f"{tokens / rounds:.2f} tokens per round, {passes / rounds:.2f} passes per round"
        )


if __name__ == "__main__":
    main()
