"""The specification of every kernel, in plain PyTorch.

Block-diffusion attention (Fast-dLLM v2, arXiv 2509.26328): the sequence is cut on the absolute
grid of `diffusion_block_size` positions; query q sees key k iff floor(k / size) <= floor(q / size).
So attention is bidirectional inside a block and causal across blocks.

The rows of one pass are ragged: sequence s owns rows `query_start_loc[s]:query_start_loc[s + 1]`,
at positions `committed_lens[s], committed_lens[s] + 1, ...`. Keys below `committed_lens[s]` come
from the paged cache, the others from this pass. `committed_lens` is a multiple of the block size,
so the mask of the pass's own keys depends on row offsets alone.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F

VOCAB_TILE = 8192  # columns; bounds the temporary of `confidence_argmax` to rows x 32 KiB
LEAST = torch.finfo(torch.float32).min
GROUP_RATIO = 4  # a group's longest sequence has at most this many times the rows of its bound
GROUP_BASE = 128  # rows; decoding sequences (at most 31 + 60 + 10 rows) always share one group


class TokenConfidence(NamedTuple):
    """The best token of each row and how sure the model is of it."""

    token_ids: torch.Tensor  # [num_rows] int64
    probabilities: torch.Tensor  # [num_rows] float32, softmax probability of `token_ids`


class PaddedGroup(NamedTuple):
    """Some sequences of a pass, padded to one rectangle; made once, used by every layer."""

    rows: torch.Tensor  # [num_seqs, max_rows] int64, index of each row; padding repeats row 0
    valid_rows: torch.Tensor | None  # [num_seqs, max_rows] bool; None when nothing is padding
    pages: torch.Tensor  # [num_seqs, max_prefix_blocks] int64, page of each committed block
    page_offsets: torch.Tensor  # [num_seqs, max_prefix_blocks] int64, block inside the page
    stale_blocks: torch.Tensor | None  # [num_seqs, max_prefix_blocks] bool, padding; None: none
    mask: torch.Tensor  # [num_seqs, 1, group_size * max_rows, num_keys] float, 0 or -inf


def plan_padding(
    block_table: torch.Tensor,
    committed_lens: torch.Tensor,
    query_start_loc: torch.Tensor,
    page_size: int,
    group_size: int,
    dtype: torch.dtype,
    diffusion_block_size: int = 32,
) -> list[PaddedGroup]:
    """Put the sequences of a pass into rectangles of similar length; those without rows into none.

    Args:
        block_table: [num_seqs, max_pages] int, page ids of the paged KV cache.
        committed_lens: [num_seqs] int, tokens of each sequence that the cache holds.
        query_start_loc: [num_seqs + 1] int, first row of each sequence.
        page_size: tokens per page, a multiple of `diffusion_block_size`.
        group_size: query heads per KV head.
        dtype: of the attention's inputs.
    """
    device, query_lens = block_table.device, query_start_loc.diff()
    blocks_per_page = page_size // diffusion_block_size
    groups: list[PaddedGroup] = []
    low, high, longest = 0, GROUP_BASE, max(query_lens.tolist(), default=0)
    while low < longest:
        members = torch.nonzero((query_lens > low) & (query_lens <= high))  # [num_seqs, 1]
        low, high = high, high * GROUP_RATIO
        if not members.numel():
            continue
        offsets = torch.arange(int(query_lens[members].max()), device=device)
        valid_rows = offsets < query_lens[members]
        rows = query_start_loc[members] + torch.where(valid_rows, offsets, 0)

        num_blocks = committed_lens[members] // diffusion_block_size
        blocks = torch.arange(int(num_blocks.max()), device=device)
        fresh = blocks < num_blocks
        pages = torch.where(fresh, block_table[members, blocks // blocks_per_page].long(), 0)

        own = offsets // diffusion_block_size
        sees_own = (own[None, :] <= own[:, None]) & valid_rows[:, None, :]  # [num_seqs, q, k]
        sees_prefix = fresh.repeat_interleave(diffusion_block_size, 1)[:, None, :]
        sees = torch.cat([sees_prefix.expand(-1, len(offsets), -1), sees_own], dim=-1)
        mask = torch.zeros(sees.shape, dtype=dtype, device=device).masked_fill_(~sees, -torch.inf)
        groups.append(
            PaddedGroup(
                rows=rows,
                valid_rows=None if bool(valid_rows.all()) else valid_rows,
                pages=pages,
                page_offsets=(blocks % blocks_per_page).expand_as(pages),
                stale_blocks=None if bool(fresh.all()) else ~fresh,
                mask=mask.repeat(1, group_size, 1)[:, None],
            )
        )
    return groups


def block_diffusion_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    kv_cache: torch.Tensor,
    block_table: torch.Tensor,
    committed_lens: torch.Tensor,
    query_start_loc: torch.Tensor,
    scale: float,
    diffusion_block_size: int = 32,
    groups: Sequence[PaddedGroup] | None = None,
    output: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attend from the ragged rows of many sequences to their prefixes and to each other.

    Args:
        query: [num_rows, num_heads, head_dim].
        key: [num_rows, num_kv_heads, head_dim], of the same rows, positions applied.
        value: likewise.
        kv_cache: [num_pages, num_kv_heads, page_size, 2 * head_dim], any strides; keys in the
            first half of the last dimension, values in the second.
        block_table: see `plan_padding`, also for the next two and `diffusion_block_size`.
        scale: multiplies the scores.
        groups: what `plan_padding` returned for this pass, to share it between layers.
        output: where to write; None allocates.

    Returns:
        `output`, like `query`; zero in rows after the last sequence's, which are padding.
    """
    _, num_heads, head_dim = query.shape
    num_kv_heads, page_size = kv_cache.shape[1], kv_cache.shape[2]
    group_size = num_heads // num_kv_heads
    if groups is None:
        places = block_table, committed_lens, query_start_loc
        groups = plan_padding(*places, page_size, group_size, query.dtype, diffusion_block_size)
    blocks = kv_cache.view(
        -1, num_kv_heads, page_size // diffusion_block_size, diffusion_block_size, 2 * head_dim
    )
    if output is None:
        output = torch.empty_like(query)
    for group in groups:
        num_seqs, max_rows = group.rows.shape
        # [num_seqs, num_blocks, num_kv_heads, block, 2 * head_dim]
        prefix = blocks[group.pages, :, group.page_offsets]
        if group.stale_blocks is not None:
            prefix.masked_fill_(group.stale_blocks[:, :, None, None, None], 0.0)
        prefix = prefix.transpose(1, 2).flatten(2, 3)
        keys = torch.cat([prefix[..., :head_dim], key[group.rows].transpose(1, 2)], dim=2)
        values = torch.cat([prefix[..., head_dim:], value[group.rows].transpose(1, 2)], dim=2)
        # the heads of a KV group become further rows: [num_seqs, num_kv_heads, group x rows, dim]
        rows = query[group.rows].view(num_seqs, max_rows, num_kv_heads, group_size, head_dim)
        rows = rows.permute(0, 2, 3, 1, 4).flatten(2, 3)
        attended = F.scaled_dot_product_attention(
            rows, keys, values, attn_mask=group.mask, scale=scale
        )
        attended = attended.reshape(num_seqs, num_heads, max_rows, head_dim).transpose(1, 2)
        if group.valid_rows is None:
            output[group.rows] = attended
        else:
            output[group.rows[group.valid_rows]] = attended[group.valid_rows]
    output[int(query_start_loc[-1]) :] = 0.0
    return output


