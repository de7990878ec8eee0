"""wgrad into float32, against the weight gradient of PyTorch's convolution."""

import pytest
from layers import CONVOLUTIONS, Convolution, synchronize
from torch.nn.grad import conv2d_weight

from fastp2p.ops import wgrad


@pytest.mark.parametrize("provider", ["fastp2p", "eager"])
@pytest.mark.parametrize("layer", CONVOLUTIONS, ids=lambda layer: layer.name)
@pytest.mark.parametrize("batch_size", [1, 16])
def bench_wgrad(benchmark, provider: str, layer: Convolution, batch_size: int):
    dy, x = layer.small(batch_size), layer.large(batch_size)

    def timed() -> None:
        if provider == "fastp2p":
            wgrad(dy, x, stride=layer.stride)
        else:
            conv2d_weight(x, (layer.o, layer.c, 4, 4), dy, layer.stride, 1)
        synchronize()

    benchmark.extra_info["gflop"] = layer.gflop * batch_size
    benchmark(timed)
