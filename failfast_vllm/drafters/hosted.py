"""The draft model inside vLLM: passes in its forward context, on its weights and KV cache."""

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from vllm.config import VllmConfig

from failfast_kernels import TokenConfidence, confidence_argmax, uses_triton
from failfast_vllm import METHOD
from failfast_vllm.drafters.attention import BlockDiffusionMetadata
from failfast_vllm.drafters.cuda_graphs import Capture, PassGraphs, make_buckets, rows_per_seq
from failfast_vllm.drafters.parallel import draft_context, drafter_group
from failfast_vllm.drafting.records import DraftBatch

MAX_PREFIX = 4096


def row_class(num_rows: int) -> int:
    """The next of a few row counts, at most an eighth more than `num_rows` from 32 on.

    oneDNN compiles a quarter of a megabyte for each row count and shape of weights that it meets.
    """
    step = 1 << max(2, (num_rows - 1).bit_length() - 4)
    return -(-num_rows // step) * step


class HostedDraftModel:
    """`interfaces.DraftModel` on a model that vLLM has loaded; `table_width` is in pages."""

    def __init__(
        self,
        model: Any,
        vllm_config: VllmConfig,
        layer_names: Iterable[str],
        table_width: int,
        device: torch.device,
    ) -> None:
        knobs = vllm_config.additional_config[METHOD]  # type: ignore[index]
        self.model = model
        self.vllm_config = vllm_config
        self.layer_names = sorted(layer_names)
        self.num_draftable_tokens = knobs["num_draftable_tokens"]
        self.mask_token_id = knobs["mask_token_id"]
        self.diffusion_block_size = knobs["diffusion_block_size"]
        self.draft_increment = knobs["draft_increment"]
        # a compiled model takes no more
        self.max_num_rows: int = vllm_config.scheduler_config.max_num_batched_tokens
        self.table_width = table_width
        self.device = device
        self.graphs: PassGraphs | None = None

    @property
    def attention(self) -> Any:
        """Of the first layer: all have its shape."""
        layers = self.vllm_config.compilation_config.static_forward_context
        return layers[self.layer_names[0]]

    @torch.inference_mode()
    def warm_up_kernels(self) -> None:
        """Launch every class of the Triton kernels, so that none is compiled while serving."""
        impl, kv_cache = self.attention.impl, self.attention.kv_cache
        if not uses_triton(kv_cache):
            return
        from failfast_kernels import block_attention, confidence

        block_attention.launch_every_class(impl.num_heads, kv_cache, self.diffusion_block_size)
        logits = self._logits(self._run(self.idle_pass(1, 1)))
        confidence.launch_every_class(logits, self.num_draftable_tokens, (self.mask_token_id,))

    def capture(self, capture: Capture, max_num_seqs: int) -> None:
        """Replay captured passes from now on, where one fits."""
        group_size = self.attention.impl.num_heads // self.attention.impl.num_kv_heads
        rows = rows_per_seq(group_size, self.diffusion_block_size, self.draft_increment)
        buckets = make_buckets(max_num_seqs, self.max_num_rows, rows)
        self.graphs = PassGraphs(buckets, self.table_width, self.device)
        self.graphs.capture(capture, self._run)

    def longest_prefix(self, num_rows: int) -> int:
        """Tokens, at most MAX_PREFIX, that may stand before the rows of an idle pass."""
        page: int = self.attention.kv_cache.shape[2]
        most = min(MAX_PREFIX, max_positions(self.vllm_config) - num_rows, self.table_width * page)
        return max(0, most) // page * page

    def idle_pass(self, num_seqs: int, num_rows: int, num_keys: int = 0) -> DraftBatch:
        """A pass that commits nothing, of sequences of equal length, all after the same prefix."""
        rows = torch.arange(num_rows, device=self.device)
        starts = torch.arange(num_seqs + 1, device=self.device) * num_rows // num_seqs
        return DraftBatch(
            input_ids=torch.zeros_like(rows),
            positions=rows % max_positions(self.vllm_config),
            query_start_loc=starts,
            committed_lens=torch.full_like(starts[1:], num_keys),
            slot_mapping=None,
            block_table=starts.new_zeros(num_seqs, self.table_width, dtype=torch.int32),
        )

    def forward(self, batch: DraftBatch) -> torch.Tensor:
        hidden_states = None if self.graphs is None else self.graphs.replay(batch)
        if hidden_states is None:
            hidden_states = self._run(self._widened(batch))[: batch.input_ids.numel()]
        return hidden_states

    def _padding(self, num_rows: int) -> tuple[int, int]:
        """Rows to add before and after: kernels of a CPU are made for one row count."""
        if self.device.type != "cpu":
            return 0, 0
        return 0, max(0, min(row_class(num_rows), self.max_num_rows) - num_rows)

    def _widened(self, batch: DraftBatch) -> DraftBatch:
        """The pass with rows that belong to no sequence and commit nothing."""
        slots, pad = batch.slot_mapping, self._padding(batch.input_ids.numel())
        if pad == (0, 0):
            return batch
        return batch._replace(
            input_ids=F.pad(batch.input_ids, pad),
            positions=F.pad(batch.positions, pad),
            slot_mapping=None if slots is None else F.pad(slots, pad, value=-1),
        )

    def _run(self, batch: DraftBatch) -> torch.Tensor:
        meta = BlockDiffusionMetadata(batch, self.diffusion_block_size)
        with (
            drafter_group(self.vllm_config),
            draft_context(dict.fromkeys(self.layer_names, meta), self.vllm_config),
        ):
            hidden_states: torch.Tensor = self.model(
                # int32 as in vLLM's dummy runs: a compiled model keeps no guard on the type
                input_ids=batch.input_ids.int(),
                positions=batch.positions,
            )
        return hidden_states

    def confidence(self, hidden_states: torch.Tensor) -> TokenConfidence:
        logits = self._logits(hidden_states)
        return confidence_argmax(logits, self.num_draftable_tokens, (self.mask_token_id,))

    def _logits(self, hidden_states: torch.Tensor) -> torch.Tensor:
        num_rows = len(hidden_states)
        with drafter_group(self.vllm_config):
            widened = F.pad(hidden_states, (0, 0, *self._padding(num_rows)))
            logits: torch.Tensor = self.model.compute_logits(widened)
        return logits[:num_rows]


@torch.inference_mode()
def profile_pass(
    model: Any, vllm_config: VllmConfig, num_tokens: int, device: torch.device
) -> None:
    """A pass without attention, and the memory of the largest step: for vLLM's memory profile.

    vLLM profiles one row of the target's logits per request, and ours has `draft_budget` more. V1
    copies them up to three times in float32, V2 once and in parts of `get_max_chunk_logits` rows.
    """
    positions = torch.arange(num_tokens, device=device) % max_positions(vllm_config)
    knobs = vllm_config.additional_config[METHOD]  # type: ignore[index]
    num_rows = vllm_config.scheduler_config.max_num_seqs + knobs["draft_budget"]
    with drafter_group(vllm_config), draft_context(None, vllm_config):
        hidden_states = model(input_ids=torch.zeros_like(positions).int(), positions=positions)
        logits = model.compute_logits(hidden_states[:num_rows])
    num_copies, num_copied = 3, num_rows
    if vllm_config.use_v2_model_runner:
        from vllm.v1.worker.gpu.spec_decode.rejection_sampler import get_max_chunk_logits

        num_copies, num_copied = 1, get_max_chunk_logits(vllm_config.model_config.get_vocab_size())
    copies = [logits[:num_copied].float() for _ in range(num_copies)]
    del copies, logits


def max_positions(vllm_config: VllmConfig) -> int:
    """Tokens that both the target and the drafter can hold."""
    assert vllm_config.speculative_config is not None
    drafter = vllm_config.speculative_config.draft_model_config.hf_config
    target_limit: int = vllm_config.model_config.max_model_len
    return min(target_limit, int(drafter.max_position_embeddings))
