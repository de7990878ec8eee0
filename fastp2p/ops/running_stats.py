"""running_stats: batch norm's running averages, one update per group of images, in their order."""

import torch
from torch import Tensor

from fastp2p.errors import InputError
from fastp2p.ops import library
from fastp2p.ops.library import check_devices, describe
from fastp2p.ops.operands import Work


def running_stats_ref(
    running_mean: Tensor, running_var: Tensor, mean: Tensor, var: Tensor, n_values: int, momentum: float
) -> None:
    """The specification of `running_stats`."""
    for group_mean, group_var in zip(mean, var, strict=True):
        running_mean.mul_(1 - momentum).add_(group_mean, alpha=momentum)
        running_var.mul_(1 - momentum).add_(group_var, alpha=momentum * n_values / (n_values - 1))


def _fake(running_mean: Tensor, running_var: Tensor, mean: Tensor, var: Tensor, n_values: int, momentum: float) -> None:
    return None


library.define(
    "running_stats",
    "(Tensor(a!) running_mean, Tensor(b!) running_var, Tensor mean, Tensor var, SymInt n_values, float momentum) -> ()",
    reference=running_stats_ref,
    fake=_fake,
    work=Work(),  # vectors alone
)
library.serve_by_triton("running_stats")


def running_stats(
    running_mean: Tensor, running_var: Tensor, mean: Tensor, var: Tensor, *, n_values: int, momentum: float = 0.1
) -> None:
    """running = (1 - momentum) * running + momentum * new, in place, for each group in turn; var is made unbiased.

    Args:
        running_mean, running_var: (C,) float32 (float64 for float64 statistics), contiguous.
        mean, var: (stat_groups, C) of `norm_stats`, same dtype; var biased.
        n_values: over how many values each was taken, the images of a group times H * W; at least 2.
        momentum: weight of the new value; PyTorch's default.

    Raises:
        InputError: on shapes or dtypes that do not fit, or fewer than 2 values.
    """
    check_averages("running_stats", running_mean, running_var, mean, var, n_values)
    torch.ops.fastp2p.running_stats(running_mean, running_var, mean, var, n_values, momentum)


def check_averages(
    operator: str, running_mean: Tensor, running_var: Tensor, mean: Tensor, var: Tensor, n_values: int
) -> None:
    """Raise InputError unless the averages fit the statistics, and there are values enough for a variance."""
    channels = running_mean.shape
    fits = (
        len(channels) == 1 and running_var.shape == channels and mean.shape == var.shape == (mean.shape[0], *channels)
    )
    dtypes = {tensor.dtype for tensor in (running_mean, running_var, mean, var)}
    if not fits or len(dtypes) > 1 or not (running_mean.is_contiguous() and running_var.is_contiguous()):
        got = ", ".join(describe(tensor) for tensor in (running_mean, running_var, mean, var))
        raise InputError(f"{operator}: got {got}; expected contiguous (C,), (C,) and (G, C), (G, C) of one dtype")
    check_devices(operator, running_mean, running_var, mean, var)
    if n_values < 2:
        raise InputError(f"{operator}: got {n_values} values per channel, expected 2 or more: one has no variance")
