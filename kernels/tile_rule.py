"""The tiles of the GEMMs, and the choice among them by rule."""

import functools
import math

import torch
import triton
from torch import Tensor

from fastp2p.kernels.compile_check import shared_bytes
from fastp2p.kernels.layer_shapes import may_split

SHARED_BYTES_WHEN_INTERPRETED, PROCESSORS_WHEN_INTERPRETED, CAPABILITY_WHEN_INTERPRETED = 227 * 1024, 8, 90

# Without it ptxas aims at an occupancy of its own, and to reach it spilled some bytes in 76 of 2618 programs.
MAY_USE_ALL_REGISTERS = {"maxnreg": 255}
LARGE, LARGEST = 128 * 128, 128 * 256  # tiles, in elements


def _tile(m: int, n: int, k: int, num_warps: int, num_stages: int) -> dict[str, int]:
    sizes = {"BLOCK_M": m, "BLOCK_N": n, "BLOCK_K": k, "num_warps": num_warps, "num_stages": num_stages}
    return sizes | MAY_USE_ALL_REGISTERS


# From the large to the skinny. The first one is for LARGEST alone: on sm_90 the tuner tries it in conv. Where channels
# are few, elements are gathered one by one through registers, and BLOCK_K is small. So it is for float32, which
# multiplies in the plain units unless it may be rounded to TF32.
CONFIGS = [
    _tile(128, 256, 64, 8, 4),
    _tile(128, 128, 64, 8, 3),
    _tile(128, 64, 64, 8, 3),
    _tile(64, 64, 64, 4, 4),
    _tile(128, 16, 64, 4, 4),
    _tile(32, 64, 64, 4, 3),
    _tile(16, 64, 64, 4, 4),
    _tile(16, 32, 128, 4, 4),
    _tile(16, 16, 64, 2, 3),
]
GATHERED_CONFIGS = [
    _tile(128, 128, 32, 8, 3),
    _tile(128, 64, 32, 8, 3),
    _tile(64, 64, 32, 4, 3),
    _tile(128, 16, 32, 8, 3),
    _tile(32, 64, 32, 4, 3),
    _tile(16, 64, 32, 4, 3),
    _tile(16, 16, 32, 2, 3),
]
FLOAT32_CONFIGS = [_tile(64, 64, 16, 8, 3), _tile(64, 16, 16, 4, 3), _tile(16, 64, 16, 4, 3), _tile(16, 16, 32, 2, 3)]


def whole_block(*channels: int, most: int = 128) -> int:
    """The longest block of the sum, 128 or 64, that the gathered tensors' channels fill, so that it has one tap and is
    copied in rows; 0 where they fill neither. A weight gradient's blocks are of pixels: it takes no more than 64.
    """
    return next((block for block in (128, 64) if block <= most and all(n % block == 0 for n in channels)), 0)


def candidates(
    m: int, n: int, itemsize: int, *, whole: int, largest: int = LARGE, shared_limit: int = 1 << 30
) -> list[dict[str, int]]:
    """The tiles for an (m, n) result of matrices of this itemsize in bytes, under a limit of shared memory in bytes.

    None has twice the side of the result (or of 16, the least) in either direction, or more than `largest` elements.
    `whole` is `whole_block` of what is gathered.
    """
    filled = [config for config in CONFIGS if config["BLOCK_K"] <= whole]
    configs = FLOAT32_CONFIGS if itemsize == 4 else filled or GATHERED_CONFIGS
    useful = [c for c in configs if c["BLOCK_M"] < 2 * max(m, 16) and c["BLOCK_N"] < 2 * max(n, 16)]
    useful = [c for c in useful if c["BLOCK_M"] * c["BLOCK_N"] <= largest]
    return [config for config in useful if shared_bytes(config, itemsize) <= shared_limit]


def parts_with_blocks(blocks: int, split: int) -> int:
    """Into how many parts a sum is split where `split` are asked for: programs beyond would find no blocks left."""
    return int(triton.cdiv(blocks, triton.cdiv(blocks, split)))


def capability_of(like: Tensor) -> int:
    """A tensor's GPU's: 90 for 9.0."""
    if not like.is_cuda:
        return CAPABILITY_WHEN_INTERPRETED
    major, minor = torch.cuda.get_device_capability(like.device)
    return 10 * major + minor


def choose_config(
    m: int,
    n: int,
    k: int,
    like: Tensor,
    *,
    whole: int,
    products: int = 1,
    largest: int = LARGE,
    always_splits: bool = False,
) -> dict[str, int]:
    """A tile for so many (m, k) x (k, n) products of like's dtype, and SPLIT, over how many programs a sum is split.

    By rule: the least of padded area times the tile's effort times waves, by the split that the tile will
    get; of equals the largest. The sums of small tiles are split until every processor has a program, into no fewer
    than LEAST_BLOCKS blocks each. With `always_splits` a sum is so long that it may be split for any tile: the largest
    is taken that pads no more than MOST_PADDING, up to 64x64 unless two programs a processor have LONG_LOOP blocks of a
    larger one each. Its sum is split until every processor has two programs, and none has more than LONGEST_LOOP.
    """
    device = like.device.index if like.is_cuda else None
    return {**_choose_config(m, n, k, like.dtype.itemsize, device, whole, products, largest, always_splits)}


