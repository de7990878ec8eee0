"""fastp2p roofline: what a training step must do, the least time that takes here, and how near the engine comes."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from fastp2p.commands.measure import Kernels, Machine, Spread, Workload, about, check_steps, describe, heading, table
from fastp2p.config import ResolvedConfig, RunConfig
from fastp2p.count.ceilings import Ceilings
from fastp2p.count.cost import Cost, StepFloor, Sum, count_step, step_floor
from fastp2p.engine.record import Call
from fastp2p.errors import InputError
from fastp2p.train.state import TrainState

WORST = 10  # calls that are named
FAR_APART = 2.0  # quotient of two times of the same steps that puts both in doubt
HEADS = ("", "calls", "GFLOP", "maps MB", "weights MB", "Adam MB", "bound by", "floor ms")
MEASURED_HEADS = ("measured ms", "ratio")


@dataclass(frozen=True)
class Measured:
    """Milliseconds of what ran."""

    machine: Machine
    kernels: Kernels
    on_gpu: bool
    calls: list[float]  # each operator call's under torch.profiler, medians over the steps
    rest: float  # likewise, of a step outside of them
    step: Spread  # whole steps without the profiler


@dataclass(frozen=True)
class Roofline:
    """A step's counted costs beside the ceilings, and where it ran beside what was measured."""

    config: ResolvedConfig
    ceilings: Ceilings
    costs: list[Cost]
    floor: StepFloor
    measured: Measured | None

    def as_dict(self) -> dict[str, Any]:
        """For JSON: each call, and the step."""
        calls = []
        for number, cost in enumerate(self.costs):
            call, total = cost.call, Sum.of([cost], self.ceilings)
            row: dict[str, Any] = {
                "part": call.part,
                "net": call.net,
                "layer": call.layer,
                "direction": call.direction,
                "operator": call.operator,
                "flop": cost.flop,
                "bytes": asdict(cost.traffic),
                "bound_by": total.bound_by,
                "floor_ms": 1e3 * total.floor,
            }
            calls.append(row if self.measured is None else row | {"measured_ms": self.measured.calls[number]})
        floor = {f"{name}_ms": 1e3 * seconds for name, seconds in asdict(self.floor).items()}
        floor |= {"overlapped_ms": 1e3 * self.floor.overlapped, "in_turn_ms": 1e3 * self.floor.in_turn}
        ran = self.measured
        machine, kernels = (ran.machine, ran.kernels) if ran else (None, None)
        result = about(machine, self.config, kernels, self.ceilings)
        result |= {"calls": calls, "floor": floor}
        if ran is not None:
            result["measured"] = asdict(ran.step) | {"rest_ms": ran.rest}
        return result

    def table(self, *, layers: bool = False) -> str:
        """To read: the parts of the step, or every call, and the step.

        Args:
            layers: every call instead of the sums by part and direction.
        """
        ran = self.measured is not None
        heads = HEADS + (MEASURED_HEADS if ran else ())
        numbers = range(len(self.costs))
        rows = [self._row(_label(self.costs[n].call), [n]) for n in numbers] if layers else [*self._parts()]
        if self.measured is not None:
            rows.append(["the rest: copies, Python", *[""] * (len(HEADS) - 1), f"{self.measured.rest:.2f}"])
        rows.append(self._row("sum, each call for itself", [*numbers], with_rest=True))
        lines = [*self._heading(), "", *table(heads, rows), "", *self._step_lines()]
        if ran and not layers:
            worst = sorted(numbers, key=self._lost, reverse=True)[:WORST]
            named = [[*self._row(_label(self.costs[n].call), [n]), f"{self._lost(n):.2f}"] for n in worst]
            lines += ["", *table((f"the {WORST} calls that lose most", *heads[1:], "lost ms"), named)]
        return "\n".join(lines)

    def _heading(self) -> list[str]:
        if self.measured is None:
            limits = f"{self.ceilings.flop_per_sec / 1e12:g} TFLOP/s, {self.ceilings.bytes_per_sec / 1e9:g} GB/s"
            return [describe(self.config), f"limits, as given: {limits}; nothing was run"]
        lines = heading(self.measured.machine, self.config, self.measured.kernels, self.ceilings)
        if self.measured.on_gpu:
            lines.append("of calls the time of their kernels, without the CUDA graph; of the step that of its replay")
        return lines

    def _parts(self) -> Iterator[list[str]]:
        """A row for each part, and in it for each direction."""
        parts: dict[str, dict[str, list[int]]] = {}
        for number, cost in enumerate(self.costs):
            parts.setdefault(cost.call.part, {}).setdefault(cost.call.direction, []).append(number)
        for part, directions in parts.items():
            yield self._row(part or "the model's step", [n for numbers in directions.values() for n in numbers])
            if len(directions) > 1:
                yield from (self._row(f"  {direction}", numbers) for direction, numbers in directions.items())

    def _row(self, name: str, numbers: Sequence[int], *, with_rest: bool = False) -> list[str]:
        total = Sum.of([self.costs[n] for n in numbers], self.ceilings)
        traffic, floor = total.traffic, 1e3 * total.floor
        cells = [name, str(total.calls), f"{total.flop / 1e9:.3f}"]
        cells += [f"{n_bytes / 1e6:.2f}" for n_bytes in (traffic.maps, traffic.weights, traffic.adam)]
        cells += [total.bound_by, self._ms(total.floor)]
        if self.measured is not None:
            ms = sum(self.measured.calls[n] for n in numbers) + (self.measured.rest if with_rest else 0)
            cells += [f"{ms:.2f}", _ratio(ms, floor)]
        return cells

    def _ms(self, seconds: float) -> str:
        """Milliseconds; a step of a few has floors that are microseconds."""
        return f"{1e3 * seconds:.{4 if self.floor.in_turn < 0.01 else 3}f}"

    def _lost(self, number: int) -> float:
        """Milliseconds of a call above its floor."""
        assert self.measured is not None
        return self.measured.calls[number] - 1e3 * self.costs[number].floor(self.ceilings)

    def _doubts(self) -> list[str]:
        """Calls under the profiler and the step without it were some other time's if they are far apart."""
        if self.measured is None:
            return []
        total, step = sum(self.measured.calls) + self.measured.rest, self.measured.step.median_ms
        if 1 / FAR_APART < total / step < FAR_APART:
            return []
        return [
            f"warning: the calls took {total:.1f} ms under the profiler, a step {step:.1f} without it: measure again;",
            "something else ran meanwhile, or calls are so short that the profiler's own work is most of their time",
        ]

    def _step_lines(self) -> list[str]:
        floor = self.floor
        shares = [("arithmetic", floor.arithmetic), ("maps", floor.maps), ("weights", floor.weights)]
        shares.append(("Adam", floor.adam))
        text = ", ".join(f"{name} {self._ms(seconds)}" for name, seconds in shares)
        rows = [
            ("floor, arithmetic and bytes at once", self._ms(floor.overlapped), f"   {text}"),
            ("floor, one after the other", self._ms(floor.in_turn), ""),
        ]
        if self.measured is not None:
            step = self.measured.step
            ratios = (step.median_ms / (1e3 * least) for least in (floor.overlapped, floor.in_turn))
            ratio = "{} and {} times the floors".format(*map(_short, ratios))
            low, high = step.quartiles_ms
            text = f"   {ratio}; median of {step.n}, quartiles {low:.2f} and {high:.2f}; no profiler"
            rows.append(("measured", f"{step.median_ms:.2f}", text))
        head, *lines = table(("the step", "ms"), [row[:2] for row in rows])
        return [
            head,
            *(line + beside for line, (_, _, beside) in zip(lines, rows, strict=True)),
            *self._doubts(),
            "The step's floors are those of convolutions and Adam, into which the rest could be fused, and of memory:",
            "what lies in a cache can be faster, and so can a call while the machine was faster than for the ceilings.",
        ]


