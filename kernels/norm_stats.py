"""norm_stats in Triton: per-channel mean and M2 of tiles of pixels, and their merge, in one launch.

Reads x once: 2 bytes an element in bfloat16. The GEMMs make the same tile statistics in their epilogues, from values
that are still in registers, and share the merge: then x is not read at all. One program takes a tile of pixels by
channels of one statistics group; the last to arrive merges (Chan, Golub and LeVeque 1979) all tiles in a fixed order,
so the same input gives the same bits. Many tiles are merged in two levels, since one program takes them one after the
other.
Everything is float32 around means: no sum of squares of raw values, which would cancel.
Divisions are correctly rounded, where a GPU's plain ones are off by 2 ulp: a sum that is exact has an exact mean, and
equal values have no variance.
"""

import math
from collections.abc import Iterator
from typing import Any, NamedTuple, Self

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastp2p.kernels.arrival import counters, is_last
from fastp2p.kernels.compile_check import Case
from fastp2p.kernels.launch_facts import Arguments, LaunchFacts
from fastp2p.kernels.layout import pixel_rows

CONFIGS = [
    {"BLOCK_M": 64, "BLOCK_C": 64, "num_warps": 8},
    {"BLOCK_M": 256, "BLOCK_C": 16, "num_warps": 4},
    {"BLOCK_M": 32, "BLOCK_C": 128, "num_warps": 4},
    {"BLOCK_M": 1024, "BLOCK_C": 4, "num_warps": 4},
]
ONE_SHARE = 64  # tiles of a group that one program merges; of more, programs merge shares, and the last one those


@triton.jit
def store_partial(
    partial_ptr,  # (3, C) float32, this tile's: mean, M2, count
    values,  # (BLOCK_M, BLOCK_C) float32, as stored
    row_inside,  # (BLOCK_M,)
    channel,  # (BLOCK_C,)
    n_channels,
):
    """Mean, M2 and number of a tile's rows; a tile without any leaves zeros.

    The mean is corrected by the mean of the deviations from it, so that a spread far below the mean keeps its digits.
    """
    count = tl.sum(row_inside.to(tl.float32), axis=0)
    at_least_one = tl.maximum(count, 1.0)
    mean = tl.div_rn(tl.sum(tl.where(row_inside[:, None], values, 0.0), axis=0), at_least_one)
    deviation = tl.where(row_inside[:, None], values - mean[None, :], 0.0)
    left_over = tl.div_rn(tl.sum(deviation, axis=0), at_least_one)  # what rounding kept from the mean
    m2 = tl.sum(deviation * deviation, axis=0) - left_over * left_over * count
    inside = channel < n_channels
    tl.store(partial_ptr + channel, mean + left_over, mask=inside)
    tl.store(partial_ptr + n_channels + channel, tl.where(m2 < 0.0, 0.0, m2), mask=inside)
    tl.store(partial_ptr + 2 * n_channels + channel, count + tl.zeros_like(mean), mask=inside)


@triton.jit
def merge_rows(partial_ptr, first, end, channel, n_channels, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr):
    """Mean, M2 and count, (BLOCK_C,) each, of the partial statistics in rows first to end of (rows, 3, C)."""
    inside = channel < n_channels
    count = tl.zeros((BLOCK_T, BLOCK_C), tl.float32)
    mean = tl.zeros((BLOCK_T, BLOCK_C), tl.float32)
    m2 = tl.zeros((BLOCK_T, BLOCK_C), tl.float32)
    for block in range(first, end, BLOCK_T):  # each place of the block for itself: no step waits for a sum over it
        row = block + tl.arange(0, BLOCK_T)
        at = partial_ptr + row.to(tl.int64)[:, None] * 3 * n_channels + channel[None, :]
        mask = (row < end)[:, None] & inside[None, :]
        row_mean = tl.load(at, mask=mask, other=0.0, cache_modifier=".cg")
        row_m2 = tl.load(at + n_channels, mask=mask, other=0.0, cache_modifier=".cg")
        row_count = tl.load(at + 2 * n_channels, mask=mask, other=0.0, cache_modifier=".cg")
        weight = tl.div_rn(row_count, tl.maximum(count + row_count, 1.0))
        delta = row_mean - mean
        mean += delta * weight
        m2 += row_m2 + delta * delta * (count * weight)
        count += row_count

    total = tl.sum(count, axis=0)
    at_least_one = tl.maximum(total, 1.0)
    merged = tl.div_rn(tl.sum(count * mean, axis=0), at_least_one)
    spread = mean - merged[None, :]
    left_over = tl.div_rn(tl.sum(count * spread, axis=0), at_least_one)  # what rounding kept from the mean
    m2_merged = tl.sum(m2 + count * spread * spread, axis=0) - left_over * left_over * total
    m2_merged = tl.where(m2_merged < 0.0, 0.0, m2_merged)  # by rounding
    return merged + left_over, m2_merged, total


