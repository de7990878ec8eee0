"""batch_norm_act: norm_act in training, and batch norm's running averages moved on the way."""

import torch
from torch import Tensor

from fastp2p.ops import library
from fastp2p.ops.activation import Activation
from fastp2p.ops.norm_act import SETTINGS, check_settings, norm_act_ref
from fastp2p.ops.operands import Work
from fastp2p.ops.running_stats import check_averages, running_stats_ref


def batch_norm_act_ref(
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    rng: Tensor | None,
    running_mean: Tensor,
    running_var: Tensor,
    momentum: float,
    eps: float,
    activation: int,
    slope: float,
    second: int,
    dropout: float,
    layer: int,
) -> tuple[Tensor, Tensor]:
    """`norm_act` of statistics that are x's own, and one update of the averages by each group in turn.

    Args:
        running_mean, running_var: (C,) of the statistics' dtype, contiguous; changed in place.
        momentum: weight of the new value.
        others: as `norm_act` takes them. A group has two values a channel, or more.
    """
    running_stats_ref(running_mean, running_var, mean, var, x.numel() // mean.numel(), momentum)
    settings = (eps, activation, slope, second, dropout, layer, False)
    return norm_act_ref(x, mean, var, weight, bias, rng, *settings)


def _fake(
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    rng: Tensor | None,
    running_mean: Tensor,
    running_var: Tensor,
    momentum: float,
    eps: float,
    activation: int,
    slope: float,
    second: int,
    dropout: float,
    layer: int,
) -> tuple[Tensor, Tensor]:
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    return y, x.new_empty(0) if second < 0 else torch.empty_like(y)


library.define(
    "batch_norm_act",
    "(Tensor x, Tensor mean, Tensor var, Tensor? weight, Tensor? bias, Tensor? rng, Tensor(a!) running_mean, "
    f"Tensor(b!) running_var, float momentum, {SETTINGS}) -> (Tensor, Tensor)",
    reference=batch_norm_act_ref,
    fake=_fake,
    work=Work(maps=("x",), results=("maps", "maps")),
)
library.serve_by_triton("batch_norm_act")


def batch_norm_act(
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    running_mean: Tensor,
    running_var: Tensor,
    momentum: float = 0.1,
    eps: float = 1e-5,
    activation: Activation = "none",
    slope: float = 0.2,
    second: Activation | None = None,
    dropout: float = 0.0,
    rng: Tensor | None = None,
    layer: int = 0,
) -> tuple[Tensor, Tensor | None]:
    """`norm_act` and `running_stats` in one launch: batch norm in training, its activation and dropout.

    Not differentiable, since it changes the averages: a step without autograd calls it.

    Args:
        x, mean, var, weight, bias, eps, activation, slope, second, dropout, rng, layer: as `norm_act` takes them; mean
            and var are `norm_stats` of x.
        running_mean, running_var: (C,) of the statistics' dtype, contiguous; moved by each group in turn.
        momentum: weight of the new value; PyTorch's default.

    Returns:
        y, y2: as those of `norm_act`.

    Raises:
        InputError: on shapes or dtypes that do not fit, fewer than two values a group, a dropout without rng, or a
            tensor that requires a gradient.
    """
    settings = check_settings(
        "batch_norm_act", x, mean, var, weight, bias, activation, slope, second, dropout, rng, layer
    )
    check_averages("batch_norm_act", running_mean, running_var, mean, var, x.numel() // mean.numel())
    masked = rng if dropout else None
    y, y2 = torch.ops.fastp2p.batch_norm_act(
        x, mean, var, weight, bias, masked, running_mean, running_var, momentum, eps, *settings
    )
    return y, None if second is None else y2
