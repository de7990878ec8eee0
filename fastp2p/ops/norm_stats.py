"""norm_stats: mean and variance of each channel over groups of images."""

import torch
from torch import Tensor

from fastp2p.errors import InputError
from fastp2p.ops import library
from fastp2p.ops.library import describe
from fastp2p.ops.operands import Work


def norm_stats_ref(x: Tensor, stat_groups: int) -> tuple[Tensor, Tensor]:
    """The specification of `norm_stats`."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    if stat_groups == 0:
        return wide.new_empty(0, x.shape[1]), wide.new_empty(0, x.shape[1])
    var, mean = torch.var_mean(wide.unflatten(0, (stat_groups, -1)), dim=(1, 3, 4), correction=0)
    return mean, var


def fake_stats(x: Tensor, stat_groups: int) -> tuple[Tensor, Tensor]:
    """Shape and dtype of what `norm_stats` gives."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    return x.new_empty((stat_groups, x.shape[1]), dtype=dtype), x.new_empty((stat_groups, x.shape[1]), dtype=dtype)


library.define(
    "norm_stats",
    "(Tensor x, SymInt stat_groups) -> (Tensor, Tensor)",
    reference=norm_stats_ref,
    fake=fake_stats,
    work=Work(maps=("x",), results=("vectors", "vectors")),
)
library.serve_by_triton("norm_stats")


def norm_stats(x: Tensor, *, stat_groups: int) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of each channel, over the pixels of each of stat_groups groups of consecutive images.

    1 group is batch norm, N groups are instance norm, 2 groups are two batches in one pass. The variance is that of
    the deviations from the mean, never a difference of squares, so a constant image has variance 0 up to rounding. No
    gradient: the one of `norm_act` includes the way through mean and variance.

    Args:
        x: (N, C, H, W), floating. Accumulation is in float32 (float64 for float64).
        stat_groups: number of groups, a divisor of N; 0 for no statistics.

    Returns:
        mean, var: (stat_groups, C) float32 (float64 for float64).

    Raises:
        InputError: on an x of another rank or without elements, or groups that do not divide N.
    """
    if x.ndim != 4 or x.numel() == 0 or not x.is_floating_point():
        raise InputError(f"norm_stats: got x {describe(x)}, expected (N, C, H, W) floating, with elements")
    check_stat_groups("norm_stats", stat_groups, x.shape[0])
    mean, var = torch.ops.fastp2p.norm_stats(x.detach(), stat_groups)
    return mean, var


def check_stat_groups(operator: str, stat_groups: int, n_images: int) -> None:
    """Raise InputError unless the images fall into that many equal groups."""
    if stat_groups < 0 or (stat_groups and n_images % stat_groups):
        raise InputError(f"{operator}: got stat_groups {stat_groups}, expected 0 or a divisor of {n_images} images")