@triton.jit
def store_stats(
    values,  # (BLOCK_M, BLOCK_C) float32, as stored
    row_inside,  # (BLOCK_M,)
    group,
    tile,  # among the group's
    tiles,  # a group's
    share,  # tiles whose statistics one program merges
    channel,  # (BLOCK_C,)
    channel_block,
    channel_blocks,
    n_channels,
    partial_ptr,  # (G, tiles + shares, 3, C) float32
    mean_ptr,  # (G, C) float32
    var_ptr,  # (G, C) float32, biased
    counter_ptr,  # (G, channel_blocks, shares + 1) int32
    BLOCK_C: tl.constexpr,
):
    """A tile's statistics; the last tile of a share merges those of the share, the last share those of the group."""
    BLOCK_T: tl.constexpr = 1024 // BLOCK_C  # twice as many spill where a program has two warps
    shares = tl.cdiv(tiles, share)
    group = group.to(tl.int64)
    partial_ptr += group * (tiles + shares) * 3 * n_channels
    store_partial(partial_ptr + tile.to(tl.int64) * 3 * n_channels, values, row_inside, channel, n_channels)
    counter_ptr += (group * channel_blocks + channel_block) * (shares + 1)
    mine = tile // share
    first = mine * share
    end = tl.minimum(first + share, tiles)
    if is_last(counter_ptr + mine, end - first):
        mean, m2, count = merge_rows(partial_ptr, first, end, channel, n_channels, BLOCK_T, BLOCK_C)
        if shares == 1:
            store_merged(mean, m2, count, group, channel, n_channels, mean_ptr, var_ptr)
        else:
            at = partial_ptr + (tiles + mine).to(tl.int64) * 3 * n_channels + channel
            tl.store(at, mean, mask=channel < n_channels)
            tl.store(at + n_channels, m2, mask=channel < n_channels)
            tl.store(at + 2 * n_channels, count, mask=channel < n_channels)
            if is_last(counter_ptr + shares, shares):
                mean, m2, count = merge_rows(partial_ptr, tiles, tiles + shares, channel, n_channels, BLOCK_T, BLOCK_C)
                store_merged(mean, m2, count, group, channel, n_channels, mean_ptr, var_ptr)


@triton.jit
def store_merged(mean, m2, count, group, channel, n_channels, mean_ptr, var_ptr):
    """A group's mean and biased variance."""
    at = group * n_channels + channel
    tl.store(mean_ptr + at, mean, mask=channel < n_channels)
    tl.store(var_ptr + at, tl.div_rn(m2, tl.maximum(count, 1.0)), mask=channel < n_channels)


