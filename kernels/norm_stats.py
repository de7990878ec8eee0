"""norm_stats in Triton: per-channel mean and M2 of tiles of pixels, and their merge, in one launch.

Reads x once: 2 bytes an element in bfloat16. The GEMMs make the same tile statistics in their epilogues, from values
that are still in registers, and share the merge: then x is not read at all. One program takes some tiles of pixels by
channels of one statistics group; the last to arrive merges (Chan, Golub and LeVeque 1979) all tiles in a fixed order,
so the same input gives the same bits. Many tiles are merged in two levels, since one program takes them one after the
other.
Everything is float32 around means: no sum of squares of raw values, which would cancel.

A GEMM's epilogue runs once in each program, and at batch size 1 alone on its processor, so each of its instructions
waits for the one before: on an H200 statistics took 5 us of an 18 us convolution, and their merge 5 us more.
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
from fastp2p.kernels.dependent import begin, launched
from fastp2p.kernels.launch_facts import Arguments, LaunchFacts
from fastp2p.kernels.layout import pixel_rows, within

CONFIGS = [
    {"BLOCK_M": 64, "BLOCK_C": 64, "num_warps": 8},
    {"BLOCK_M": 256, "BLOCK_C": 16, "num_warps": 4},
    {"BLOCK_M": 32, "BLOCK_C": 128, "num_warps": 4},
    {"BLOCK_M": 1024, "BLOCK_C": 4, "num_warps": 4},
]
PROGRAMS = 1024  # about so many at most: enough to fill a large GPU, and what each does once is little beside its tiles
ONE_SHARE = 64  # tiles of a group that one program merges; of more, programs merge shares, and the last one those


@triton.constexpr_function
def rows_at_once(block_c):
    """How many rows of partial results, of so many channels, one step of a merge takes."""
    return max(1, min(32, 2048 // block_c))


@triton.jit
def tile_stats(values, row_inside, count, EXACT: tl.constexpr):
    """Mean and M2, (BLOCK_C,) each, of a tile's `count` rows; zeros without any.

    Deviations are taken from a mean that may be off by a rounding, so no division need be exact. With EXACT their own
    mean corrects it and M2. It makes a difference where a spread is less than a millionth of the mean; values of 16
    bits have no such spread, and each sum is a hundred instructions in the epilogue of a GEMM.

    Args:
        values: (BLOCK_M, BLOCK_C) float32, as stored.
        row_inside: (BLOCK_M,).
        count: those inside, float32.
    """
    inverse = tl.div_rn(1.0, tl.maximum(count, 1.0))
    near = tl.sum(tl.where(row_inside[:, None], values, 0.0), axis=0) * inverse
    deviation = tl.where(row_inside[:, None], values - near[None, :], 0.0)
    if EXACT:
        left_over, squares = tl.split(tl.sum(tl.join(deviation, deviation * deviation), axis=0))
        mean, m2 = corrected(near, left_over, squares, inverse)
    else:
        mean, m2 = near, tl.sum(deviation * deviation, axis=0)
    return mean, m2


@triton.jit
def corrected(near, left_over, squares, inverse):
    """Mean and M2 from the sums of deviations from a value near the mean, and of their squares."""
    off = left_over * inverse
    m2 = squares - left_over * off
    return near + off, tl.where(m2 < 0.0, 0.0, m2)  # by rounding


@triton.jit
def store_pair(pair_ptr, one, other, channel, n_channels):
    """Two values a channel, (BLOCK_C,) each, into (2, C)."""
    at = pair_ptr + tl.arange(0, 2)[:, None] * n_channels + channel[None, :]
    tl.store(at, tl.trans(tl.join(one, other)), mask=within(channel, n_channels)[None, :])


@triton.jit
def load_pairs(pair_ptr, row, there, channel, n_channels):
    """Rows of (rows, 2, C) that another program may have stored, (len(row), BLOCK_C) twice; 0 where there are none."""
    at = pair_ptr + 2 * row.to(tl.int64)[:, None] * n_channels + channel[None, :]
    mask = there[:, None] & within(channel, n_channels)[None, :]
    one = tl.load(at, mask=mask, other=0.0, cache_modifier=".cg")
    return one, tl.load(at + n_channels, mask=mask, other=0.0, cache_modifier=".cg")


@triton.jit
def merge_block(mean, m2, count):
    """Mean, M2, (BLOCK_C,) each, and count of all rows, from each row's: (rows, BLOCK_C) twice, and (rows,)."""
    total = tl.sum(count, axis=0)
    inverse = tl.div_rn(1.0, tl.maximum(total, 1.0))
    near = tl.sum(count[:, None] * mean, axis=0) * inverse
    deviation = mean - near[None, :]
    weighted = count[:, None] * deviation
    left_over, squares = tl.split(tl.sum(tl.join(weighted, m2 + weighted * deviation), axis=0))
    mean, m2 = corrected(near, left_over, squares, inverse)
    return mean, m2, total


