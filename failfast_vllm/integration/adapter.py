"""What the adapters of both model runners have in common."""

from collections.abc import Iterable
from typing import Any

import torch
from vllm.config import VllmConfig
from vllm.v1.outputs import DraftTokenIds

from failfast_vllm.drafters.hosted import max_positions
from failfast_vllm.drafting.drafter import Drafter
from failfast_vllm.integration.session import Session, View
from failfast_vllm.integration.startup import make_drafter, stop_token_ids
from failfast_vllm.observe.counters import DraftStats


class Adapter:
    """Mixed into one of vLLM's proposers: opens a session, and drafts when it is asked to."""

    vllm_config: VllmConfig
    device: torch.device
    model: torch.nn.Module
    session: Session | None = None  # set by `open_session`
    postponed: tuple[Any, ...] | None = None  # the step that `take_drafts` drafts for

    def set_up(self) -> None:
        """Called once vLLM's proposer is made."""
        self.eos_token_ids = frozenset(stop_token_ids(self.vllm_config.model_config))
        # a KV connector fills pages that our commits know nothing of: what it brings is not trusted
        self.foreign_kv = self.vllm_config.kv_transfer_config is not None
        self.stats = DraftStats()

    def open_session(
        self, layer_names: Iterable[str], kv_block_size: int, num_pages: int, table_width: int
    ) -> None:
        """Build the drafter; its KV cache is laid out.

        Args:
            kv_block_size: tokens of a page, as the kernels count them.
            num_pages: of as many tokens.
            table_width: columns of the block tables.
        """
        drafter = make_drafter(
            self.model,
            self.vllm_config,
            layer_names,
            self.stats,
            kv_block_size,
            num_pages,
            table_width,
            self.device,
        )
        self.session = Session(drafter, self.stats, self.eos_token_ids)

    @property
    def drafter(self) -> Drafter | None:
        return None if self.session is None else self.session.drafter

    @property
    def position_limit(self) -> int:
        """Not kept: vLLM may lower the target's limit to what its KV cache holds (auto-fit)."""
        return max_positions(self.vllm_config)

    def view(self, *step: Any) -> View:
        """A reading of the runner, with the step that was postponed."""
        raise NotImplementedError

    def take_drafts(self) -> DraftTokenIds | None:
        """What the scheduler is told of the postponed step; None where there is none."""
        step, self.postponed = self.postponed, None
        if step is None:
            return None
        assert self.session is not None
        return self.session.step(self.view(*step))

    def committed_lens(
        self, block_table: torch.Tensor, computed_lens: torch.Tensor
    ) -> torch.Tensor:
        """As `CommittedBlocks.committed_lens`."""
        assert self.session is not None
        return self.session.drafter.blocks.committed_lens(block_table, computed_lens)

    def clear_new_pages(self, scheduler_output: Any, group: int, page_size: int) -> None:
        """Note that nothing is committed to the pages that this step's requests have got."""
        assert self.session is not None
        pages = new_pages(scheduler_output, group, page_size, trusts_hits=not self.foreign_kv)
        self.session.drafter.blocks.clear(pages, page_size)


def new_pages(scheduler_output: Any, group: int, page_size: int, *, trusts_hits: bool) -> list[int]:
    """The KV pages that this step's requests did not have before.

    Args:
        group: the KV cache group of the drafter.
        page_size: tokens of a page, as the scheduler counts them.
        trusts_hits: False where something else than our commits may have filled a prefix hit.
    """

    def behind_hits(block_ids: Any, num_computed: int) -> list[int]:
        pages: list[int] = block_ids[group]
        return pages[num_computed // page_size :] if trusts_hits else pages

    pages = []
    for request in scheduler_output.scheduled_new_reqs:
        pages += behind_hits(request.block_ids, request.num_computed_tokens)
    cached = scheduler_output.scheduled_cached_reqs
    for req_id, block_ids, num_computed in zip(
        cached.req_ids, cached.new_block_ids, cached.num_computed_tokens, strict=True
    ):
        if block_ids is not None:
            resumed = req_id in cached.resumed_req_ids
            pages += behind_hits(block_ids, num_computed) if resumed else block_ids[group]
    return pages
