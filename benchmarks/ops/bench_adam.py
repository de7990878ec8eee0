"""adam: one step over unet_256's 54 million parameters, against torch.optim.Adam."""

import pytest
import torch
from jobs import UNET_256_PARAMETERS
from layers import DEVICE, synchronize

from fastp2p.ops import adam


@pytest.mark.parametrize("provider", ["fastp2p", "torch single-tensor", "torch foreach"])
def bench_adam(benchmark, provider: str):
    param, grad, exp_avg, exp_avg_sq = (torch.rand(UNET_256_PARAMETERS, device=DEVICE) for _ in range(4))
    if provider == "fastp2p":
        lr = torch.tensor(2e-4, device=DEVICE)
        powers = torch.tensor([0.5, 0.999], dtype=torch.float64, device=DEVICE)

        def step() -> None:
            adam(param, grad, exp_avg, exp_avg_sq, lr=lr, powers=powers)
    else:
        parameter = torch.nn.Parameter(param)
        parameter.grad = grad
        step = torch.optim.Adam([parameter], lr=2e-4, betas=(0.5, 0.999), foreach=provider == "torch foreach").step

    def timed() -> None:
        step()
        synchronize()

    benchmark.extra_info["bytes"] = UNET_256_PARAMETERS * 28  # 16 read, 12 written
    benchmark.pedantic(timed, rounds=5, warmup_rounds=1)