@triton.jit(do_not_specialize=["rows", "tiles", "share"])
def _norm_stats_kernel(
    x_ptr,  # (G * rows, C), rows pixel_stride apart
    partial_ptr,  # these four as in store_stats
    mean_ptr,
    var_ptr,
    counter_ptr,
    rows,  # a group's
    tiles,  # a group's
    share,
    n_channels,
    pixel_stride,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    channel_blocks = tl.cdiv(n_channels, BLOCK_C)
    tile = tl.program_id(0) // channel_blocks  # over all groups
    channel_block = tl.program_id(0) % channel_blocks
    channel = channel_block * BLOCK_C + tl.arange(0, BLOCK_C)
    group = tile // tiles
    row = tile % tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    row_inside = row < rows
    offset = (group.to(tl.int64) * rows + row)[:, None] * pixel_stride + channel[None, :]
    x = tl.load(x_ptr + offset, mask=row_inside[:, None] & (channel < n_channels)[None, :], other=0.0).to(tl.float32)
    store_stats(
        x, row_inside, group, tile % tiles, tiles, share, channel, channel_block, channel_blocks, n_channels,
        partial_ptr, mean_ptr, var_ptr, counter_ptr, BLOCK_C,
    )  # fmt: skip


def merge_steps(args: Arguments, tiles: int, block_c: int) -> int:
    """The iterations of merge_rows in the program that merges last, of so many tiles in a group."""
    block_t, share = 1024 // block_c, args["share"]
    steps: int = triton.cdiv(min(share, tiles), block_t)
    return steps + (triton.cdiv(triton.cdiv(tiles, share), block_t) if tiles > share else 0)


LAUNCH_FACTS = {
    "_norm_stats_kernel": LaunchFacts(merges=lambda args: merge_steps(args, args["tiles"], args["BLOCK_C"]))
}


def compile_cases() -> Iterator[Case]:
    """In each precision."""
    for dtype in ("fp32", "bf16", "fp16"):
        types = {"x_ptr": f"*{dtype}", "counter_ptr": "*i32"}
        types |= dict.fromkeys(("partial_ptr", "mean_ptr", "var_ptr"), "*fp32")
        types |= dict.fromkeys(("rows", "tiles", "share", "n_channels", "pixel_stride"), "i32")
        yield Case(f"norm_stats {dtype}", _norm_stats_kernel, types, {}, CONFIGS)


def choose_config(channels: int) -> dict[str, Any]:
    """The first, unless that many channels would leave most of its columns empty."""
    return CONFIGS[3] if channels <= 4 else CONFIGS[1] if channels <= 16 else CONFIGS[0]


def share_of(tiles: int) -> int:
    """How many of a group's tiles one program merges: all, or of many about their square root."""
    return max(tiles, 1) if tiles <= ONE_SHARE else int(triton.next_power_of_2(math.isqrt(tiles - 1) + 1))


class StatsBuffers(NamedTuple):
    """Where a launch leaves statistics, and what it needs on the way."""

    partial: Tensor  # (stat_groups, tiles + shares, 3, C) float32
    mean: Tensor  # (stat_groups, C) float32
    var: Tensor
    share: int
    n_counters: int

    @classmethod
    def new(cls, stat_groups: int, tiles: int, channels: int, channel_blocks: int, device: torch.device) -> Self:
        """For so many tiles in each group; without groups there is nothing in it.

        Args:
            channel_blocks: columns of tiles.
        """
        share = share_of(tiles)
        shares = triton.cdiv(tiles, share)
        rows = tiles + shares
        partial = torch.empty(stat_groups, rows, 3, channels, dtype=torch.float32, device=device)
        mean, var = (torch.empty(stat_groups, channels, dtype=torch.float32, device=device) for _ in range(2))
        return cls(partial, mean, var, share, stat_groups * channel_blocks * (shares + 1))


def norm_stats(x: Tensor, stat_groups: int, config: dict[str, Any] | None = None) -> tuple[Tensor, Tensor]:
    """Launch; see `fastp2p.ops.norm_stats`."""
    x, pixel_stride = pixel_rows(x)
    channels = x.shape[1]
    config = config or choose_config(channels)
    rows = x.numel() // channels // max(1, stat_groups)  # a group's
    tiles, channel_blocks = triton.cdiv(rows, config["BLOCK_M"]), triton.cdiv(channels, config["BLOCK_C"])
    stats = StatsBuffers.new(stat_groups, tiles, channels, channel_blocks, x.device)
    if stat_groups:
        _norm_stats_kernel[(stat_groups * tiles * channel_blocks,)](
            x,
            stats.partial,
            stats.mean,
            stats.var,
            counters(stats.n_counters, x),
            rows,
            tiles,
            stats.share,
            channels,
            pixel_stride,
            **config,
        )
    return stats.mean, stats.var
