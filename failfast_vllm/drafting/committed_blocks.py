"""Which diffusion blocks hold the drafter's KV: one bit per block of each physical KV page.

Commits may be postponed while nothing is drafted, so what the target has computed does not tell
what the drafter has. A bit is set where a block is committed, and cleared where vLLM gives the page
to a request anew; a page that a request gets as a prefix hit has kept its tokens. Torch only;
nothing is copied to the host.
"""

import numpy as np
import torch

from failfast_vllm.drafting.records import to_device
from failfast_vllm.drafting.workspace import Geometry


class CommittedBlocks:
    """The bits of `num_pages` pages, whole diffusion blocks each."""

    def __init__(self, num_pages: int, geometry: Geometry) -> None:
        self.geometry, self.size = geometry, geometry.diffusion_block_size
        self.per_page, device = geometry.kv_block_size // self.size, geometry.device
        # the last bit belongs to no page: it takes what is written for rows that are not committed
        self.bits = torch.zeros(num_pages * self.per_page + 1, dtype=torch.bool, device=device)

    def clear(self, pages: list[int], page_size: int) -> None:
        """Note that pages of `page_size` tokens, as vLLM's scheduler counts them, are new.

        To be called before anything is committed to them.
        """
        if pages:
            by_page = self.bits[:-1].view(-1, page_size // self.size)
            by_page[to_device(np.array(pages), self.bits.device)] = False

    def committed_lens(
        self, block_table: torch.Tensor, computed_lens: torch.Tensor
    ) -> torch.Tensor:
        """Tokens before each sequence's first block without KV in its window, [num_seqs] int64.

        Args:
            block_table: [num_seqs, max_pages] int; undefined after the pages of `computed_lens`.
            computed_lens: [num_seqs] int, tokens whose target KV is there.
        """
        if not block_table.shape[1]:  # no drafter
            return torch.zeros_like(computed_lens, dtype=torch.int64)
        inside = torch.arange(self.per_page, device=self.bits.device)
        blocks = (block_table.long()[:, :, None] * self.per_page + inside).flatten(1)
        places = torch.arange(blocks.shape[1], device=self.bits.device)
        num_old = computed_lens // self.size
        old = places < num_old[:, None]
        committed = self.bits[torch.where(old, blocks, self.bits.numel() - 1)] & old
        if self.geometry.window is not None:  # what is before it is not read
            starts = self.geometry.window_starts(num_old * self.size)
            committed |= places < (starts // self.size)[:, None]
        return committed.long().cumprod(dim=1).sum(dim=1) * self.size

    def mark(self, slot_mapping: torch.Tensor) -> None:
        """The blocks of these slots are committed; -1 is no slot. [num_rows] int64."""
        self.bits[slot_mapping // self.size] = True  # -1 // size is the last bit
