"""norm_act with its statistics, and its backward, on the U-Net's first normalised maps, against eager PyTorch."""

import pytest
import torch
from layers import DEVICE, DTYPE, synchronize
from torch import nn

from fastp2p.ops import norm_act, norm_stats


@pytest.mark.parametrize("provider", ["fastp2p", "eager"])
@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("batch_size", [1, 16])
def bench_norm_act(benchmark, provider: str, direction: str, batch_size: int):
    x = torch.randn(batch_size, 128, 64, 64, device=DEVICE).to(DTYPE).contiguous(memory_format=torch.channels_last)
    x.requires_grad_()
    dy = torch.randn_like(x)
    layer = nn.BatchNorm2d(128, device=DEVICE)
    activation = nn.LeakyReLU(0.2)

    def forward() -> torch.Tensor:
        if provider == "eager":
            return activation(layer(x))
        return norm_act(x, *norm_stats(x, stat_groups=1), layer.weight, layer.bias, activation="leaky_relu")[0]

    y = forward()
    inputs = (x, layer.weight, layer.bias)

    def timed() -> None:
        if direction == "forward":
            with torch.no_grad():
                forward()
        else:
            torch.autograd.grad(y, inputs, dy, retain_graph=True)
        synchronize()

    # Forward: x read twice, y written. Backward: x and dy read twice, dx written.
    benchmark.extra_info["bytes"] = x.numel() * x.element_size() * (3 if direction == "forward" else 5)
    benchmark(timed)
