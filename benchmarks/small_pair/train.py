"""Trains the embedded small pair: a target, an autoregressive and a block-diffusion drafter.

`python benchmarks/small_pair/train.py` reproduces all models of `failfast_vllm/small_pair` from
nothing but `data.py`. The block-diffusion drafter starts from the autoregressive one and is trained
as Fast-dLLM v2 (arXiv 2509.26328): noisy and clean tokens in one sequence, each noisy segment
seeing itself and the clean blocks before it, shifted cross-entropy on masked positions only.
"""

import argparse
import json
import math
import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from data import Example, examples

MODELS_DIR = Path(__file__).resolve().parents[2] / "failfast_vllm" / "small_pair"
BLOCK_SIZE = 32
# transformers' AutoTokenizer imposes this splitting on every `qwen2` checkpoint.
QWEN2_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
MAX_TOKENIZER_SIZE = 1948
END_OF_TEXT, MESSAGE_START, MESSAGE_END, MASK = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "|<MASK>|",
)  # fmt: skip
CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}"
)


@dataclass(frozen=True)
class Stage:
    """One model's shape and schedule. The LR is warmed up, held, then decayed linearly to zero."""

    name: str
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    intermediate_size: int
    vocab_size: int
    num_steps: int
    num_decay_steps: int
    num_curriculum_steps: int
    num_repeat_steps: int
    tokens_per_batch: int
    batches_per_step: int
    learning_rate: float
    seed: int
    starts_from: str = ""  # another stage
    finishing: bool = False  # more long examples; see data.py


TARGET = Stage(
    name="target",
    hidden_size=256,
    num_layers=6,
    num_heads=4,
    num_kv_heads=2,
    intermediate_size=704,
    vocab_size=2048,
    num_steps=2100,
    num_decay_steps=500,
    num_curriculum_steps=500,
    num_repeat_steps=300,
    tokens_per_batch=1024,
    batches_per_step=2,
    learning_rate=3e-3,
    seed=1,
)
AR_DRAFTER = replace(
    TARGET,
    name="ar-drafter",
    hidden_size=192,
    num_layers=4,
    num_heads=3,
    num_kv_heads=1,
    intermediate_size=448,
    vocab_size=1984,
    num_steps=1300,
    num_decay_steps=300,
    seed=2,
)
DRAFTER = replace(
    AR_DRAFTER,
    name="drafter",
    num_steps=1400,
    num_decay_steps=400,
    num_curriculum_steps=0,
    num_repeat_steps=0,
    seed=3,
    starts_from="ar-drafter",
)
FINISH = {
    "num_curriculum_steps": 0,
    "num_repeat_steps": 0,
    "learning_rate": 1.5e-3,
    "finishing": True,
}
FINISHED_TARGET = replace(
    TARGET,
    name="target-finish",
    num_steps=500,
    num_decay_steps=400,
    seed=4,
    starts_from="target",
    **FINISH,
)
FINISHED_DRAFTER = replace(
    DRAFTER,
    name="drafter-finish",
    num_steps=600,
    num_decay_steps=450,
    seed=5,
    starts_from="drafter",
    **FINISH,
)
CHAINS = ((TARGET, FINISHED_TARGET), (AR_DRAFTER, DRAFTER, FINISHED_DRAFTER))
NUM_PREFIX_SEGMENTS = 6
PREFIX_MASK_LENS = (10, 16)
SHORT_LEN, FULL_LEN = 110, 448


class Encoded(NamedTuple):
    """Token ids of one chat, up to and including the answer's end token."""

    ids: list[int]
    prompt_len: int


class Batch(NamedTuple):
    """`labels[i]` is to be predicted by flat position `rows[i]` of `input_ids`."""

    input_ids: torch.Tensor  # [num_seqs, seq_len] int64
    position_ids: torch.Tensor  # [num_seqs, seq_len] int64
    attention_mask: torch.Tensor | None  # [num_seqs, 1, seq_len, seq_len] bool; None: causal
    rows: torch.Tensor  # [num_labels] int64
    labels: torch.Tensor  # [num_labels] int64


def prompt_text(prompt: str) -> str:
    return f"{MESSAGE_START}user\n{prompt}{MESSAGE_END}\n{MESSAGE_START}assistant\n"


