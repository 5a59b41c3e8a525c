"""Measures the embedded small pair with plain transformers models, without a serving engine.

Greedy speculative decoding emits exactly the target's greedy answer, so the target decodes each
prompt once and every draft is checked against that answer. A draft grows by one drafter pass per
increment and stops after the first increment with an unsure token (FailFast, arXiv 2512.20573).
"""

import argparse
import json
import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import NamedTuple

import torch
from transformers import AutoTokenizer, PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from data import COPY_TASKS
from train import BLOCK_SIZE, MODELS_DIR


class Prompt(NamedTuple):
    task: str
    ids: list[int]
    answer: str


@dataclass(frozen=True)
class DraftConfig:
    draft_increment: int = 10
    confidence_threshold: float = 0.45
    max_draft_len: int = 60


class Draft(NamedTuple):
    ids: list[int]
    num_passes: int


@dataclass
class Tally:
    """Sums over draft rounds."""

    num_rounds: int = 0
    num_passes: int = 0
    num_drafted: int = 0
    num_accepted: int = 0
    num_long_rounds: int = 0

    def add(self, other: "Tally") -> None:
        for field in fields(self):
            setattr(self, field.name, getattr(self, field.name) + getattr(other, field.name))

    def __str__(self) -> str:
        rounds = max(1, self.num_rounds)
        return (
            f"acceptance length {1 + self.num_accepted / rounds:5.2f}, "
            f"passes per round {self.num_passes / rounds:4.2f}, "
            f"draft length {self.num_drafted / rounds:5.2f}, "
            f"rounds accepting >= 30: {self.num_long_rounds / rounds:6.1%} of {self.num_rounds}"
        )


def load_model(path: Path) -> Qwen2ForCausalLM:
    """Load any of the three checkpoints; the drafter's weights are Qwen2's under another name."""
    config = json.loads((path / "config.json").read_text())
    qwen2 = Qwen2Config.from_dict(config | {"model_type": "qwen2"})
    return Qwen2ForCausalLM.from_pretrained(path, config=qwen2, dtype=torch.float32).eval()


def load_prompts(path: Path, tokenizer: PreTrainedTokenizerFast) -> list[Prompt]:
    prompts = []
    for line in path.read_text().splitlines():
        record = json.loads(line)
        ids = tokenizer.apply_chat_template(
            record["messages"], add_generation_prompt=True, return_dict=True
        )["input_ids"]
        prompts.append(Prompt(record["task"], ids, record["answer"]))
    return prompts


@torch.inference_mode()
def target_answers(
    target: Qwen2ForCausalLM, tokenizer: PreTrainedTokenizerFast, prompts: list[Prompt]
) -> list[list[int]]:
    """The target's greedy answers, each up to and including its end token."""
    answers: list[list[int]] = []
    for start in range(0, len(prompts), 32):
        batch = [{"input_ids": p.ids} for p in prompts[start : start + 32]]
        inputs = tokenizer.pad(batch, padding_side="left", return_tensors="pt")
        outputs = target.generate(**inputs, max_new_tokens=360, do_sample=False)
        for row in outputs[:, inputs["input_ids"].shape[1] :].tolist():
            eos = tokenizer.eos_token_id
            answers.append(row[: row.index(eos) + 1] if eos in row else row)
    return answers