@triton.jit
def merge_rows(partial_ptr, count_ptr, first, end, channel, n_channels, BLOCK_C: tl.constexpr):
    """Mean, M2, (BLOCK_C,) each, and count of the partial statistics in rows first to end of (rows, 2, C)."""
    BLOCK_T: tl.constexpr = rows_at_once(BLOCK_C)
    count = 0.0
    mean = tl.zeros((BLOCK_C,), tl.float32)
    m2 = tl.zeros((BLOCK_C,), tl.float32)
    for block in range(first, end, BLOCK_T):
        row = block + tl.arange(0, BLOCK_T)
        row_mean, row_m2 = load_pairs(partial_ptr, row, row < end, channel, n_channels)
        rows = tl.load(count_ptr + row, mask=row < end, other=0.0, cache_modifier=".cg")
        here, m2_here, rows_here = merge_block(row_mean, row_m2, rows)
        weight = tl.div_rn(rows_here, tl.maximum(count + rows_here, 1.0))
        delta = here - mean
        mean += delta * weight
        m2 += m2_here + delta * delta * (count * weight)
        count += rows_here
    return mean, m2, count


@triton.jit
def store_stats(
    values,  # (BLOCK_M, BLOCK_C) float32, as stored
    row_inside,  # (BLOCK_M,)
    count,  # rows inside
    group,
    tile,  # among the group's
    tiles,  # a group's
    share,  # tiles whose statistics one program merges
    channel,  # (BLOCK_C,)
    channel_block,
    channel_blocks,
    n_channels,
    partial_ptr,  # (G, C + channel_blocks, tiles + shares, 2) float32: (tiles + shares, 2, C), and after them counts
    mean_ptr,  # (G, C) float32
    var_ptr,  # (G, C) float32, biased
    counter_ptr,  # (G, channel_blocks, shares + 1) int32
    EXACT: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """A tile's statistics; the last tile of a share merges those of the share, the last share those of the group."""
    count = count.to(tl.float32)
    mean, m2 = tile_stats(values, row_inside, count, EXACT)
    merge_tiles(
        mean, m2, count, group, tile, tiles, share, channel, channel_block, channel_blocks, n_channels,
        partial_ptr, mean_ptr, var_ptr, counter_ptr, BLOCK_C,
    )  # fmt: skip


@triton.jit
def merge_tiles(
    mean, m2, count, group, tile, tiles, share, channel, channel_block, channel_blocks, n_channels,
    partial_ptr, mean_ptr, var_ptr, counter_ptr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """What store_stats does with a tile's mean and M2, (BLOCK_C,) each, and count."""
    group = group.to(tl.int64)
    done = tiles == 1
    if tiles > 1:
        shares = tl.cdiv(tiles, share)
        rows = tiles + shares
        partial_ptr += 2 * (group * rows * (n_channels + channel_blocks))
        count_ptr = partial_ptr + 2 * (rows * (n_channels + channel_block)).to(tl.int64)
        counter_ptr += (group * channel_blocks + channel_block) * (shares + 1)
        store_pair(partial_ptr + 2 * n_channels * tile.to(tl.int64), mean, m2, channel, n_channels)
        tl.store(count_ptr + tile, count)
        mine = tile // share
        first = mine * share
        end = tl.minimum(first + share, tiles)
        done = is_last(counter_ptr + mine, end - first)
        if done:
            mean, m2, count = merge_rows(partial_ptr, count_ptr, first, end, channel, n_channels, BLOCK_C)
        if done & (shares > 1):
            store_pair(partial_ptr + 2 * n_channels * (tiles + mine).to(tl.int64), mean, m2, channel, n_channels)
            tl.store(count_ptr + tiles + mine, count)
            done = is_last(counter_ptr + shares, shares)
            if done:
                mean, m2, count = merge_rows(partial_ptr, count_ptr, tiles, rows, channel, n_channels, BLOCK_C)
    if done:
        store_merged(mean, m2, count, group, channel, n_channels, mean_ptr, var_ptr)


@triton.jit
def store_merged(mean, m2, count, group, channel, n_channels, mean_ptr, var_ptr):
    """A group's mean and biased variance."""
    at = group * n_channels + channel
    tl.store(mean_ptr + at, mean, mask=channel < n_channels)
    tl.store(var_ptr + at, m2 * tl.div_rn(1.0, tl.maximum(count, 1.0)), mask=channel < n_channels)


@launched(do_not_specialize=["rows", "parts", "tiles", "share"])
def _norm_stats_kernel(
    x_ptr,  # (G * rows, C), rows pixel_stride apart
    partial_ptr,  # these four as in store_stats
    mean_ptr,
    var_ptr,
    counter_ptr,
    rows,  # a group's
    parts,  # a group's
    tiles,  # a part's
    share,  # parts whose statistics one program merges
    n_channels,
    pixel_stride,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    begin()
    channel_blocks = tl.cdiv(n_channels, BLOCK_C)
    part = tl.program_id(0) // channel_blocks  # over all groups
    channel_block = tl.program_id(0) % channel_blocks
    channel = channel_block * BLOCK_C + tl.arange(0, BLOCK_C)
    group = part // parts
    part = part % parts
    first = part * tiles * BLOCK_M
    end = tl.minimum(first + tiles * BLOCK_M, rows)
    x_ptr += group.to(tl.int64) * rows * pixel_stride
    mean, inside = _tile(x_ptr, first, end, channel, n_channels, pixel_stride, BLOCK_M)
    rows_seen = inside.to(tl.float32)
    m2 = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
    tiles_seen = 1.0
    for row in range(first + BLOCK_M, end, BLOCK_M):  # Welford's, each place of the tile for itself
        x, inside = _tile(x_ptr, row, end, channel, n_channels, pixel_stride, BLOCK_M)
        tiles_seen += 1.0
        delta = tl.where(inside[:, None], x - mean, 0.0)
        mean += delta * tl.div_rn(1.0, tiles_seen)
        m2 += delta * tl.where(inside[:, None], x - mean, 0.0)
        rows_seen += inside.to(tl.float32)
    mean, m2, count = merge_block(mean, m2, rows_seen)
    merge_tiles(
        mean, m2, count, group, part, parts, share, channel, channel_block, channel_blocks, n_channels,
        partial_ptr, mean_ptr, var_ptr, counter_ptr, BLOCK_C,
    )  # fmt: skip


@triton.jit
def _tile(x_ptr, first, end, channel, n_channels, pixel_stride, BLOCK_M: tl.constexpr):
    """Rows from first on, (BLOCK_M, BLOCK_C) float32, zeros from `end` on; and which are before that."""
    row = first + tl.arange(0, BLOCK_M)
    inside = row < end
    at = x_ptr + row.to(tl.int64)[:, None] * pixel_stride + channel[None, :]
    return tl.load(at, mask=inside[:, None] & (channel < n_channels)[None, :], other=0.0).to(tl.float32), inside


def merge_steps(args: Arguments, tiles: int, block_c: int) -> int:
    """The iterations of merge_rows in the program that merges last, of so many tiles in a group."""
    if tiles == 1:
        return 0
    block_t, share = rows_at_once(block_c), args["share"]
    steps: int = triton.cdiv(min(share, tiles), block_t)
    return steps + (triton.cdiv(triton.cdiv(tiles, share), block_t) if tiles > share else 0)


LAUNCH_FACTS = {
    "_norm_stats_kernel": LaunchFacts(
        lambda args: args["tiles"], lambda args: merge_steps(args, args["parts"], args["BLOCK_C"])
    )
}


def compile_cases() -> Iterator[Case]:
    """In each precision."""
    for dtype in ("fp32", "bf16", "fp16"):
        types = {"x_ptr": f"*{dtype}", "counter_ptr": "*i32"}
        types |= dict.fromkeys(("partial_ptr", "mean_ptr", "var_ptr"), "*fp32")
        types |= dict.fromkeys(("rows", "parts", "tiles", "share", "n_channels", "pixel_stride"), "i32")
        yield Case(f"norm_stats {dtype}", _norm_stats_kernel, types, {}, CONFIGS)


def choose_config(channels: int) -> dict[str, Any]:
    """The first, unless that many channels would leave most of its columns empty."""
    return CONFIGS[3] if channels <= 4 else CONFIGS[1] if channels <= 16 else CONFIGS[0]


def share_of(tiles: int) -> int:
    """How many of a group's tiles one program merges: all, or of many about their square root."""
    return max(tiles, 1) if tiles <= ONE_SHARE else int(triton.next_power_of_2(math.isqrt(tiles - 1) + 1))


class StatsBuffers(NamedTuple):
    """Where a launch leaves statistics, and what it needs on the way."""

    partial: Tensor  # (stat_groups, C + channel_blocks, tiles + shares, 2) float32, as store_stats has it
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
        shape = (stat_groups, channels + channel_blocks, tiles + shares, 2)
        partial = torch.empty(shape, dtype=torch.float32, device=device)
        mean, var = (torch.empty(stat_groups, channels, dtype=torch.float32, device=device) for _ in range(2))
        return cls(partial, mean, var, share, stat_groups * channel_blocks * (shares + 1))


def norm_stats(x: Tensor, stat_groups: int, config: dict[str, Any] | None = None) -> tuple[Tensor, Tensor]:
    """Launch; see `fastp2p.ops.norm_stats`."""
    x, pixel_stride = pixel_rows(x)
    channels = x.shape[1]
    config = config or choose_config(channels)
    rows = x.numel() // channels // max(1, stat_groups)  # a group's
    tiles, channel_blocks = triton.cdiv(rows, config["BLOCK_M"]), triton.cdiv(channels, config["BLOCK_C"])
    tiles_of_part = triton.cdiv(tiles, max(1, PROGRAMS // (max(1, stat_groups) * channel_blocks)))
    parts = triton.cdiv(tiles, tiles_of_part)
    stats = StatsBuffers.new(stat_groups, parts, channels, channel_blocks, x.device)
    if stat_groups:
        _norm_stats_kernel[(stat_groups * parts * channel_blocks,)](
            x,
            stats.partial,
            stats.mean,
            stats.var,
            counters(stats.n_counters, x),
            rows,
            parts,
            tiles_of_part,
            stats.share,
            channels,
            pixel_stride,
            **config,
        )
    return stats.mean, stats.var
