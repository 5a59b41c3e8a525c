"""Algorithm 1 of arXiv 2512.20573, one sequence, no cache, no batch: slow and literal.

`Rules` names each point in which the product differs from the authors' code, so that a test can
switch it alone. The model is a dense transformers Qwen2 under the block mask, which shares no code
with the product.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch

BLOCK = 32


@dataclass(frozen=True)
class Rules:
    """The authors' choices; `OURS` is what the product does."""

    sub_block_size: int = 8  # positions filled per pass
    unmask_threshold: float = 0.05  # probability above which a pass fills a position
    trims_masks: bool = False  # MASK rows behind the increment are left out
    fills_beyond: bool = True  # a whole sub-block is filled and counted, also behind the increment
    crosses_blocks: bool = False  # one pass may fill positions of two blocks
    exact_cap: bool = False  # the cap counts drafted tokens, not recorded confidences


AUTHORS = Rules()
OURS = Rules(
    sub_block_size=BLOCK,
    unmask_threshold=0.0,
    trims_masks=True,
    fills_beyond=False,
    crosses_blocks=True,
    exact_cap=True,
)


class LiteralDraft(NamedTuple):
    token_ids: list[int]
    num_passes: int


class DenseDrafter:
    """The drafter as a full recompute: hidden states and logits of a whole sequence."""

    def __init__(self, path, num_draftable_tokens):
        from safetensors.torch import load_file
        from transformers import Qwen2Config, Qwen2ForCausalLM

        fields = json.loads((Path(path) / "config.json").read_text())
        self.mask_token_id = fields["mask_token_id"]
        self.num_draftable_tokens = num_draftable_tokens
        fields = {k: v for k, v in fields.items() if k not in ("model_type", "architectures")}
        self.vocab_size = fields["vocab_size"]
        self.model = Qwen2ForCausalLM(Qwen2Config(**fields)).eval()
        weights = {k: v.float() for k, v in load_file(Path(path) / "model.safetensors").items()}
        missing, unexpected = self.model.load_state_dict(weights, strict=False)
        assert not unexpected
        assert set(missing) <= {"lm_head.weight"}  # tied
        self.model.tie_weights()

    @torch.inference_mode()
    def hidden_states(self, token_ids):
        blocks = torch.arange(len(token_ids)) // BLOCK
        mask = torch.zeros(1, 1, len(token_ids), len(token_ids))
        mask.masked_fill_(blocks[None, :] > blocks[:, None], torch.finfo(torch.float32).min)
        ids = torch.tensor([token_ids])
        ids = ids.masked_fill(ids >= self.vocab_size, self.mask_token_id)
        return self.model.model(input_ids=ids, attention_mask=mask).last_hidden_state[0]

    @torch.inference_mode()
    def best(self, token_ids):
        """Best token after each position and its probability; MASK never wins."""
        logits = self.model.lm_head(self.hidden_states(token_ids)).double()
        logits = logits[:, : self.num_draftable_tokens]
        logits[:, self.mask_token_id] = -torch.inf
        probabilities, ids = logits.softmax(-1).max(-1)
        return ids.tolist(), probabilities.tolist()


def literal_draft(
    drafter, token_ids, rules, *, increment, threshold, max_draft, stop_token_ids
) -> LiteralDraft:
    """One draft round after the committed `token_ids`."""
    tokens, length = list(token_ids), len(token_ids)
    mask = drafter.mask_token_id
    high = length + min(increment, max_draft if rules.exact_cap else increment)
    confidences, num_passes = [], 0
    if length % BLOCK == 0 and not rules.crosses_blocks:
        tokens.append(drafter.best(tokens)[0][-1])  # the AR token: shift rule, no confidence
    while True:
        while len(tokens) < high:
            begin = len(tokens)
            sub_block_end = (begin // rules.sub_block_size + 1) * rules.sub_block_size
            end = high if rules.crosses_blocks else sub_block_end
            if not rules.fills_beyond:
                end = min(end, high)
            block_end = (begin // BLOCK + 1) * BLOCK
            tokens += [mask] * ((end if rules.trims_masks else block_end) - begin)
            masked = set(range(begin, end))
            while masked:
                ids, probabilities = drafter.best(tokens)
                num_passes += 1
                confidences += [probabilities[p - 1] for p in sorted(masked)]
                surest = max(masked, key=lambda p: probabilities[p - 1])
                sure = {p for p in masked if probabilities[p - 1] > rules.unmask_threshold}
                for p in sure | {surest}:
                    tokens[p] = ids[p - 1]
                masked -= sure | {surest}
            tokens = tokens[:end]
            if end % BLOCK == 0 and not rules.crosses_blocks:
                num_passes += 1  # commits the block; its last logit is the next block's first token
                tokens.append(drafter.best(tokens)[0][-1])
        if any(confidence < threshold for confidence in confidences):
            break
        if (high - length if rules.exact_cap else len(confidences)) >= max_draft:
            break
        high += min(increment, length + max_draft - high) if rules.exact_cap else increment
    draft = tokens[length:high]
    stops = [i for i, token in enumerate(draft) if token in stop_token_ids]
    return LiteralDraft(draft[: stops[0] + 1] if stops else draft, num_passes)