def answered(num_prompts: int) -> tuple[PreTrainedTokenizerFast, list[Prompt], list[list[int]]]:
    """The shipped pair's tokenizer, prompts from all over its file, and its target's answers."""
    tokenizer = AutoTokenizer.from_pretrained(MODELS_DIR / "target")
    prompts = load_prompts(MODELS_DIR / "prompts.jsonl", tokenizer)
    prompts = prompts[:: max(1, len(prompts) // num_prompts)][:num_prompts]
    answers = target_answers(load_model(MODELS_DIR / "target"), tokenizer, prompts)
    return tokenizer, prompts, answers


@torch.inference_mode()
def draft(
    drafter: Qwen2ForCausalLM, known: list[int], mask_id: int, eos_id: int, config: DraftConfig
) -> Draft:
    """Draft after `known`: one pass over its tokens, those drafted, and one increment of masks."""
    drafted: list[int] = []
    num_passes = 0
    while len(drafted) < config.max_draft_len:
        size = min(config.draft_increment, config.max_draft_len - len(drafted))
        tokens = torch.tensor([known + drafted + [mask_id] * size])
        blocks = torch.arange(tokens.shape[1]) // BLOCK_SIZE
        staircase = (blocks[None, :] <= blocks[:, None])[None, None]
        hidden = drafter.model(tokens, attention_mask=staircase, use_cache=False).last_hidden_state
        logits = drafter.lm_head(hidden[0, -size - 1 : -1])
        logits[:, mask_id] = -torch.inf
        confidences, ids = logits.softmax(-1).max(-1)
        drafted += ids.tolist()
        num_passes += 1
        if eos_id in drafted:
            drafted = drafted[: drafted.index(eos_id) + 1]
            break
        if confidences.min() < config.confidence_threshold:
            break
    return Draft(drafted, num_passes)


def draft_rounds(
    drafter: Qwen2ForCausalLM,
    prompt: list[int],
    answer: list[int],
    mask_id: int,
    eos_id: int,
    config: DraftConfig,
) -> Iterator[Tally]:
    """One tally per draft-and-verify round until the target's `answer` has been emitted."""
    emitted = 0
    while emitted < len(answer):
        ids, num_passes = draft(drafter, prompt + answer[:emitted], mask_id, eos_id, config)
        expected = answer[emitted : emitted + len(ids)]
        accepted = 0
        while accepted < len(expected) and ids[accepted] == expected[accepted]:
            accepted += 1
        yield Tally(1, num_passes, len(ids), accepted, int(accepted >= 30))
        emitted += accepted + 1


def is_correct(task: str, answer: str, expected: str) -> bool:
    """Exactness where the prompt decides the text: the result of a word problem, what was to be
    quoted, repeated or written between code fences (there without remarks)."""
    if task in ("one_step", "two_step"):
        return answer.split("\n")[-1] == expected.split("\n")[-1]
    if task in ("quote", "repeat"):
        return answer.split("\n")[0] == expected.split("\n")[0]
    if task == "letter":
        return [answer.split("\n")[k] for k in (0, 2, -1)] == [
            expected.split("\n")[k] for k in (0, 2, -1)
        ]
    return decided_code(answer) == decided_code(expected)


def decided_code(text: str) -> list[str]:
    """The lines between the code fences, without comments, docstrings and their text."""
    fenced = re.sub(r'"""(.|\n)*?"""', "", text.partition("```")[2].rpartition("```")[0])
    return [line for line in fenced.split("\n") if not line.lstrip().startswith("#")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models-dir", type=Path, default=MODELS_DIR)
    parser.add_argument("--prompts", type=Path, help="default: MODELS_DIR/prompts.jsonl")
    parser.add_argument("--num-prompts", type=int, default=1000)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--draft-increment", type=int, default=10)
    parser.add_argument("--confidence-threshold", type=float, default=0.45)
    parser.add_argument("--max-draft-len", type=int, default=60)
    parser.add_argument("--show", type=int, default=0, help="print this many wrong answers")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    config = DraftConfig(args.draft_increment, args.confidence_threshold, args.max_draft_len)

    tokenizer = AutoTokenizer.from_pretrained(args.models_dir / "target")
    target = load_model(args.models_dir / "target")
    drafter = load_model(args.models_dir / "drafter")
    mask_id = tokenizer.convert_tokens_to_ids("|<MASK>|")
    prompts = load_prompts(args.prompts or args.models_dir / "prompts.jsonl", tokenizer)[
        : args.num_prompts
    ]
    answers = target_answers(target, tokenizer, prompts)

    correct: dict[str, list[bool]] = defaultdict(list)
    tallies: dict[str, Tally] = defaultdict(Tally)
    for prompt, answer in zip(prompts, answers, strict=True):
        text = tokenizer.decode(answer, skip_special_tokens=True)
        correct[prompt.task].append(is_correct(prompt.task, text, prompt.answer))
        if not correct[prompt.task][-1] and args.show > 0:
            args.show -= 1
            print(f"--- {prompt.task}\n{tokenizer.decode(prompt.ids)}{text}")
        for tally in draft_rounds(
            drafter, prompt.ids, answer, mask_id, tokenizer.eos_token_id, config
        ):
            tallies[prompt.task].add(tally)
            tallies["all"].add(tally)

    for task, results in sorted(correct.items()):
        print(f"{task:11} target right {sum(results):3}/{len(results):<3} {tallies[task]}")
    copied = [r for task in COPY_TASKS for r in correct[task]]
    print(f"{'copying':11} target right {sum(copied):3}/{len(copied)}")
    print(f"{'all':11} {tallies['all']}")


if __name__ == "__main__":
    main()
