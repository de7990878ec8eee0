"""batch_norm_act in Triton: norm_act, and batch norm's running averages moved in the same launch.

The program of a channel's first tile moves them, for 16 bytes a channel and 8 for each group; a launch of their own
would cost far more than that.
"""

from collections.abc import Iterator
from typing import Any

from torch import Tensor

from fastp2p.kernels import norm_act
from fastp2p.kernels.compile_check import Case
from fastp2p.kernels.norm_tile import CONFIGS


def compile_cases() -> Iterator[Case]:
    """As norm_act's."""
    yield from norm_act.compile_cases("batch_norm_act", running=1)


def batch_norm_act(
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
    config: dict[str, Any] = CONFIGS[0],
) -> tuple[Tensor, Tensor]:
    """Launch; see `fastp2p.ops.batch_norm_act`."""
    settings = (eps, activation, slope, second, dropout, layer)
    running = (running_mean, running_var, momentum)
    results: tuple[Tensor, Tensor] = norm_act.launch(x, mean, var, weight, bias, rng, settings, running, config)
    return results