def commit_kv(
    key: torch.Tensor, value: torch.Tensor, kv_cache: torch.Tensor, slot_mapping: torch.Tensor
) -> None:
    """Write the rows of complete, committed blocks to their pages in `kv_cache`.

    It must run before the same layer's attention reads the cache: another sequence of this pass
    may share the pages through a prefix hit. Shapes are those of `block_diffusion_attention`;
    `slot_mapping`, [num_rows] int, is page * page_size + offset, or -1 to leave the row out.
    """
    page_size = kv_cache.shape[2]
    rows = torch.nonzero(slot_mapping >= 0).squeeze(1)
    slots = slot_mapping[rows]
    kv_cache[slots // page_size, :, slots % page_size] = torch.cat([key[rows], value[rows]], dim=-1)


def lowest_allowed_id(num_columns: int, num_valid_tokens: int, forbidden_ids: Sequence[int]) -> int:
    """The first id that may win; raises ValueError where the arguments leave none or too many."""
    if not 0 < num_valid_tokens <= num_columns:
        raise ValueError(
            f"failfast: num_valid_tokens must be between 1 and the {num_columns} columns of the "
            f"logits; got {num_valid_tokens}."
        )
    for token_id in range(num_valid_tokens):
        if token_id not in forbidden_ids:
            return token_id
    raise ValueError(f"failfast: all {num_valid_tokens} tokens are forbidden; allow one.")


def confidence_argmax(
    logits: torch.Tensor, num_valid_tokens: int, forbidden_ids: Sequence[int] = ()
) -> TokenConfidence:
    """Best token and its softmax probability, in one pass over column tiles.

    Ties go to the lowest id, as in `torch.argmax`. A row whose softmax is undefined (a NaN, +inf,
    or -inf in every allowed column) gets the lowest allowed id and probability 0.

    Args:
        logits: [num_rows, vocab_size].
        num_valid_tokens: columns from here on never win and carry no mass (padding, or ids that
            the target does not have).
        forbidden_ids: further columns without mass (MASK).

    Raises:
        ValueError: no column may win, or `num_valid_tokens` exceeds the columns.
    """
    num_rows = logits.shape[0]
    fallback_id = lowest_allowed_id(logits.shape[1], num_valid_tokens, forbidden_ids)
    # the least float32 instead of -inf: a tile of -inf alone must not give exp(inf - inf)
    best = logits.new_full((num_rows,), LEAST, dtype=torch.float32)
    mass = torch.zeros_like(best)  # sum of exp(z - best) so far
    token_ids = torch.full_like(best, fallback_id, dtype=torch.int64)
    for start in range(0, num_valid_tokens, VOCAB_TILE):
        end = min(start + VOCAB_TILE, num_valid_tokens)
        columns = [i - start for i in forbidden_ids if start <= i < end]
        tile = logits[:, start:end].to(torch.float32, copy=bool(columns))
        if columns:
            tile[:, columns] = -torch.inf
        tile_best, tile_ids = tile.max(dim=-1)
        new_best = torch.maximum(best, tile_best)
        mass = mass * (best - new_best).exp() + (tile - new_best[:, None]).exp_().sum(dim=-1)
        token_ids = torch.where(tile_best > best, tile_ids + start, token_ids)
        best = new_best
    defined = mass > 0  # false for NaN
    token_ids = torch.where(defined, token_ids, fallback_id)
    return TokenConfidence(token_ids, torch.where(defined, mass.reciprocal(), 0.0))
