"""norm_stats: mean and variance of the first normalised maps of the U-Net, against torch.var_mean."""

import pytest
import torch

from fastp2p.ops import norm_stats


@pytest.mark.parametrize("provider", ["fastp2p", "eager"])
@pytest.mark.parametrize("batch_size", [1, 16])
def bench_norm_stats(benchmark, provider: str, batch_size: int):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    x = torch.randn(batch_size, 128, 64, 64, device=device).to(dtype).contiguous(memory_format=torch.channels_last)

    def timed() -> None:
        if provider == "fastp2p":
            norm_stats(x, stat_groups=1)
        else:
            torch.var_mean(x.float(), dim=(0, 2, 3), correction=0)
        if device == "cuda":
            torch.cuda.synchronize()

    benchmark.extra_info["bytes"] = x.numel() * x.element_size()  # read once
    benchmark(timed)