def _label(call: Call) -> str:
    """netD c4 forward, 2 images: D sees fake and real at once, and one of them alone for netG."""
    return f"{call.name}, {call.images} {'image' if call.images == 1 else 'images'}" if call.images else call.name


def _ratio(ms: float, floor: float) -> str:
    return _short(ms / floor) if floor else ""


def _short(ratio: float) -> str:
    """In few characters, since tiny calls are thousands of times their floor."""
    return f"{ratio:.2f}" if ratio < 1000 else f"{ratio:.0f}"


def measure_roofline(config: RunConfig, *, steps: int = 5) -> Roofline:
    """Measure this machine's ceilings, and the step's calls beside what they must do.

    Each call is timed in the step, under torch.profiler, so that its operands are as warm as they are in training; the
    step is also timed whole, without it.

    Args:
        config: its networks, sizes, batch size, precision and device.
        steps: so many with the profiler, and as many without.

    Raises:
        InputError: when the configuration does not fit this machine.
    """
    check_steps(steps)
    workload = Workload(config)
    machine = Machine.here(workload.device)
    ceilings = workload.ceilings()
    workload.warm_up()
    seconds = workload.seconds(steps)
    profiled = workload.profiled(steps)
    ceilings = ceilings.or_higher(workload.ceilings())  # on a shared machine they change while the steps run
    calls, rest = profiled.ms_of_calls(), profiled.ms_of_the_rest()
    measured = Measured(machine, workload.kernels(), profiled.on_gpu, calls, rest, Spread.of(seconds))
    costs = workload.costs
    return Roofline(workload.config, ceilings, costs, step_floor(costs, ceilings), measured)


def count_roofline(config: RunConfig, *, tflop_per_sec: float, gb_per_sec: float) -> Roofline:
    """The floors on another machine; this runs and measures nothing, and takes no memory.

    Args:
        config: its networks, sizes, batch size and precision; auto is bf16.
        tflop_per_sec, gb_per_sec: what that machine multiplies in this precision, and copies.

    Raises:
        InputError: when they are no positive numbers.
    """
    if not all(math.isfinite(limit) and limit > 0 for limit in (tflop_per_sec, gb_per_sec)):
        raise InputError(
            f"limits: got {tflop_per_sec:g} TFLOP/s and {gb_per_sec:g} GB/s, expected two numbers above 0, such as an "
            "H200's --limits 790 4300"
        )
    resolved = config.resolve("cuda", "bf16")
    meta = torch.device("meta")
    with meta:
        step = TrainState.new(resolved, meta, fingerprint="").engine_step(resolved)
    costs = count_step(step, config.batch_size)
    ceilings = Ceilings("the given limits", tflop_per_sec * 1e12, gb_per_sec * 1e9)
    return Roofline(resolved, ceilings, costs, step_floor(costs, ceilings), None)
