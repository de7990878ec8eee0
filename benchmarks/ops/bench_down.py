"""down with the statistics for batch norm, against PyTorch's convolution alone."""

import pytest
import torch
from layers import CONVOLUTIONS, Convolution, synchronize

from fastp2p.ops import down


@pytest.mark.parametrize("provider", ["fastp2p", "eager"])
@pytest.mark.parametrize("layer", CONVOLUTIONS, ids=lambda layer: layer.name)
@pytest.mark.parametrize("batch_size", [1, 16])
def bench_down(benchmark, provider: str, layer: Convolution, batch_size: int):
    x, weight = layer.large(batch_size), layer.weight()

    def timed() -> None:
        if provider == "fastp2p":
            down(x, weight, stride=layer.stride, stat_groups=1)
        else:
            torch.conv2d(x, weight, None, layer.stride, 1)
        synchronize()

    benchmark.extra_info["gflop"] = layer.gflop * batch_size
    benchmark(timed)