def build_tokenizer(num_examples: int = 8000) -> PreTrainedTokenizerFast:
    """Byte-level BPE over the training side of the corpus; digits are single tokens."""
    source = examples(0, finishing=False)
    chats = (next(source) for _ in range(num_examples))
    texts = (text for e in chats for text in ("user\n" + e.prompt, "assistant\n" + e.answer))
    tokenizer = Tokenizer(models.BPE())
    words = Regex(QWEN2_WORDS)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(words, "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=MAX_TOKENIZER_SIZE,
        special_tokens=[END_OF_TEXT, MESSAGE_START, MESSAGE_END, MASK],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=MESSAGE_END,
        pad_token=END_OF_TEXT,
        additional_special_tokens=[MESSAGE_START, MASK],
        chat_template=CHAT_TEMPLATE,
        model_max_length=4096,
        clean_up_tokenization_spaces=False,
    )


def prepare(work_dir: Path) -> None:
    """Write the tokenizer and the prompts that no example trained on repeats."""
    build_tokenizer().save_pretrained(MODELS_DIR / "target")
    write_prompts(MODELS_DIR / "prompts.jsonl", "test")
    write_prompts(work_dir / "dev.jsonl", "dev")


def build_model(stage: Stage, tokenizer: PreTrainedTokenizerFast) -> Qwen2ForCausalLM:
    torch.manual_seed(stage.seed)
    config = Qwen2Config(
        vocab_size=stage.vocab_size,
        hidden_size=stage.hidden_size,
        intermediate_size=stage.intermediate_size,
        num_hidden_layers=stage.num_layers,
        num_attention_heads=stage.num_heads,
        num_key_value_heads=stage.num_kv_heads,
        max_position_embeddings=4096,
        rms_norm_eps=1e-6,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = Qwen2ForCausalLM(config)
    for layer in model.model.layers[:2]:
        seed_previous_token_head(layer.self_attn)
    return model


@torch.no_grad()
def seed_previous_token_head(attention: torch.nn.Module) -> None:
    """Let the first KV head's queries start out looking at the token before them.

    Copying is an induction circuit, whose first half is such a head. With rotary positions constant
    biases suffice: the score of (i, j) is a sum of cos((i - j - 1) * frequency), largest at
    j = i - 1. Without this the target stays on a plateau for most of a run this short.
    """
    head_dim, num_pairs, amplitude = attention.head_dim, 16, 5.0
    exponents = torch.arange(head_dim // 2) * 2 / head_dim
    frequencies = 10000.0 ** -exponents[:num_pairs]
    half = head_dim // 2
    for head in range(attention.num_key_value_groups):
        attention.q_proj.bias[head * head_dim :][:num_pairs] = amplitude
    attention.k_proj.bias[:num_pairs] = amplitude * frequencies.cos()
    attention.k_proj.bias[half : half + num_pairs] = amplitude * frequencies.sin()


def pad_vocabulary(model: Qwen2ForCausalLM, vocab_size: int) -> None:
    """vLLM's draft_model wants the target's vocabulary size.

    The padding repeats row 0: equal logits, and the lower id wins a tie.
    """
    num_rows = model.config.vocab_size
    model.resize_token_embeddings(vocab_size, mean_resizing=False)
    embedding = model.get_input_embeddings().weight  # also the head's
    with torch.no_grad():
        embedding[num_rows:] = embedding[0]


def save_model(model: Qwen2ForCausalLM, tokenizer: PreTrainedTokenizerFast, name: str) -> None:
    """Write one bf16 checkpoint; the drafter's config as Fast-dLLM v2 publishes it."""
    path = MODELS_DIR / name
    exported = Qwen2ForCausalLM(model.config).to(torch.bfloat16)
    exported.load_state_dict(model.state_dict())
    if name == "ar-drafter":
        pad_vocabulary(exported, TARGET.vocab_size)
    exported.generation_config.do_sample = False
    exported.save_pretrained(path)
    (path / "model.safetensors").chmod(0o644)
    tokenizer.save_pretrained(path)
    config_path = path / "config.json"
    config = json.loads(config_path.read_text())
    config["rope_theta"] = 10000.0
    config["torch_dtype"] = "bfloat16"
    if name == "drafter":
        config["architectures"] = ["Fast_dLLM_QwenForCausalLM"]
        config["model_type"] = "Fast_dLLM_Qwen"
        config["bd_size"] = BLOCK_SIZE
        config["mask_token_id"] = tokenizer.convert_tokens_to_ids(MASK)
    config_path.write_text(json.dumps(config, indent=2) + "\n")


def write_prompts(path: Path, split: str, num_prompts: int = 240) -> None:
    prompts: dict[str, Example] = {}
    for example in examples(4, split):
        prompts.setdefault(example.prompt, example)
        if len(prompts) == num_prompts:
            break
    records = [
        {
            "task": e.task,
            "messages": [{"role": "user", "content": e.prompt}],
            "answer": e.answer,
        }
        for e in prompts.values()
    ]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def encode(tokenizer: PreTrainedTokenizerFast, batch: list[Example]) -> list[Encoded]:
    prompts = tokenizer([prompt_text(e.prompt) for e in batch])["input_ids"]
    answers = tokenizer([e.answer + MESSAGE_END for e in batch])["input_ids"]
    return [Encoded(p + a, len(p)) for p, a in zip(prompts, answers, strict=True)]


def encoded_batches(stage: Stage, tokenizer: PreTrainedTokenizerFast) -> Iterator[list[Encoded]]:
    """Batches of whole examples of similar length, the longest allowed growing with the steps."""
    rng = random.Random(stage.seed)
    source = examples(1000 + stage.seed, finishing=stage.finishing)
    step = 0
    while True:
        num_steps = stage.num_curriculum_steps
        share = min(1.0, step / num_steps) if num_steps else 1.0
        max_len = SHORT_LEN + share * (FULL_LEN - SHORT_LEN)
        pool = encode(tokenizer, [next(source) for _ in range(512)])
        pool = sorted((e for e in pool if len(e.ids) <= max_len), key=lambda e: len(e.ids))
        batches: list[list[Encoded]] = [[]]
        for example in pool:
            if (len(batches[-1]) + 1) * len(example.ids) > stage.tokens_per_batch:
                batches.append([])
            batches[-1].append(example)
        rng.shuffle(batches)
        yield from batches
        step += len(batches) // stage.batches_per_step


def repeats(rng: random.Random, stage: Stage, tokenizer: PreTrainedTokenizerFast) -> list[Encoded]:
    """Random tokens, then the same ones again as the answer: nothing but copying helps."""
    length = rng.randint(8, 40)
    batch = []
    for _ in range(stage.tokens_per_batch // (2 * length)):
        ids = [rng.randrange(4, len(tokenizer)) for _ in range(length)]
        batch.append(Encoded(ids + ids, length + 1))
    return batch


def autoregressive_batches(stage: Stage, tokenizer: PreTrainedTokenizerFast) -> Iterator[Batch]:
    rng = random.Random(stage.seed)
    for i, examples_batch in enumerate(encoded_batches(stage, tokenizer)):
        batch = examples_batch
        if i % 2 and i < stage.num_repeat_steps * stage.batches_per_step:
            batch = repeats(rng, stage, tokenizer)
        seq_len = max(len(e.ids) for e in batch)
        input_ids = torch.full((len(batch), seq_len), tokenizer.pad_token_id)
        rows, labels = [], []
        for i, example in enumerate(batch):
            input_ids[i, : len(example.ids)] = torch.tensor(example.ids)
            answer = range(example.prompt_len, len(example.ids))
            rows += [i * seq_len + k - 1 for k in answer]
            labels += example.ids[example.prompt_len :]
        position_ids = torch.arange(seq_len).expand_as(input_ids)
        yield Batch(input_ids, position_ids, None, torch.tensor(rows), torch.tensor(labels))


class _Packed:
    """One clean sequence followed by noisy segments of it, at their own positions."""

    def __init__(self, ids: list[int]):
        self.ids = ids
        self.tokens = list(ids)
        self.positions = list(range(len(ids)))
        self.segments = [0] * len(ids)
        self.rows: list[int] = []
        self.labels: list[int] = []

    def add_segment(self, tokens: list[int], start: int, masked: list[int]) -> None:
        """Append `tokens`, the first at position `start`, a block start; `masked` are positions
        whose token is to be predicted, each from the row before it (the shift)."""
        offset = len(self.tokens) - start
        self.tokens += tokens
        self.positions += range(start, start + len(tokens))
        self.segments += [self.segments[-1] + 1] * len(tokens)
        for position in masked:
            self.rows.append(position - 1 + offset if position > start else position - 1)
            self.labels.append(self.ids[position])


def pack_noisy(example: Encoded, rng: random.Random, mask_id: int) -> _Packed:
    """Two kinds of noise: as served (known prefix, then masks) and as in the paper (random
    masks in one block, with the complementary view)."""
    ids, prompt_len = example
    packed = _Packed(ids)
    for _ in range(NUM_PREFIX_SEGMENTS):
        cut = rng.randrange(prompt_len, len(ids))
        start = cut // BLOCK_SIZE * BLOCK_SIZE
        num_masks = rng.randint(*PREFIX_MASK_LENS)
        masked = range(cut, min(cut + num_masks, len(ids)))
        packed.add_segment(ids[start:cut] + [mask_id] * num_masks, start, list(masked))
    start = rng.randrange(prompt_len, len(ids)) // BLOCK_SIZE * BLOCK_SIZE
    block = ids[start : start + BLOCK_SIZE]
    maskable = range(max(start, prompt_len), start + len(block))
    share = rng.uniform(1e-3, 1.0)
    view = {k for k in maskable if rng.random() < share}
    for masked_set in (view, set(maskable) - view):
        tokens = [mask_id if start + i in masked_set else t for i, t in enumerate(block)]
        tokens += [mask_id] * (BLOCK_SIZE - len(block))
        packed.add_segment(tokens, start, sorted(masked_set))
    return packed


def block_mask(positions: torch.Tensor, segments: torch.Tensor) -> torch.Tensor:
    """[num_seqs, 1, seq_len, seq_len] bool. Within a segment a query sees its own and earlier
    blocks; a noisy segment also sees the clean blocks before its first one."""
    blocks = positions // BLOCK_SIZE
    same = segments[:, :, None] == segments[:, None, :]
    first = torch.where(same, blocks[:, None, :], torch.iinfo(torch.int64).max).amin(-1)
    own = same & (blocks[:, None, :] <= blocks[:, :, None])
    clean = (segments[:, None, :] == 0) & (blocks[:, None, :] < first[:, :, None])
    return (own | (clean & (segments[:, :, None] > 0)))[:, None]


def diffusion_batches(stage: Stage, tokenizer: PreTrainedTokenizerFast) -> Iterator[Batch]:
    rng = random.Random(stage.seed)
    mask_id = tokenizer.convert_tokens_to_ids(MASK)
    for batch in encoded_batches(stage, tokenizer):
        packed = [pack_noisy(example, rng, mask_id) for example in batch]
        seq_len = max(len(p.tokens) for p in packed)
        input_ids = torch.full((len(packed), seq_len), tokenizer.pad_token_id)
        position_ids = torch.zeros_like(input_ids)
        segments = torch.full_like(input_ids, -1)
        rows, labels = [], []
        for i, p in enumerate(packed):
            input_ids[i, : len(p.tokens)] = torch.tensor(p.tokens)
            position_ids[i, : len(p.tokens)] = torch.tensor(p.positions)
            segments[i, : len(p.tokens)] = torch.tensor(p.segments)
            rows += [i * seq_len + row for row in p.rows]
            labels += p.labels
        yield Batch(
            input_ids,
            position_ids,
            block_mask(position_ids, segments),
            torch.tensor(rows),
            torch.tensor(labels),
        )


def batch_loss(model: Qwen2ForCausalLM, batch: Batch) -> torch.Tensor:
    hidden = model.model(
        input_ids=batch.input_ids,
        position_ids=batch.position_ids,
        attention_mask=batch.attention_mask,
        use_cache=False,
    ).last_hidden_state
    return F.cross_entropy(model.lm_head(hidden.flatten(0, 1)[batch.rows]), batch.labels)


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalised by Newton-Schulz in float32.

    `torch.optim.Muon` does the same in bfloat16, which made the optimizer 40 % of a step on a CPU
    without bfloat16 units. The update has AdamW's usual RMS of 0.2.
    """

    def __init__(self, params: list[torch.nn.Parameter], lr: float, momentum: float = 0.95):
        super().__init__(params, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for group in self.param_groups:
            for param in group["params"]:
                state = self.state[param]
                if not state:
                    state["momentum"] = torch.zeros_like(param)
                state["momentum"].lerp_(param.grad, 1 - group["momentum"])
                update = param.grad.lerp(state["momentum"], group["momentum"])
                scale = 0.2 * math.sqrt(max(param.shape))
                param.mul_(1 - 0.01 * group["lr"])
                param.add_(orthogonalize(update), alpha=-scale * group["lr"])


def orthogonalize(matrix: torch.Tensor, num_iterations: int = 4) -> torch.Tensor:
    """Move all singular values of `matrix` near one (quintic Newton-Schulz, Muon's constants)."""
    tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.T if tall else matrix
    x = x / (x.norm() + 1e-7)
    for _ in range(num_iterations):
        gram = x @ x.T
        x = 3.4445 * x + (2.0315 * gram @ gram - 4.7750 * gram) @ x
    return x.T if tall else x


def optimizers(model: Qwen2ForCausalLM, lr: float) -> list[torch.optim.Optimizer]:
    """Muon for the layers' matrices, AdamW for embeddings, norms and biases."""
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "layers" in n]
    others = [p for n, p in model.named_parameters() if not (p.ndim == 2 and "layers" in n)]
    return [
        Muon(matrices, lr=lr),
        torch.optim.AdamW(others, lr=lr, betas=(0.9, 0.95), weight_decay=0.0),
    ]


def fit(
    stage: Stage,
    model: Qwen2ForCausalLM,
    batches: Iterator[Batch],
    work_dir: Path,
    export: Callable[[], None],
) -> None:
    """Train for `stage.num_steps`, resuming from and regularly writing `work_dir`/NAME.pt."""
    optims = optimizers(model, stage.learning_rate)
    state_path = work_dir / f"{stage.name}.pt"
    first_step = 0
    if state_path.exists():
        state = torch.load(state_path)
        model.load_state_dict(state["model"])
        for optim, saved in zip(optims, state["optims"], strict=True):
            optim.load_state_dict(saved)
        first_step = state["step"]
        for _ in range(first_step * stage.batches_per_step):
            next(batches)
    model.train()
    started = saved_at = time.monotonic()
    running = math.nan
    for step in range(first_step, stage.num_steps):
        decay = min(1.0, (step + 1) / 50, (stage.num_steps - step) / stage.num_decay_steps)
        for optim in optims:
            for group in optim.param_groups:
                group["lr"] = stage.learning_rate * decay
        value = 0.0
        for _ in range(stage.batches_per_step):
            loss = batch_loss(model, next(batches)) / stage.batches_per_step
            loss.backward()
            value += loss.item()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optim in optims:
            optim.step()
            optim.zero_grad()
        running = value if math.isnan(running) else 0.95 * running + 0.05 * value
        if step % 20 == 0 or step == stage.num_steps - 1:
            seconds = time.monotonic() - started
            print(f"{stage.name} step {step} loss {running:.4f} {seconds:.0f}s", flush=True)
        if time.monotonic() - saved_at > 180 or step == stage.num_steps - 1:
            state = {"model": model.state_dict(), "step": step + 1}
            torch.save(state | {"optims": [o.state_dict() for o in optims]}, state_path)
            export()
            saved_at = time.monotonic()


def train_stage(stage: Stage, tokenizer: PreTrainedTokenizerFast, work_dir: Path) -> None:
    model = build_model(stage, tokenizer)
    if stage.starts_from:
        model.load_state_dict(torch.load(work_dir / f"{stage.starts_from}.pt")["model"])
    diffuses = stage.name.startswith("drafter")
    source = diffusion_batches if diffuses else autoregressive_batches
    fit(
        stage,
        model,
        source(stage, tokenizer),
        work_dir,
        lambda: save_model(model, tokenizer, stage.name.removesuffix("-finish")),
    )


def main() -> None:
    stages = {stage.name: stage for chain in CHAINS for stage in chain}
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("stages", nargs="*", help=f"of {', '.join(stages)}; default: all")
    parser.add_argument("--work-dir", type=Path, default=Path("build/small_pair"))
    parser.add_argument("--threads", type=int, default=1, help="per process")
    args = parser.parse_args()
    args.work_dir.mkdir(parents=True, exist_ok=True)
    if not args.stages:  # the drafters beside the target: two processes use two cores best
        prepare(args.work_dir)
        common = [sys.executable, __file__, "--work-dir", args.work_dir, "--threads", args.threads]
        jobs = [
            subprocess.Popen([str(word) for word in (*common, *(stage.name for stage in chain))])
            for chain in CHAINS
        ]
        sys.exit(max(job.wait() for job in jobs))
    torch.set_num_threads(args.threads)
    # What users will see: AutoTokenizer has its own idea of a `qwen2` tokenizer's word splitting.
    tokenizer = AutoTokenizer.from_pretrained(MODELS_DIR / "target")
    for name in args.stages:
        train_stage(stages[name], tokenizer, args.work_dir)


if __name__ == "__main__":
    main()
