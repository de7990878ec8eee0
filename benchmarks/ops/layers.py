"""The device, its dtypes, and operands of four of the networks' convolutions, for the benchmarks of the operators.

Eager PyTorch gets the very operands that ours gets, in the same dtype and layout: what is gained is the operator's, not
the dtype's. bench_cpu.py compares with float32 as upstream has it.

Apart from fastp2p.kernels.layer_shapes, whose Layer is what a kernel is compiled for: that needs Triton, which there is
for Linux alone, and these benchmarks run wherever PyTorch does.
"""

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch

from fastp2p.conv_shape import ConvShape
from fastp2p.device import DTYPES, best_precision
from fastp2p.tuner.operations import Noise, Operation, Trial


@dataclass(frozen=True)
class Layer:
    """A 4x4 convolution of padding 1."""

    name: str
    shape: ConvShape  # one image's

    @property
    def tiny(self) -> "Layer":
        """For a rehearsal."""
        return layer(self.name, 12, min(8, self.shape.large[0]), 16, self.shape.stride)

    def trial(self, operator: str, dtype: torch.dtype, images: int, *, stat_groups: int = 0) -> Trial:
        """An operator's arguments, and how to judge what it makes of them.

        `conv_transpose` gets the smaller map twice, as after torch.cat with a skip connection's.
        """
        outer2 = self.shape.outer if operator == "conv_transpose" else 0
        shape, inner = self.shape._replace(images=images, outer2=outer2), self.shape.inner
        strides = (shape.columns, 1, 4 * inner, inner)  # channels_last
        return Trial(Operation(self.name, operator, dtype, shape, stat_groups=stat_groups, strides=strides), NOISE)


def layer(name: str, inner: int, side: int, outer: int, stride: int = 2) -> Layer:
    """The layer between (inner, side, side), the larger map, and `outer` channels."""
    return Layer(name, ConvShape.between(inner, (side, side), outer, k=4, stride=stride, padding=1))


# The generator's outer, middle and deep layer; the discriminator's that costs most
LAYERS = [layer("e2", 64, 128, 128), layer("e4", 256, 32, 512), layer("e7", 512, 4, 512), layer("D4", 256, 32, 512, 1)]
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
NOISE = Noise(DEVICE)
BEST = DTYPES[best_precision(DEVICE)]

# With --quick the first of each is timed. On a GPU nobody trains in float32 who need not
_TIMED = dict.fromkeys([BEST] if DEVICE.type == "cuda" else [BEST, torch.float32])
each_dtype = pytest.mark.parametrize("dtype", _TIMED, ids=lambda dtype: str(dtype).removeprefix("torch."))
each_batch_size = pytest.mark.parametrize("batch_size", [1, 16] if DEVICE.type == "cuda" else [1, 4])
each_layer = pytest.mark.parametrize("layer", LAYERS, ids=lambda layer: layer.name)


def check(trial: Trial, ours: Callable[[], object]) -> None:
    """Compare ours with the reference, which computes in float32; Trial.error argues for the tolerance."""
    error = trial.error(lambda _: ours())
    trial.forget_expected()
    assert error <= 1, f"{trial.operation.problem.key}: off by {error:.3g} tolerances, so nothing is timed"


def gflop(trial: Trial) -> float:
    """Two operations for each tap, pair of channels and pixel of the smaller map."""
    shape = trial.operation.shape
    return 2 * shape.pixels * shape.rows * shape.columns / 1e9
