"""norm_dx in Triton: the gradient of a normalisation's input from dz and its sums, in one pass.

In bfloat16 it reads x and dz, 2 bytes an element each, and writes dx: 6 bytes. dz and the sums come from the data
gradient before it (`gemm.norm_epilogue`), so nothing is read twice. One program takes a tile of pixels by channels of
one statistics group; the program of a channel's first tile adds the groups' sums to dweight and dbias. Arithmetic is
float32.
"""

from collections.abc import Iterator
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from fastp2p.kernels.compile_check import Case
from fastp2p.kernels.dependent import begin, launched
from fastp2p.kernels.launch_facts import LaunchFacts, over
from fastp2p.kernels.layout import pixel_rows
from fastp2p.kernels.norm_tile import CONFIGS, columns, rows_of, tiling


@launched()
def _norm_dx_kernel(
    dz_ptr,  # (G * rows, C), rows dz_stride apart
    x_ptr,  # (G * rows, C), rows x_stride apart
    dx_ptr,  # (G * rows, C)
    mean_ptr,  # (G, C) float32
    var_ptr,  # (G, C) float32
    weight_ptr,  # (C,) float32; mean_ptr again when there is none
    sum_dz_ptr,  # (G, C) float32
    sum_dz_xhat_ptr,  # (G, C) float32
    dweight_ptr,  # (C,) float32
    dbias_ptr,  # (C,) float32
    groups,
    rows,  # a group's
    n_channels,
    dz_stride,
    x_stride,
    inverse_rows,
    eps,
    HAS_WEIGHT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    begin()
    channel_blocks = tl.cdiv(n_channels, BLOCK_C)
    tiles = tl.cdiv(rows, BLOCK_M)  # a group's
    tile = tl.program_id(0) // channel_blocks  # over all groups
    channel = (tl.program_id(0) % channel_blocks * BLOCK_C + tl.arange(0, BLOCK_C))[None, :]
    there = channel < n_channels
    group = (tile // tiles).to(tl.int64)
    mean, rstd, scale, _ = columns(
        mean_ptr, var_ptr, weight_ptr, mean_ptr, group, channel, n_channels, eps, HAS_WEIGHT, False
    )
    at = group * n_channels + channel
    mean_dz = tl.load(sum_dz_ptr + at, mask=there, other=0.0) * inverse_rows
    projection = tl.load(sum_dz_xhat_ptr + at, mask=there, other=0.0) * inverse_rows * rstd
    row, inside = rows_of(group, tile % tiles, rows, channel, n_channels, BLOCK_M)
    x = tl.load(x_ptr + row * x_stride + channel, mask=inside, other=0.0).to(tl.float32)
    dz = tl.load(dz_ptr + row * dz_stride + channel, mask=inside, other=0.0).to(tl.float32)
    dx = (dz - mean_dz - (x - mean) * projection) * scale
    tl.store(dx_ptr + row * n_channels + channel, dx, mask=inside)
    if tile == 0:
        dweight = tl.zeros_like(mean)
        dbias = tl.zeros_like(mean)
        for i in range(groups):
            dbias += tl.load(sum_dz_ptr + i * n_channels + channel, mask=there, other=0.0)
            dweight += tl.load(sum_dz_xhat_ptr + i * n_channels + channel, mask=there, other=0.0)
        tl.store(dbias_ptr + channel, dbias, mask=there)
        tl.store(dweight_ptr + channel, dweight, mask=there)


LAUNCH_FACTS = {"_norm_dx_kernel": LaunchFacts(over("groups"))}


def compile_cases() -> Iterator[Case]:
    """In each precision."""
    for dtype in ("fp32", "bf16", "fp16"):
        types = dict.fromkeys(("dz_ptr", "x_ptr", "dx_ptr"), f"*{dtype}")
        vectors = ("mean_ptr", "var_ptr", "weight_ptr", "sum_dz_ptr", "sum_dz_xhat_ptr", "dweight_ptr", "dbias_ptr")
        types |= dict.fromkeys(vectors, "*fp32") | dict.fromkeys(("inverse_rows", "eps"), "fp32")
        types |= dict.fromkeys(("groups", "rows", "n_channels", "dz_stride", "x_stride"), "i32")
        yield Case(f"norm_dx {dtype}", _norm_dx_kernel, types, {"HAS_WEIGHT": 1}, CONFIGS)


def norm_dx(
    dz: Tensor,
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None,
    sum_dz: Tensor,
    sum_dz_xhat: Tensor,
    eps: float,
    config: dict[str, Any] = CONFIGS[0],
) -> tuple[Tensor, Tensor, Tensor]:
    """Launch; see `fastp2p.ops.norm_dx`."""
    (dz, dz_stride), (x, x_stride) = pixel_rows(dz), pixel_rows(x)
    groups, n_channels = mean.shape
    rows, tiles, channel_blocks = tiling(x, groups, config)
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    dweight, dbias = (torch.empty(n_channels, dtype=torch.float32, device=x.device) for _ in range(2))
    _norm_dx_kernel[(groups * tiles * channel_blocks,)](
        dz,
        x,
        dx,
        mean.contiguous(),
        var.contiguous(),
        (mean if weight is None else weight).contiguous(),
        sum_dz.contiguous(),
        sum_dz_xhat.contiguous(),
        dweight,
        dbias,
        groups,
        rows,
        n_channels,
        dz_stride,
        x_stride,
        1 / rows,
        eps,
        HAS_WEIGHT=weight is not None,
        **config,
    )
    return dx, dweight, dbias
