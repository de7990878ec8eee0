"""up of two inputs with the statistics for batch norm, against torch.cat and PyTorch's transposed convolution."""

import pytest
import torch
from layers import CONVOLUTIONS, Convolution, synchronize

from fastp2p.ops import up

# Each of these layers of the decoder turns the smaller map of its level of the encoder, twice, into the larger one
DECODER = dict(zip(("d2", "d4", "d7"), CONVOLUTIONS, strict=False))


@pytest.mark.parametrize("provider", ["fastp2p", "eager"])
@pytest.mark.parametrize(("name", "encoder"), DECODER.items(), ids=DECODER)
@pytest.mark.parametrize("batch_size", [1, 16])
def bench_up(benchmark, provider: str, name: str, encoder: Convolution, batch_size: int):
    skip, x = encoder.small(batch_size), encoder.small(batch_size)
    weight = torch.cat([encoder.weight(), encoder.weight()])
    weight = weight.contiguous(memory_format=torch.channels_last)

    def timed() -> None:
        if provider == "fastp2p":
            up(skip, weight, x2=x, stat_groups=1)
        else:
            torch.conv_transpose2d(torch.cat([skip, x], 1), weight, None, 2, 1)
        synchronize()

    benchmark.extra_info["gflop"] = 2 * encoder.gflop * batch_size
    benchmark(timed)
