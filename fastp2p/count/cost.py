"""What a training step must do: the FLOPs and bytes of each call, counted, and the least time that they take."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from fastp2p.count.ceilings import Ceilings
from fastp2p.engine.plan import Layer
from fastp2p.models.pix2pix.calls import CONVOLUTIONS, Call, calls
from fastp2p.models.pix2pix.step import FusedStep
from fastp2p.tuner.operations import operation_of

AUGMENTED = torch.float32  # dtype of real_A and real_B, as Crops.cut gives them
POWERS = 16  # bytes: Adam's bias corrections, (2,) float64
RNG = 16  # bytes: (seed, step), int64


@dataclass(frozen=True)
class Traffic:
    """Bytes that are read and written, each tensor once a call, and those that are updated twice."""

    maps: int = 0  # images, activations and their gradients
    weights: int = 0  # of convolutions, as they are multiplied
    adam: int = 0  # float32 weights, moments and gradients, and writing the compute weights
    vectors: int = 0  # values per channel, and single ones: biases, statistics, losses, learning rates

    @property
    def total(self) -> int:
        return self.maps + self.weights + self.adam + self.vectors

    def __add__(self, other: "Traffic") -> "Traffic":
        return Traffic(*(a + b for a, b in zip(vars(self).values(), vars(other).values(), strict=True)))


@dataclass(frozen=True)
class Cost:
    """What one call must do."""

    call: Call
    flop: int  # two for each multiply-accumulate with a live tap; what is done for each element is not counted
    traffic: Traffic

    def floor(self, ceilings: Ceilings) -> float:
        """Least seconds of this call alone, where no operand is in a cache yet."""
        return max(self.flop / ceilings.flop_per_sec, self.traffic.total / ceilings.bytes_per_sec)


@dataclass(frozen=True)
class Sum:
    """Several calls, one after the other."""

    calls: int
    flop: int
    traffic: Traffic
    floor: float  # seconds
    bound_by: str  # arithmetic or bytes, whichever of all calls takes longer

    @classmethod
    def of(cls, costs: Sequence[Cost], ceilings: Ceilings) -> "Sum":
        flop = sum(cost.flop for cost in costs)
        traffic = sum((cost.traffic for cost in costs), Traffic())
        arithmetic, moving = flop / ceilings.flop_per_sec, traffic.total / ceilings.bytes_per_sec
        floor = sum(cost.floor(ceilings) for cost in costs)
        return cls(len(costs), flop, traffic, floor, "arithmetic" if arithmetic > moving else "bytes")


@dataclass(frozen=True)
class StepFloor:
    """The least seconds of a step, by what takes them.

    Of convolutions and Adam alone: norms, activations, losses and the augmentation could all be fused into them. Each
    map is read and written once a call, each weight matrix read once in each direction (netD's later passes find it
    in a cache), masters and moments once. What one call leaves in a cache for the next one need not come from memory
    again, so small steps on a device with a large cache may be faster than this.
    """

    arithmetic: float
    maps: float
    weights: float
    adam: float

    @property
    def overlapped(self) -> float:
        """Arithmetic and bytes at once."""
        return max(self.arithmetic, self.maps + self.weights + self.adam)

    @property
    def in_turn(self) -> float:
        """Without overlap."""
        return self.arithmetic + self.maps + self.weights + self.adam


def step_floor(costs: Sequence[Cost], ceilings: Ceilings) -> StepFloor:
    """The floor of the step of these calls."""
    flop = maps = adam = 0
    weights: dict[tuple[object, ...], int] = {}
    for cost in costs:
        call = cost.call
        adam += cost.traffic.adam
        if call.operator in CONVOLUTIONS:
            flop += cost.flop
            maps += cost.traffic.maps
            assert call.layer is not None
            weights.setdefault((call.net, call.layer.name, call.direction), cost.traffic.weights)
    per_byte = 1 / ceilings.bytes_per_sec
    return StepFloor(flop / ceilings.flop_per_sec, maps * per_byte, sum(weights.values()) * per_byte, adam * per_byte)


def count_step(step: FusedStep, images: int) -> list[Cost]:
    """The cost of each call of a step of so many images, in the order of the calls; the first one is the augmentation.

    Counted from the step's plans: it is not run, and may be on the meta device. Copies between the operators (D's input
    put together, padding and cropping where the sides do not fit G, gradients gathered for `reduce`) are no operators
    and not counted.
    """
    return [_Counter(step).cost(call) for call in calls(step, images)]


class _Counter:
    def __init__(self, step: FusedStep):
        self.dtype = step.dtype
        wide = torch.promote_types(step.dtype, torch.float32)
        self.low, self.wide = step.dtype.itemsize, wide.itemsize
        self.rounded = 0 if step.dtype == wide else self.low  # bytes of a compute weight that Adam writes

    def cost(self, call: Call) -> Cost:
        if call.operator in CONVOLUTIONS:
            return self._convolution(call)
        traffic: Traffic = getattr(self, f"_{call.operator}")(call)
        return Cost(call, 0, traffic)

    def _convolution(self, call: Call) -> Cost:
        operation = operation_of(call, self.dtype)
        problem = operation.problem
        outer, inner = problem.outer + problem.outer2, problem.inner
        weight = outer * inner * problem.kernel_height * problem.kernel_width
        flop = 2 * problem.pixels * weight
        small = problem.pixels * outer * self.low
        large = call.images * operation.large[0] * operation.large[1] * inner * self.low
        if call.operator == "conv_wgrad":
            return Cost(call, flop, Traffic(maps=small + large, adam=weight * self.wide))
        if call.operator == "conv_wgrad_adam":
            adam, vectors = weight * (6 * self.wide + self.rounded), self.wide + POWERS
            return Cost(call, flop, Traffic(maps=small + large, adam=adam, vectors=vectors))
        out, channels = (small, outer) if call.operator == "conv" else (large, inner)
        gate = out if call.gate else 0
        vectors = (int(call.bias) + 2 * call.stat_groups) * channels * self.wide
        return Cost(call, flop, Traffic(small + large + gate, weight * self.low, vectors=vectors))

    def _norm_act(self, call: Call) -> Traffic:
        layer = _layer(call)
        return Traffic((2 + _crosses(layer)) * self._map(call), vectors=self._norm_vectors(call, layer))

    def _norm_act_backward(self, call: Call) -> Traffic:
        layer = _layer(call)
        gradients = 2 * layer.out_channels * self.wide  # of the norm's weight and bias, or the layer's bias
        vectors = self._norm_vectors(call, layer) + gradients
        return Traffic((3 + _crosses(layer)) * self._map(call), vectors=vectors)

    def _norm_vectors(self, call: Call, layer: Layer) -> int:
        affine = layer.norm is not None and layer.norm.weight is not None
        rows = 2 * (call.stat_groups + affine)
        return rows * layer.out_channels * self.wide + (RNG if layer.dropout else 0)

    def _running_stats(self, call: Call) -> Traffic:
        return Traffic(vectors=2 * (2 + call.stat_groups) * _layer(call).out_channels * self.wide)

    def _norm_stats(self, call: Call) -> Traffic:
        return Traffic(self._map(call), vectors=2 * call.stat_groups * _layer(call).out_channels * self.wide)

    def _patch_loss(self, call: Call) -> Traffic:
        target = AUGMENTED.itemsize if call.target else 0
        return Traffic(call.elements * (2 * self.low + target), vectors=self.wide)

    def _adam(self, call: Call) -> Traffic:
        per_element = 7 * self.wide + (self.rounded if call.rounds else 0)
        unscale = torch.float32.itemsize if call.unscales else 0
        return Traffic(adam=call.elements * per_element, vectors=self.wide + POWERS + unscale)

    def _augment(self, call: Call) -> Traffic:
        """Of the resident pairs what is cropped is read; of each index, offset and flip."""
        return Traffic(call.elements * (1 + AUGMENTED.itemsize), vectors=call.images * (8 + 16 + 1))

    def _map(self, call: Call) -> int:
        """Bytes of the layer's output."""
        layer = _layer(call)
        return call.images * layer.out_channels * layer.out_size[0] * layer.out_size[1] * self.low


def _layer(call: Call) -> Layer:
    assert call.layer is not None
    return call.layer


def _crosses(layer: Layer) -> int:
    """1 where the layer has a second reader, across a skip connection."""
    return int(layer.skip_activation is not None)
