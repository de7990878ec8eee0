"""running_stats: one group's update of 512 channels, against the four operations of eager PyTorch, two per buffer."""

import torch
from harness.parity import UNIT, assert_within
from layers import DEVICE

from fastp2p.ops import running_stats, running_stats_ref

CHANNELS, N_VALUES, MOMENTUM = 512, 1024, 0.1


def bench_running_stats(compare):
    running = [torch.rand(CHANNELS, device=DEVICE) for _ in range(2)]
    mean, var = (torch.rand(1, CHANNELS, device=DEVICE) for _ in range(2))

    def eager() -> None:
        running[0].mul_(1 - MOMENTUM).add_(mean[0], alpha=MOMENTUM)
        running[1].mul_(1 - MOMENTUM).add_(var[0], alpha=MOMENTUM * N_VALUES / (N_VALUES - 1))

    def ours() -> None:
        running_stats(*running, mean, var, n_values=N_VALUES, momentum=MOMENTUM)

    def check() -> None:
        """Two products and a sum of positive terms, three roundings of the result; and momentum's own."""
        expected = [t.double() for t in running]
        running_stats_ref(*expected, mean.double(), var.double(), N_VALUES, MOMENTUM)
        ours()
        for name, one, other in zip(("running_mean", "running_var"), running, expected, strict=True):
            assert_within(name, one, other, 4 * UNIT * other)

    n_bytes = CHANNELS * 6 * 4  # four vectors read, two written
    compare("running_stats", dtype=torch.float32, eager=eager, ours=ours, check=check, n_bytes=n_bytes)
