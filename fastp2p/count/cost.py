"""What a training step must do: the FLOPs and bytes of each call, counted, and the least time that they take."""

from collections.abc import Sequence
from dataclasses import dataclass

from fastp2p.conv_shape import CONVOLUTIONS
from fastp2p.count.ceilings import Ceilings
from fastp2p.engine.record import Call, record
from fastp2p.engine.step import Step
from fastp2p.ops.library import cost_of
from fastp2p.ops.operands import Traffic


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
    map is read and written once a call, each weight matrix read once in each direction (a network's later passes find
    it in a cache), masters and moments once. What one call leaves in a cache for the next one need not come from memory
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
            maps += cost.traffic.maps - _maps_of_a_norm(call)
            weights.setdefault((call.net, call.layer, call.direction), cost.traffic.weights)
    per_byte = 1 / ceilings.bytes_per_sec
    return StepFloor(flop / ceilings.flop_per_sec, maps * per_byte, sum(weights.values()) * per_byte, adam * per_byte)


def _maps_of_a_norm(call: Call) -> int:
    """Bytes that a data gradient reads for the norm that it flows on into, which is no part of the convolution.

    Where nothing but an activation comes before, that is a part of its convolution, and so is the derivative.
    """
    args = call.args
    if args.get("gate_mean") is None or not (args["eps"] or args["second"] >= 0 or args["dropout"]):
        return 0
    return sum(args[name].n_bytes for name in ("gate", "addend") if args[name] is not None)


def count_step(step: Step, images: int) -> list[Cost]:
    """The cost of each call of a step of so many images, in the order of `record`; the first one is the augmentation.

    Counted from a record of the step: it is not run, and may be on the meta device. Copies between the operators are no
    operators and not counted: padding and cropping where the sides do not fit G, gradients gathered for `reduce`.
    """
    return [Cost(call, *cost_of(call.operator, call.args, call.results)) for call in record(step, images)]