# By a tile's rows and columns: how long its loop issues other instructions, in the time of its products. The numbers
# are compile-check's issue / matrix for sm_90 in bfloat16: medians over conv's tiles whose blocks have one tap each.
# The largest tile has 0.7 there, so its products bind, and it counts as 1. The tile (16, 32) has 4.0 and counts as
# less: two such programs on a processor took 0.84 of the time of (16, 64) on an H200 (e7 at batch 1, epilogues.json of
# 2026-11-28).
EFFORT = {
    (128, 128): 1.0,
    (128, 64): 1.3,
    (64, 64): 2.1,
    (32, 64): 2.8,
    (128, 16): 3.5,
    (64, 16): 3.5,
    (16, 64): 3.5,
    (16, 32): 3.0,
    (16, 16): 6.1,
}
# The same where a program gathers single elements. The tile (64, 64) has 5 there as well, but took 0.7 of the time of
# (128, 64) on an H200, in the layers of three and six channels (results of 2026-11-27).
GATHERED_EFFORT = {
    (128, 128): 5.0,
    (128, 64): 5.0,
    (64, 64): 3.6,
    (32, 64): 6.0,
    (128, 16): 20.0,
    (64, 16): 20.0,
    (16, 64): 8.0,
    (16, 16): 22.0,
}
SIDE_BY_SIDE = {(16, 32): 2}  # programs a processor, for want of which a tile's sum is split; of any other one
NEARLY_ALL = 0.9  # where that part of the processors has a program, no sum is split for the rest
LEAST_BLOCKS = 4  # a split sum has at least so many, of 64 at the most, to be worth its partial sums
MOST_PADDING = 1.5  # times what the least padded tile computes
MOST_SPLITS = 128  # for want of tiles. On an H200 128 beat 64 in every layer that has them
LONG_LOOP = 32  # blocks; not timed: a tile of more than 64x64 is alone on its processor, and begins and ends so
LONGEST_LOOP = 256  # blocks of a long sum that one program adds


@functools.cache
def _choose_config(
    m: int, n: int, k: int, itemsize: int, device: int | None, whole: int, products: int, largest: int, long: bool
) -> dict[str, int]:
    shared_limit, processors = SHARED_BYTES_WHEN_INTERPRETED, PROCESSORS_WHEN_INTERPRETED
    if device is not None:
        properties = triton.runtime.driver.active.utils.get_device_properties(device)
        shared_limit, processors = properties["max_shared_mem"], properties["multiprocessor_count"]

    def programs(config: dict[str, int]) -> int:
        tiles: int = triton.cdiv(m, config["BLOCK_M"]) * triton.cdiv(n, config["BLOCK_N"])
        return products * tiles

    def splits(config: dict[str, int]) -> int:
        wanted = processors * SIDE_BY_SIDE.get((config["BLOCK_M"], config["BLOCK_N"]), 1)
        if not may_split(config) or programs(config) >= NEARLY_ALL * wanted:
            return 1
        blocks = triton.cdiv(k, config["BLOCK_K"])
        split = min(triton.cdiv(wanted, programs(config)), max(1, k // min(64, config["BLOCK_K"]) // LEAST_BLOCKS))
        return parts_with_blocks(blocks, split)

    def cost(config: dict[str, int]) -> tuple[float, int]:
        rows, columns = config["BLOCK_M"], config["BLOCK_N"]
        waves = programs(config) * splits(config) / processors
        alone = rows * columns > 128 * 64  # on its processor, so that a last wave takes as long as a full one
        waves = math.ceil(waves) if alone else max(1.0, waves)
        effort = (EFFORT if whole else GATHERED_EFFORT)[rows, columns]
        return waves * rows * columns * effort / splits(config), -rows * columns

    tiles = candidates(m, n, itemsize, whole=whole, largest=largest, shared_limit=shared_limit)
    if long:
        area = {i: programs(c) * c["BLOCK_M"] * c["BLOCK_N"] for i, c in enumerate(tiles)}

        def loops(config: dict[str, int]) -> int:
            """Blocks that each of two programs a processor would have."""
            return programs(config) * (k // config["BLOCK_K"]) // (2 * processors)

        config = next(
            c
            for i, c in enumerate(tiles)
            if area[i] <= MOST_PADDING * min(area.values())
            and (c["BLOCK_M"] * c["BLOCK_N"] <= 64 * 64 or loops(c) >= LONG_LOOP)
        )
        blocks = triton.cdiv(k, config["BLOCK_K"])
        split = min(triton.cdiv(2 * processors, programs(config)), MOST_SPLITS, max(1, blocks // LEAST_BLOCKS))
        split = max(split, triton.cdiv(blocks, LONGEST_LOOP))
        return config | {"SPLIT": parts_with_blocks(blocks, split)}
    config = min(tiles, key=cost)
    return config | {"SPLIT": splits(config)}
