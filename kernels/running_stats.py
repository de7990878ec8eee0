"""running_stats in Triton.

Reads 8 bytes a channel and group, reads and writes 16 a channel, in one launch, where the same in eager PyTorch takes
four small kernels a group. One program takes BLOCK channels and goes through the groups in their order,
since each update builds on the one before. Arithmetic is float32; the factors are rounded once, from float64.
"""

from collections.abc import Iterator
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from fastp2p.kernels.compile_check import Case
from fastp2p.kernels.dependent import begin, launched
from fastp2p.kernels.launch_facts import LaunchFacts, over

CONFIGS = [{"BLOCK": 128, "num_warps": 4}, {"BLOCK": 32, "num_warps": 1}, {"BLOCK": 512, "num_warps": 4}]


@launched()
def _running_stats_kernel(
    running_mean_ptr,  # (C,) float32
    running_var_ptr,  # (C,) float32
    mean_ptr,  # (G, C) float32
    var_ptr,  # (G, C) float32, biased
    groups,
    n_channels,
    one_minus_momentum,
    momentum,
    momentum_unbiased,  # momentum * n / (n - 1)
    BLOCK: tl.constexpr,
):
    begin()
    channel = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    move_averages(
        running_mean_ptr, running_var_ptr, mean_ptr, var_ptr, groups, channel, n_channels, one_minus_momentum,
        momentum, momentum_unbiased,
    )  # fmt: skip


@triton.jit
def move_averages(
    running_mean_ptr, running_var_ptr, mean_ptr, var_ptr, groups, channel, n_channels, one_minus_momentum,
    momentum, momentum_unbiased,
):  # fmt: skip
    """Move the running averages of these channels by each group's statistics in turn."""
    inside = channel < n_channels
    running_mean = tl.load(running_mean_ptr + channel, mask=inside)
    running_var = tl.load(running_var_ptr + channel, mask=inside)
    for group in range(groups):
        mean = tl.load(mean_ptr + group * n_channels + channel, mask=inside)
        var = tl.load(var_ptr + group * n_channels + channel, mask=inside)
        running_mean = one_minus_momentum * running_mean + momentum * mean
        running_var = one_minus_momentum * running_var + momentum_unbiased * var
    tl.store(running_mean_ptr + channel, running_mean, mask=inside)
    tl.store(running_var_ptr + channel, running_var, mask=inside)


LAUNCH_FACTS = {"_running_stats_kernel": LaunchFacts(over("groups"), updates=("running_mean_ptr", "running_var_ptr"))}


def compile_cases() -> Iterator[Case]:
    """The one there is."""
    types = dict.fromkeys(("running_mean_ptr", "running_var_ptr", "mean_ptr", "var_ptr"), "*fp32")
    types |= {"groups": "i32", "n_channels": "i32"}
    types |= dict.fromkeys(("one_minus_momentum", "momentum", "momentum_unbiased"), "fp32")
    yield Case("running_stats", _running_stats_kernel, types, {}, CONFIGS)


def running_stats(
    running_mean: Tensor,
    running_var: Tensor,
    mean: Tensor,
    var: Tensor,
    n_values: int,
    momentum: float,
    config: dict[str, Any] = CONFIGS[0],
) -> None:
    """Launch; see `fastp2p.ops.running_stats`."""
    groups, n_channels = mean.shape
    if mean.numel() == 0:
        return
    _running_stats_kernel[(triton.cdiv(n_channels, config["BLOCK"]),)](
        running_mean,
        running_var,
        mean.contiguous(),
        var.contiguous(),
        groups,
        n_channels,
        *momenta(momentum, n_values),
        **config,
    )


def momenta(momentum: float, n_values: int) -> tuple[float, float, float]:
    """The factors of an old average, of a new mean, and of a new biased variance of so many values."""
    return 1 - momentum, momentum, momentum * n_values / (n_values - 1)
