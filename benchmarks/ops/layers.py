"""The device, its dtypes, and operands of four of the networks' convolutions, for the benchmarks of the operators.

Eager PyTorch gets the very operands that ours gets, in the same dtype and layout: what is gained is the operator's, not
the dtype's. bench_cpu.py compares with float32 as upstream has it.

Apart from fastp2p.kernels.layer_shapes, whose Layer is what a kernel is compiled for: that needs Triton, which there is
for Linux alone, and these benchmarks run wherever PyTorch does.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch

from fastp2p.device import DTYPES, best_precision
from fastp2p.ops.kernel_choices import Problem
from fastp2p.tuner.operations import Noise, Operation, Trial


@dataclass(frozen=True)
class Convolution:
    """A 4x4 convolution of padding 1 from (c, side, side), the larger map, to o channels."""

    name: str
    c: int
    side: int
    o: int
    stride: int = 2

    @property
    def out_side(self) -> int:
        return (self.side - 2) // self.stride + 1

    @property
    def tiny(self) -> "Convolution":
        """For a rehearsal."""
        return replace(self, c=12, side=min(8, self.side), o=16)

    def trial(self, operator: str, dtype: torch.dtype, images: int, *, stat_groups: int = 0) -> Trial:
        """An operator's arguments, and how to judge what it makes of them.

        `conv_transpose` gets the smaller map twice, as after torch.cat with a skip connection's.
        """
        small, large = (self.out_side, self.out_side), (self.side, self.side)
        channels = (self.o, self.o if operator == "conv_transpose" else 0, self.c)
        problem = Problem(operator, dtype, images * self.out_side**2, *channels, 4, 4, self.stride)
        strides = (16 * self.c, 1, 4 * self.c, self.c)  # channels_last
        operation = Operation(
            self.name, problem, images, small, large, padding=1, stat_groups=stat_groups, strides=strides
        )
        return Trial(operation, NOISE)


# The generator's outer, middle and deep layer; the discriminator's that costs most
CONVOLUTIONS = [
    Convolution("e2", 64, 128, 128),
    Convolution("e4", 256, 32, 512),
    Convolution("e7", 512, 4, 512),
    Convolution("D4", 256, 32, 512, 1),
]
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
NOISE = Noise(DEVICE)
BEST = DTYPES[best_precision(DEVICE)]

# With --quick the first of each is timed. On a GPU nobody trains in float32 who need not
_TIMED = dict.fromkeys([BEST] if DEVICE.type == "cuda" else [BEST, torch.float32])
each_dtype = pytest.mark.parametrize("dtype", _TIMED, ids=lambda dtype: str(dtype).removeprefix("torch."))
each_batch_size = pytest.mark.parametrize("batch_size", [1, 16] if DEVICE.type == "cuda" else [1, 4])
each_layer = pytest.mark.parametrize("layer", CONVOLUTIONS, ids=lambda layer: layer.name)


def check(trial: Trial, ours: Callable[[], object]) -> None:
    """Compare ours with the reference, which computes in float32; Trial.error argues for the tolerance."""
    error = trial.error(lambda _: ours())
    trial.forget_expected()
    assert error <= 1, f"{trial.operation.problem.key}: off by {error:.3g} tolerances, so nothing is timed"


def gflop(trial: Trial) -> float:
    """Two operations for each tap, pair of channels and pixel of the smaller map."""
    p = trial.operation.problem
    return 2 * 16 * p.pixels * (p.outer + p.outer2) * p.inner / 1e9
