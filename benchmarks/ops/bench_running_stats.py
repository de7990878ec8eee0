"""running_stats: one group's update of 512 channels, against the four operations of eager PyTorch, two per buffer."""

import pytest
import torch
from layers import DEVICE, synchronize

from fastp2p.ops import running_stats

CHANNELS, N_VALUES, MOMENTUM = 512, 1024, 0.1


@pytest.mark.parametrize("provider", ["fastp2p", "eager"])
def bench_running_stats(benchmark, provider: str):
    running_mean, running_var = (torch.rand(CHANNELS, device=DEVICE) for _ in range(2))
    mean, var = (torch.rand(1, CHANNELS, device=DEVICE) for _ in range(2))

    def timed() -> None:
        if provider == "fastp2p":
            running_stats(running_mean, running_var, mean, var, n_values=N_VALUES, momentum=MOMENTUM)
        else:
            running_mean.mul_(1 - MOMENTUM).add_(mean[0], alpha=MOMENTUM)
            running_var.mul_(1 - MOMENTUM).add_(var[0], alpha=MOMENTUM * N_VALUES / (N_VALUES - 1))
        synchronize()

    benchmark.extra_info["bytes"] = CHANNELS * 6 * 4  # four vectors read, two written
    benchmark(timed)
