"""A drafter whose model reads from a script what it drafts, and how sure it is."""

import numpy as np
import torch

from failfast_kernels import TokenConfidence
from failfast_vllm.drafting.committed_blocks import CommittedBlocks
from failfast_vllm.drafting.drafter import Drafter
from failfast_vllm.drafting.interfaces import Planner
from failfast_vllm.drafting.records import DraftStep
from failfast_vllm.drafting.workspace import Geometry

STOP = 7
MASK = 99


class Script:
    """`DraftModel` that drafts `tokens[s][k]` at the k-th position after the known ones."""

    def __init__(self, known_lens, tokens, confidences):
        self.known_lens = torch.as_tensor(known_lens)
        self.tokens = torch.as_tensor(tokens)  # [num_seqs, cap], as the next
        self.confidences = torch.as_tensor(confidences, dtype=torch.float32)
        self.num_forwards = 0

    def forward(self, batch):
        self.num_forwards += 1
        seqs = batch.block_table[:, 0].repeat_interleave(batch.query_start_loc.diff())
        return torch.stack((seqs, batch.positions), dim=1)

    def confidence(self, hidden_states):
        seqs, positions = hidden_states.T
        places = (seqs, (positions - self.known_lens[seqs]).clamp(0, self.tokens.shape[1] - 1))
        return TokenConfidence(self.tokens[places], self.confidences[places])


def make_drafter(policy, script, *, increment=10, max_num_rows=8192, **options):
    """A drafter of up to 60 tokens; `options` go to it as they are."""
    device = torch.device("cpu")
    geometry = Geometry(MASK + 1, MASK, 32, max_num_rows, device, logit_shift=0)
    return Drafter(
        script,
        policy,
        Planner(increment),
        geometry,
        CommittedBlocks(64, geometry),
        stop_token_ids=torch.tensor([STOP]),
        max_draft_len=60,
        max_draft_budget=4096,
        **options,
    )


def make_step(script, max_draft_lens, *, budget=4096, stops_at_eos=True):
    known = script.known_lens.numpy().astype(np.int64)
    blocks = known // 32 * 32
    return DraftStep(
        req_ids=[f"r{i}" for i in range(len(known))],
        token_ids=torch.ones(len(known), int(known.max()) + 1, dtype=torch.int64),
        slots=np.arange(len(known)),
        block_table=torch.arange(len(known))[:, None].repeat(1, 8),
        known_lens=known,
        committed_lens=blocks,
        final_lens=blocks,
        max_draft_lens=np.asarray(max_draft_lens, dtype=np.int64),
        draft_budget=budget,
        stops_at_eos=np.full(len(known), stops_at_eos),
        min_confidences=np.zeros(len(known), dtype=np.float32),
    )


def random_script(seed, num_seqs=6, cap=60, alphabet=6):
    """Drafts that are sure for a while and then doubtful, without stop tokens."""
    rng = np.random.default_rng(seed)
    sure = rng.beta(20, 1, (num_seqs, cap))
    doubtful = rng.beta(1, 2, (num_seqs, cap))
    rates = rng.choice([0.0, 0.02, 0.1, 0.4], (num_seqs, 1))
    confidences = np.where(rng.random((num_seqs, cap)) < rates, doubtful, sure)
    tokens = rng.integers(0, alphabet, (num_seqs, cap))
    return Script(rng.integers(1, 100, num_seqs), tokens, confidences)
