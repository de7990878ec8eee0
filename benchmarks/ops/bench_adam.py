"""adam: one step over unet_256's 54 million parameters, against torch.optim.Adam."""

import pytest
import torch

from fastp2p.ops import adam

PARAMETERS = 54_413_955


@pytest.mark.parametrize("provider", ["fastp2p", "torch single-tensor", "torch foreach"])
def bench_adam(benchmark, provider: str):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    param, grad, exp_avg, exp_avg_sq = (torch.rand(PARAMETERS, device=device) for _ in range(4))
    if provider == "fastp2p":
        lr = torch.tensor(2e-4, device=device)
        powers = torch.tensor([0.5, 0.999], dtype=torch.float64, device=device)

        def step() -> None:
            adam(param, grad, exp_avg, exp_avg_sq, lr=lr, powers=powers)
    else:
        parameter = torch.nn.Parameter(param)
        parameter.grad = grad
        step = torch.optim.Adam([parameter], lr=2e-4, betas=(0.5, 0.999), foreach=provider == "torch foreach").step

    def timed() -> None:
        step()
        if device == "cuda":
            torch.cuda.synchronize()

    benchmark.extra_info["bytes"] = PARAMETERS * 28  # 16 read, 12 written
    benchmark.pedantic(timed, rounds=5, warmup_rounds=1)
