"""Prompts of a length in tokens, for `failfast bench --prompts`: the shipped pair's, one chat each.

    python benchmarks/long_prompts.py 1500 > long.jsonl
    failfast bench --prompts long.jsonl --max-model-len 4096 --methods failfast ...

A prompt is a chat of held-out questions with their answers, and ends with a question.
"""

import argparse
import json
import random

from transformers import AutoTokenizer

from failfast_vllm.config import MODELS_DIR
from failfast_vllm.tools.shipped import PROMPTS


def chat(tokenizer, lines, question, most, shuffled):
    """Messages of questions and answers, with `question` at most `most` tokens."""
    messages = []
    for turn in shuffled.sample(lines, len(lines)):
        answer = {"role": "assistant", "content": turn["answer"]}
        longer = [*messages, turn["messages"][-1], answer]
        ids = tokenizer.apply_chat_template([*longer, *question], return_dict=False)
        if len(ids) > most:
            break
        messages = longer
    return messages


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("tokens", type=int, help="of a prompt, at most")
    parser.add_argument("--count", type=int, default=16, help="prompts; default: 16")
    parser.add_argument("--shared", action="store_true", help="all begin with the same chat")
    args = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(MODELS_DIR / "target")
    lines = [json.loads(line) for line in PROMPTS.read_text(encoding="utf-8").splitlines()]
    shuffled = random.Random(0)
    messages: list[dict[str, str]] = []
    for i in range(args.count):
        question = lines[i * len(lines) // args.count]["messages"][-1:]
        if not (args.shared and messages):
            messages = chat(tokenizer, lines, question, args.tokens, shuffled)
        print(json.dumps({"task": f"{args.tokens} tokens", "messages": [*messages, *question]}))


if __name__ == "__main__":
    main()
