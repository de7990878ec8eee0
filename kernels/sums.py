"""Two sums over the pixels of each group and channel, of parts that programs leave, added by the last to arrive.

The gradients of a norm need them: of dz, the gradient before the norm's affine map, and of dz * xhat. Parts are added
in a fixed order, many of them in two levels, as in norm_stats: the same input gives the same bits.
"""

from typing import NamedTuple, Self

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastp2p.kernels.arrival import is_last
from fastp2p.kernels.launch_facts import Arguments
from fastp2p.kernels.layout import within
from fastp2p.kernels.norm_stats import load_pairs, rows_at_once, share_of, store_pair


@triton.jit
def store_sums(
    one,  # (BLOCK_C,) float32, this part's first sum
    other,  # (BLOCK_C,) float32, its second
    group,
    groups,  # read where there are totals
    part,  # among the group's
    parts,  # a group's
    share,  # parts that one program adds
    channel,  # (BLOCK_C,)
    channel_block,
    channel_blocks,
    n_channels,
    partial_ptr,  # (G, parts + shares, 2, C) float32
    one_ptr,  # (G, C) float32
    other_ptr,  # (G, C) float32
    total_one_ptr,  # (C,) float32: the first sum over all groups
    total_other_ptr,  # (C,) float32: the second
    counter_ptr,  # (G, channel_blocks, shares + 1) int32, and after them (channel_blocks,) for the totals
    HAS_TOTALS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """A part's sums; the last part of a share adds the share's, the last share the group's, the last group all."""
    shares = tl.cdiv(parts, share)
    all_groups_ptr = counter_ptr + groups * channel_blocks * (shares + 1) + channel_block
    done = parts == 1
    if parts > 1:
        counter_ptr += (group * channel_blocks + channel_block) * (shares + 1)
        partial_ptr += 2 * (group.to(tl.int64) * (parts + shares) * n_channels)
        store_pair(partial_ptr + 2 * (part.to(tl.int64) * n_channels), one, other, channel, n_channels)
        mine = part // share
        first = mine * share
        end = tl.minimum(first + share, parts)
        done = is_last(counter_ptr + mine, end - first)
        if done:
            one, other = add_rows(partial_ptr, first, end, channel, n_channels, BLOCK_C)
        if done & (shares > 1):
            at = partial_ptr + 2 * ((parts + mine).to(tl.int64) * n_channels)
            store_pair(at, one, other, channel, n_channels)
            done = is_last(counter_ptr + shares, shares)
            if done:
                one, other = add_rows(partial_ptr, parts, parts + shares, channel, n_channels, BLOCK_C)
    if done:
        store_group(
            one, other, group, groups, channel, n_channels, one_ptr, other_ptr, total_one_ptr, total_other_ptr,
            all_groups_ptr, HAS_TOTALS, BLOCK_C,
        )  # fmt: skip


@triton.jit
def store_group(
    one, other, group, groups, channel, n_channels, one_ptr, other_ptr, total_one_ptr, total_other_ptr, counter_ptr,
    HAS_TOTALS: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """A group's sums; the last group adds those of all, where they are wanted."""
    inside = within(channel, n_channels)
    at = group.to(tl.int64) * n_channels + channel
    tl.store(one_ptr + at, one, mask=inside)
    tl.store(other_ptr + at, other, mask=inside)
    if HAS_TOTALS:
        last = is_last(counter_ptr, groups)
        if last:
            one = tl.zeros_like(one)
            other = tl.zeros_like(other)
            for i in range(groups):
                one += tl.load(one_ptr + i * n_channels + channel, mask=inside, other=0.0, cache_modifier=".cg")
                other += tl.load(other_ptr + i * n_channels + channel, mask=inside, other=0.0, cache_modifier=".cg")
            tl.store(total_one_ptr + channel, one, mask=inside)
            tl.store(total_other_ptr + channel, other, mask=inside)


@triton.jit
def add_rows(partial_ptr, first, end, channel, n_channels, BLOCK_C: tl.constexpr):
    """The two sums, (BLOCK_C,) each, of rows first to end of (rows, 2, C)."""
    BLOCK_T: tl.constexpr = rows_at_once(BLOCK_C)
    one = tl.zeros((BLOCK_T, BLOCK_C), tl.float32)
    other = tl.zeros((BLOCK_T, BLOCK_C), tl.float32)
    for block in range(first, end, BLOCK_T):
        row = block + tl.arange(0, BLOCK_T)
        one_here, other_here = load_pairs(partial_ptr, row, row < end, channel, n_channels)
        one += one_here
        other += other_here
    return sums_of(one, other)


@triton.jit
def sums_of(one, other):
    """The sums over the rows of two (BLOCK_M, BLOCK_C), (BLOCK_C,) each, made together: each waits for all warps."""
    return tl.split(tl.sum(tl.join(one, other), axis=0))


def sum_steps(args: Arguments, parts: int, block_c: int, *, totals: bool) -> int:
    """The iterations of add_rows in the program that adds last, of so many parts in a group."""
    block_t, share = rows_at_once(block_c), args["share"]
    steps: int = triton.cdiv(min(share, parts), block_t) if parts > 1 else 0
    steps += triton.cdiv(triton.cdiv(parts, share), block_t) if parts > share else 0
    return steps + (args["groups"] if totals else 0)


class SumsBuffers(NamedTuple):
    """Where a launch leaves such sums, and what it needs on the way."""

    partial: Tensor  # (G, parts + shares, 2, C) float32
    one: Tensor  # (G, C) float32
    other: Tensor
    share: int
    n_counters: int

    @classmethod
    def new(cls, groups: int, parts: int, channels: int, channel_blocks: int, device: torch.device) -> Self:
        """For so many parts of each group.

        Args:
            channel_blocks: columns of tiles.
        """
        share = share_of(parts)
        shares = triton.cdiv(parts, share)
        shapes = ((groups, parts + shares, 2, channels), (groups, channels), (groups, channels))
        partial, one, other = (torch.empty(shape, dtype=torch.float32, device=device) for shape in shapes)
        return cls(partial, one, other, share, channel_blocks * (groups * (shares + 1) + 1))
