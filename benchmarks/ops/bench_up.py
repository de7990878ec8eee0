"""up of two inputs with the statistics for batch norm, against torch.cat and PyTorch's transposed convolution."""

import pytest
import torch
from layers import LAYERS, Layer, synchronize

from fastp2p.ops import up


@pytest.mark.parametrize("provider", ["fastp2p", "eager"])
@pytest.mark.parametrize("layer", LAYERS[:3], ids=lambda layer: layer.name)
@pytest.mark.parametrize("batch_size", [1, 16])
def bench_up(benchmark, provider: str, layer: Layer, batch_size: int):
    skip, x, weight = layer.small(batch_size), layer.small(batch_size), torch.cat([layer.weight(), layer.weight()])
    weight = weight.contiguous(memory_format=torch.channels_last)

    def timed() -> None:
        if provider == "fastp2p":
            up(skip, weight, x2=x, stat_groups=1)
        else:
            torch.conv_transpose2d(torch.cat([skip, x], 1), weight, None, 2, 1)
        synchronize()

    benchmark.extra_info["gflop"] = 2 * layer.gflop * batch_size
    benchmark(timed)
