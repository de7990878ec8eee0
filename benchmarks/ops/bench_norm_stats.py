"""norm_stats: mean and variance of the first normalised maps of the U-Net, against torch.var_mean."""

import pytest
import torch
from layers import DEVICE, DTYPE, synchronize

from fastp2p.ops import norm_stats


@pytest.mark.parametrize("provider", ["fastp2p", "eager"])
@pytest.mark.parametrize("batch_size", [1, 16])
def bench_norm_stats(benchmark, provider: str, batch_size: int):
    x = torch.randn(batch_size, 128, 64, 64, device=DEVICE).to(DTYPE).contiguous(memory_format=torch.channels_last)

    def timed() -> None:
        if provider == "fastp2p":
            norm_stats(x, stat_groups=1)
        else:
            torch.var_mean(x.float(), dim=(0, 2, 3), correction=0)
        synchronize()

    benchmark.extra_info["bytes"] = x.numel() * x.element_size()  # read once
    benchmark(timed)
