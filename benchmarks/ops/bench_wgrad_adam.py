"""wgrad_adam of a deep layer at batch size 1, against wgrad and adam apart and against PyTorch's gradient and Adam."""

import pytest
import torch
from layers import CONVOLUTIONS, DEVICE, DTYPE, synchronize
from torch.nn.grad import conv2d_weight

from fastp2p.ops import adam, wgrad, wgrad_adam


@pytest.mark.parametrize("provider", ["fastp2p", "wgrad, adam", "eager"])
def bench_wgrad_adam(benchmark, provider: str):
    layer = CONVOLUTIONS[2]  # e7
    dy, x = layer.small(1), layer.large(1)
    param, exp_avg, exp_avg_sq = (layer.weight().float().square() for _ in range(3))
    lr = torch.tensor(2e-4, device=DEVICE)
    powers = torch.tensor([0.5, 0.999], dtype=torch.float64, device=DEVICE)
    parameter = torch.nn.Parameter(param.clone(memory_format=torch.preserve_format))
    optimizer = torch.optim.Adam([parameter], lr=2e-4, betas=(0.5, 0.999), fused=True)

    def timed() -> None:
        if provider == "fastp2p":
            wgrad_adam(dy, x, param, exp_avg, exp_avg_sq, lr=lr, powers=powers)
        elif provider == "eager":
            parameter.grad = conv2d_weight(x, (layer.o, layer.c, 4, 4), dy, 2, 1).float()
            optimizer.step()
        else:
            flat = [t.permute(0, 2, 3, 1).reshape(-1) for t in (param, wgrad(dy, x), exp_avg, exp_avg_sq)]
            adam(*flat, lr=lr, powers=powers)
        synchronize()

    benchmark.extra_info["bytes"] = param.numel() * 24 + (dy.numel() + x.numel()) * DTYPE.itemsize
    benchmark(timed)
