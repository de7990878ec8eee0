"""norm_stats in Triton: per-channel mean and M2 of tiles of pixels, then their merge.

Reads x once: 2 bytes an element in bfloat16. The GEMMs make the same tile statistics in their epilogues, from values
that are still in registers, and share the merge: then x is not read at all. One program takes a tile of pixels by
channels of one statistics group; the merge (Chan, Golub and LeVeque 1979) takes the tiles in a fixed order, so the same
input gives the same bits. Many tiles are merged in levels, since one program takes them one after the other.
Everything is float32 around means: no sum of squares of raw values, which would cancel.
Divisions are correctly rounded, where a GPU's plain ones are off by 2 ulp: a sum that is exact has an exact mean, and
equal values have no variance.
"""

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastp2p.kernels.compile_check import Case
from fastp2p.kernels.layout import pixel_rows

CONFIGS = [
    {"BLOCK_M": 64, "BLOCK_C": 64, "num_warps": 8},
    {"BLOCK_M": 256, "BLOCK_C": 16, "num_warps": 4},
    {"BLOCK_M": 32, "BLOCK_C": 128, "num_warps": 4},
    {"BLOCK_M": 1024, "BLOCK_C": 4, "num_warps": 4},
]
MERGE_CONFIG = {"BLOCK_T": 64, "BLOCK_C": 16, "num_warps": 4, "maxnreg": 128}  # unbounded, ptxas spills on sm_100
MOST_TILES = 512  # a group's, which one program merges for each block of channels
SHARE = 256  # tiles that one program of the first level merges, where there are more


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
def _norm_stats_kernel(
    x_ptr,  # (G * rows, C), rows pixel_stride apart
    partial_ptr,  # (G, tiles, 3, C) float32
    rows,  # a group's
    tiles,  # a group's
    n_channels,
    pixel_stride,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    channel_blocks = tl.cdiv(n_channels, BLOCK_C)
    tile = tl.program_id(0) // channel_blocks  # over all groups
    channel = tl.program_id(0) % channel_blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    group = tile // tiles
    row = tile % tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    row_inside = row < rows
    offset = (group.to(tl.int64) * rows + row)[:, None] * pixel_stride + channel[None, :]
    x = tl.load(x_ptr + offset, mask=row_inside[:, None] & (channel < n_channels)[None, :], other=0.0).to(tl.float32)
    store_partial(partial_ptr + tile.to(tl.int64) * 3 * n_channels, x, row_inside, channel, n_channels)


@triton.jit(do_not_specialize=["tiles", "share"])
def _merge_kernel(
    partial_ptr,  # (G, tiles, 3, C) float32
    mean_ptr,  # (G, C) float32; of a level before the last (G, shares, 3, C), as partial_ptr
    var_ptr,  # (G, C) float32, biased; mean_ptr again before the last level
    tiles,
    share,  # tiles for one program
    n_channels,
    LAST: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    channel_blocks = tl.cdiv(n_channels, BLOCK_C)
    shares = tl.cdiv(tiles, share)
    place = (tl.program_id(0) // channel_blocks).to(tl.int64)  # over all groups
    channel = tl.program_id(0) % channel_blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = channel < n_channels
    first = (place % shares * share).to(tl.int32)
    end = tl.minimum(first + share, tiles)
    partial_ptr += place // shares * tiles * 3 * n_channels
    count = tl.zeros((BLOCK_T, BLOCK_C), tl.float32)
    mean = tl.zeros((BLOCK_T, BLOCK_C), tl.float32)
    m2 = tl.zeros((BLOCK_T, BLOCK_C), tl.float32)
    for block in range(first, end, BLOCK_T):  # each place of the block for itself: no step waits for a sum over it
        tile = block + tl.arange(0, BLOCK_T)
        at = partial_ptr + tile.to(tl.int64)[:, None] * 3 * n_channels + channel[None, :]
        mask = (tile < end)[:, None] & inside[None, :]
        tile_mean = tl.load(at, mask=mask, other=0.0)
        tile_m2 = tl.load(at + n_channels, mask=mask, other=0.0)
        tile_count = tl.load(at + 2 * n_channels, mask=mask, other=0.0)
        weight = tl.div_rn(tile_count, tl.maximum(count + tile_count, 1.0))
        delta = tile_mean - mean
        mean += delta * weight
        m2 += tile_m2 + delta * delta * (count * weight)
        count += tile_count

    total = tl.sum(count, axis=0)
    at_least_one = tl.maximum(total, 1.0)
    merged = tl.div_rn(tl.sum(count * mean, axis=0), at_least_one)
    spread = mean - merged[None, :]
    left_over = tl.div_rn(tl.sum(count * spread, axis=0), at_least_one)  # what rounding kept from the mean
    m2_merged = tl.sum(m2 + count * spread * spread, axis=0) - left_over * left_over * total
    m2_merged = tl.where(m2_merged < 0.0, 0.0, m2_merged)  # by rounding
    if LAST:
        tl.store(mean_ptr + place * n_channels + channel, merged + left_over, mask=inside)
        tl.store(var_ptr + place * n_channels + channel, tl.div_rn(m2_merged, at_least_one), mask=inside)
    else:
        mean_ptr += place * 3 * n_channels + channel
        tl.store(mean_ptr, merged + left_over, mask=inside)
        tl.store(mean_ptr + n_channels, m2_merged, mask=inside)
        tl.store(mean_ptr + 2 * n_channels, total, mask=inside)


def compile_cases() -> Iterator[Case]:
    """The tile statistics in each precision, and the merge."""
    for dtype in ("fp32", "bf16", "fp16"):
        types = {"x_ptr": f"*{dtype}", "partial_ptr": "*fp32"}
        types |= dict.fromkeys(("rows", "tiles", "n_channels", "pixel_stride"), "i32")
        yield Case(f"norm_stats {dtype}", _norm_stats_kernel, types, {}, CONFIGS)
    types = dict.fromkeys(("partial_ptr", "mean_ptr", "var_ptr"), "*fp32")
    types |= dict.fromkeys(("tiles", "share", "n_channels"), "i32")
    for last in (0, 1):
        yield Case(f"norm_stats merge{', last level' * last}", _merge_kernel, types, {"LAST": last}, [MERGE_CONFIG])


def choose_config(channels: int) -> dict[str, Any]:
    """The first, unless that many channels would leave most of its columns empty."""
    return CONFIGS[3] if channels <= 4 else CONFIGS[1] if channels <= 16 else CONFIGS[0]


def norm_stats(x: Tensor, stat_groups: int, config: dict[str, Any] | None = None) -> tuple[Tensor, Tensor]:
    """Launch; see `fastp2p.ops.norm_stats`."""
    x, pixel_stride = pixel_rows(x)
    channels = x.shape[1]
    config = config or choose_config(channels)
    rows = x.numel() // channels // max(1, stat_groups)  # a group's
    tiles = triton.cdiv(rows, config["BLOCK_M"])
    partial = torch.empty(stat_groups, tiles, 3, channels, dtype=torch.float32, device=x.device)
    if stat_groups:
        grid = (stat_groups * tiles * triton.cdiv(channels, config["BLOCK_C"]),)
        _norm_stats_kernel[grid](x, partial, rows, tiles, channels, pixel_stride, **config)
    return merge_partials(partial)


def merge_partials(partial: Tensor) -> tuple[Tensor, Tensor]:
    """(stat_groups, tiles, 3, C) of tile means, M2 and counts -> mean and biased variance, (stat_groups, C)."""
    stat_groups, tiles, _, channels = partial.shape
    mean, var = (torch.empty(stat_groups, channels, dtype=torch.float32, device=partial.device) for _ in range(2))
    if stat_groups:
        programs = stat_groups * triton.cdiv(channels, MERGE_CONFIG["BLOCK_C"])
        while tiles > MOST_TILES:
            shares = triton.cdiv(tiles, SHARE)
            merged = torch.empty(stat_groups, shares, 3, channels, dtype=torch.float32, device=partial.device)
            _merge_kernel[(programs * shares,)](
                partial, merged, merged, tiles, SHARE, channels, LAST=False, **MERGE_CONFIG
            )
            partial, tiles = merged, shares
        _merge_kernel[(programs,)](partial, mean, var, tiles, tiles, channels, LAST=True, **MERGE_CONFIG)
    return mean, var
