"""norm_act in Triton: normalisation, affine, activation and dropout in one pass.

In bfloat16 it reads x once, 2 bytes an element, and writes 2 for each of its readers: 6 where the separate kernels of
normalisation, leaky_relu and relu move 12. One program takes a tile of pixels by channels that lies within one
statistics group, so that mean and rstd are vectors over channels. The program of a channel's first tile moves batch
norm's running averages on, where there are any. Arithmetic is float32.
"""

from collections.abc import Iterator
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from fastp2p.kernels.activation import activate
from fastp2p.kernels.compile_check import Case
from fastp2p.kernels.dependent import begin, launched
from fastp2p.kernels.launch_facts import LaunchFacts
from fastp2p.kernels.layout import pixel_rows
from fastp2p.kernels.norm_act_backward import norm_act_backward as norm_act_backward  # looked for here
from fastp2p.kernels.norm_tile import CONFIGS, TYPES, USES, columns, dropout_factor, flags_of, rows_of, tiling, vectors
from fastp2p.kernels.running_stats import momenta, move_averages


@launched(do_not_specialize=["layer"])
def _norm_act_kernel(
    x_ptr,  # (G * rows, C), rows x_stride apart
    y_ptr,  # (G * rows, C)
    y2_ptr,  # (G * rows, C); y_ptr again when there is no second activation
    mean_ptr,  # (G, C) float32
    var_ptr,  # (G, C) float32
    weight_ptr,  # (C,) float32; mean_ptr again when there is none
    bias_ptr,  # (C,) float32; mean_ptr again when there is none
    rng_ptr,  # (2,) int64; mean_ptr again without dropout
    running_mean_ptr,  # (C,) float32, moved on; mean_ptr again where there are no running averages
    running_var_ptr,  # (C,) float32
    groups,
    rows,  # a group's
    n_channels,
    x_stride,
    eps,
    slope,
    layer,
    keep_scale,  # 1 / (1 - dropout), rounded once, from float64
    one_minus_momentum,
    momentum,
    momentum_unbiased,
    HAS_RUNNING: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    SECOND: tl.constexpr,  # below 0 for none
    DROP_BELOW: tl.constexpr,  # 0 without dropout
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    begin()
    channel_blocks = tl.cdiv(n_channels, BLOCK_C)
    tiles = tl.cdiv(rows, BLOCK_M)  # a group's
    tile = tl.program_id(0) // channel_blocks  # over all groups
    channel = (tl.program_id(0) % channel_blocks * BLOCK_C + tl.arange(0, BLOCK_C))[None, :]
    group = (tile // tiles).to(tl.int64)
    mean, _, scale, bias = columns(
        mean_ptr, var_ptr, weight_ptr, bias_ptr, group, channel, n_channels, eps, HAS_WEIGHT, HAS_BIAS
    )
    row, inside = rows_of(group, tile % tiles, rows, channel, n_channels, BLOCK_M)
    element = row * n_channels + channel
    x = tl.load(x_ptr + row * x_stride + channel, mask=inside, other=0.0).to(tl.float32)
    z = (x - mean) * scale + bias
    factor = 1.0
    if DROP_BELOW > 0:
        factor = dropout_factor(rng_ptr, element, layer, keep_scale, DROP_BELOW)
    tl.store(y_ptr + element, activate(z, slope, ACTIVATION) * factor, mask=inside)
    if SECOND >= 0:
        tl.store(y2_ptr + element, activate(z, slope, SECOND) * factor, mask=inside)
    if HAS_RUNNING:
        first = tile == 0
        if first:
            move_averages(
                running_mean_ptr, running_var_ptr, mean_ptr, var_ptr, groups, channel, n_channels, one_minus_momentum,
                momentum, momentum_unbiased,
            )  # fmt: skip


LAUNCH_FACTS = {
    "_norm_act_kernel": LaunchFacts(
        lambda args: args["groups"] if args["HAS_RUNNING"] else 1,
        updates=("running_mean_ptr", "running_var_ptr"),
        only_with={"running_mean_ptr": "HAS_RUNNING", "running_var_ptr": "HAS_RUNNING"},
    )
}


def compile_cases(name: str = "norm_act", running: int = 0) -> Iterator[Case]:
    """What a U-Net and its discriminator use, in each precision; with running averages it is batch_norm_act."""
    for dtype in ("fp32", "bf16", "fp16"):
        types = dict.fromkeys(("x_ptr", "y_ptr", "y2_ptr"), f"*{dtype}") | TYPES
        types |= dict.fromkeys(("running_mean_ptr", "running_var_ptr"), "*fp32")
        types |= dict.fromkeys(("one_minus_momentum", "momentum", "momentum_unbiased"), "fp32")
        for use, (activation, second, drop) in USES.items():
            flags = {"HAS_WEIGHT": 1, "HAS_BIAS": 1, "ACTIVATION": activation, "SECOND": second, "DROP_BELOW": drop}
            yield Case(f"{name} {use} {dtype}", _norm_act_kernel, types, flags | {"HAS_RUNNING": running}, CONFIGS)


def norm_act(
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    rng: Tensor | None,
    eps: float,
    activation: int,
    slope: float,
    second: int,
    dropout: float,
    layer: int,
    fixed_stats: bool,
    config: dict[str, Any] = CONFIGS[0],
) -> tuple[Tensor, Tensor]:
    """Launch; see `fastp2p.ops.norm_act`."""
    settings = (eps, activation, slope, second, dropout, layer)
    return launch(x, mean, var, weight, bias, rng, settings, None, config)


def launch(
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    rng: Tensor | None,
    settings: tuple[float, int, float, int, float, int],
    running: tuple[Tensor, Tensor, float] | None,
    config: dict[str, Any],
) -> tuple[Tensor, Tensor]:
    """Launch, with running averages to move or without.

    Args:
        settings: eps, activation, slope, second, dropout, layer.
        running: the averages of mean and variance, and their momentum.
    """
    eps, activation, slope, second, dropout, layer = settings
    running_mean, running_var, momentum = running or (mean, var, 0.0)
    x, x_stride = pixel_rows(x)
    groups, n_channels = mean.shape
    rows, tiles, channel_blocks = tiling(x, groups, config)
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    y2 = torch.empty_like(y) if second >= 0 else x.new_empty(0)
    _norm_act_kernel[(groups * tiles * channel_blocks,)](
        x,
        y,
        y2 if second >= 0 else y,
        *vectors(mean, var, weight, bias, rng),
        running_mean,
        running_var,
        groups,
        rows,
        n_channels,
        x_stride,
        eps,
        slope,
        layer,
        1 / (1 - dropout),
        *momenta(momentum, x.numel() // mean.numel() if running else 2),
        HAS_RUNNING=running is not None,
        SECOND=second,
        **flags_of(weight, bias, rng, activation, dropout),
        **config,
    )
    return y, y2
