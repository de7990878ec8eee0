"""The device, and operands of four of the networks' convolutions, for the benchmarks of the operators.

Apart from fastp2p.kernels.layer_shapes, whose Layer is what a kernel is compiled for: that needs Triton, which there is
for Linux alone, and these benchmarks run wherever PyTorch does.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Convolution:
    """A 4x4 convolution of padding 1 from (c, side, side), the larger map, to o channels."""

    name: str
    c: int
    side: int
    o: int
    stride: int = 2

    @property
    def gflop(self) -> float:
        """Of one image: two operations for each tap, input channel, output channel and pixel."""
        return 2 * 16 * self.c * self.o * self.out_side**2 / 1e9

    @property
    def out_side(self) -> int:
        return (self.side - 2) // self.stride + 1

    def large(self, batch_size: int) -> Tensor:
        return _random(batch_size, self.c, self.side, self.side)

    def small(self, batch_size: int) -> Tensor:
        return _random(batch_size, self.o, self.out_side, self.out_side)

    def weight(self) -> Tensor:
        return _random(self.o, self.c, 4, 4) * 0.02


# Of the generator an outer, a middle and a deep layer; of the discriminator the one that costs most
CONVOLUTIONS = [
    Convolution("e2", 64, 128, 128),
    Convolution("e4", 256, 32, 512),
    Convolution("e7", 512, 4, 512),
    Convolution("D4", 256, 32, 512, 1),
]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPE = torch.bfloat16 if DEVICE == "cuda" else torch.float32


def _random(*shape: int) -> Tensor:
    return torch.randn(shape, device=DEVICE).to(DTYPE).contiguous(memory_format=torch.channels_last)


def synchronize() -> None:
    """Wait for the GPU, if there is one: a benchmark's clock is the host's."""
    if DEVICE == "cuda":
        torch.cuda.synchronize()
