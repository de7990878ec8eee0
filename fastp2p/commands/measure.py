"""A training step at work as fastp2p train runs it: timed whole, and call by call under torch.profiler."""

import os
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import pairwise
from statistics import median, quantiles
from typing import Any

import torch
from torch._C._autograd import DeviceType
from torch.autograd.profiler_util import FunctionEvent
from torch.profiler import ProfilerActivity, profile, record_function

from fastp2p.commands.info import version_of
from fastp2p.config import ResolvedConfig, RunConfig
from fastp2p.count.ceilings import Ceilings, measure_ceilings
from fastp2p.count.cost import Cost, count_step
from fastp2p.data import Crops
from fastp2p.device import prepare
from fastp2p.engine.ranges import AUGMENT, part
from fastp2p.errors import InputError
from fastp2p.models import registry
from fastp2p.ops import kernel_choices
from fastp2p.train.state import TrainState
from fastp2p.tuner.contest import why_not
from fastp2p.tuner.operations import operations
from fastp2p.tuner.store import too_busy

STEP = "training step"  # range around the parts
PREFIX = "fastp2p::"  # our operators'
WARM_UP = 5  # steps; a GPU's graph of the step is captured at the fourth


@dataclass(frozen=True)
class Machine:
    """Where something was measured."""

    name: str
    versions: dict[str, str]
    load_average: float  # the last minute's, before measuring
    too_busy: bool

    @classmethod
    def here(cls, device: torch.device) -> "Machine":
        versions = {package: version_of(package) for package in ("torch", "triton", "fastp2p")}
        busy = too_busy(device.type) is not None
        return cls(kernel_choices.place_of(device).name, versions, round(os.getloadavg()[0], 2), busy)

    def lines(self) -> list[str]:
        """To read."""
        versions = ", ".join(f"{package} {version}" for package, version in self.versions.items())
        text = [f"{self.name}; {versions}; load average {self.load_average:g}"]
        if self.too_busy:
            text.append(
                f"warning: others keep {self.load_average:.1f} cores busy; times are too long, and the ceilings too low"
            )
        return text


@dataclass(frozen=True)
class Kernels:
    """How many of a step's convolutions have a kernel that was chosen by measurement, in words and numbers."""

    text: str
    tuned: int
    all: int


class Workload:
    """A training step on random pairs, the augmentation from resident uint8 included.

    The convolutions' kernels are those that fastp2p train takes: what was measured on this machine before, the rest by
    rule.

    Args:
        config: its networks, sizes, batch size, precision and device.

    Raises:
        InputError: when they do not fit each other or this machine.
    """

    def __init__(self, config: RunConfig):
        self.device, self.config = prepare(config)
        state = TrainState.new(self.config, self.device, fingerprint="")
        self.step = state.engine_step(self.config)
        self.costs = count_step(self.step, self.config.batch_size)
        self.crops = _random_crops(self.config, self.device)
        self.trained = state.training_step(self.config)  # on a GPU one graph

    def kernels(self) -> "Kernels":
        """Whose choice its convolutions' kernels are."""
        if (reason := why_not(self.device, self.step.dtype)) is not None:
            return Kernels(f"no kernels to choose from, {reason}", 0, 0)
        known = kernel_choices.table(kernel_choices.place_of(self.device))
        wanted = operations(self.step, self.config.batch_size)
        tuned = sum(operation.problem in known for operation in wanted)
        text = f"{tuned} of {len(wanted)} convolutions tuned"
        return Kernels(text if tuned == len(wanted) else f"{text} (fastp2p tune)", tuned, len(wanted))

    def ceilings(self) -> Ceilings:
        """This device's, in the precision of the step."""
        return measure_ceilings(self.device, self.step.dtype)

    def warm_up(self) -> None:
        """Let kernels compile, caches fill, and on a GPU the graph be captured."""
        for _ in range(WARM_UP if self.device.type == "cuda" else 2):
            self.trained(self.crops)
        self._run_in_parts()

    def seconds(self, steps: int) -> list[float]:
        """Seconds of each of so many steps, as training runs them."""
        if self.device.type == "cuda":
            events = [torch.cuda.Event(enable_timing=True) for _ in range(steps + 1)]
            events[0].record()
            for event in events[1:]:
                self.trained(self.crops)
                event.record()
            torch.cuda.synchronize(self.device)
            return [a.elapsed_time(b) / 1e3 for a, b in pairwise(events)]
        taken = []
        for _ in range(steps):
            began = time.perf_counter()
            self.trained(self.crops)
            taken.append(time.perf_counter() - began)
        return taken

    def profiled(self, steps: int) -> "Profiled":
        """So many steps under torch.profiler; on a GPU without the graph, whose replay has no names."""
        activities = [ProfilerActivity.CPU]
        if self.device.type == "cuda":
            activities.append(ProfilerActivity.CUDA)
        profiler = profile(activities=activities)
        with _without_notes():
            profiler.start()
        try:
            for _ in range(steps):
                self._run_in_parts()
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
        finally:
            with _without_notes():
                profiler.stop()
        return Profiled(profiler, self.costs)

    def _run_in_parts(self) -> None:
        with record_function(STEP):
            with part(AUGMENT):
                images = self.crops.cut(self.device, self.step.image_dtypes)
            self.step.train(images)


@contextmanager
def _without_notes() -> Iterator[None]:
    """Keep off stderr the profiler's notes on its starting and stopping, which no setting silences."""
    sys.stderr.flush()
    stderr = os.dup(2)
    with tempfile.TemporaryFile() as held:
        os.dup2(held.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(stderr, 2)
            os.close(stderr)
            held.seek(0)
            for line in held:
                if not line.startswith(b"USDT:"):
                    os.write(2, line)


def _random_crops(config: ResolvedConfig, device: torch.device) -> Crops:
    n, side, crop = config.batch_size, config.load_size, config.crop_size
    random = torch.Generator().manual_seed(config.seed)
    pairs = torch.randint(256, (n, side, side, config.input_nc + config.output_nc), dtype=torch.uint8, generator=random)
    offset = torch.randint(side - crop + 1, (n, 2), generator=random)
    flip = torch.rand(n, generator=random) < 0.5
    pairs, index, offset, flip = (t.to(device) for t in (pairs, torch.arange(n), offset, flip))
    return Crops(pairs, index, offset, flip, crop, config.input_nc)


def describe(config: ResolvedConfig) -> str:
    """What is trained, in a line."""
    summary = registry.find(config.model).summary(config)
    return f"{summary}; {config.crop_size} px, batch size {config.batch_size}, {config.precision}"


def heading(machine: Machine, config: ResolvedConfig, kernels: Kernels, ceilings: Ceilings) -> list[str]:
    """What was measured where, in lines."""
    limits = f"{ceilings.flop_per_sec / 1e12:.4g} TFLOP/s ({config.precision} product)"
    return [
        *machine.lines(),
        f"{describe(config)}; {kernels.text}",
        f"ceilings, as measured: {limits}, {ceilings.bytes_per_sec / 1e9:.4g} GB/s (copy, read + written)",
    ]


def check_steps(steps: int) -> None:
    """Raise InputError unless there is something to take a median of."""
    if steps < 1:
        raise InputError(f"steps: got {steps}, expected 1 or more; 5 give a median that a hiccup does not move")


@dataclass(frozen=True)
class Spread:
    """Median and spread of several times, in milliseconds."""

    median_ms: float
    quartiles_ms: tuple[float, float]
    n: int

    @classmethod
    def of(cls, seconds: Sequence[float]) -> "Spread":
        ms = [1e3 * s for s in seconds]
        low, _, high = quantiles(ms, n=4, method="inclusive") if len(ms) > 1 else ms * 3
        return cls(median(ms), (low, high), len(ms))


class Profiled:
    """What torch.profiler saw of some steps, each operator call with its cost.

    Times are wall times on a CPU, and on a GPU those of the kernels that were launched.

    Args:
        profiler: of whole steps in the range `STEP`.
        costs: of a step's calls.
    """

    def __init__(self, profiler: profile, costs: Sequence[Cost]):
        self.profiler, self.costs = profiler, costs
        self.on_gpu = ProfilerActivity.CUDA in profiler.activities
        self.parts = list(dict.fromkeys(cost.call.part for cost in costs))  # in the order in which they run
        events: list[FunctionEvent] = list(profiler.events())
        self.kernels = [e for e in events if e.device_type == DeviceType.CUDA and not self._is_range(e)]
        self.steps = [e for e in events if e.name == STEP and e.device_type == DeviceType.CPU]
        self.calls = [list(_operators(step)) for step in self.steps]  # each step's, in order
        expected = [PREFIX + cost.call.operator for cost in costs]
        assert all([call.name for call in calls] == expected for calls in self.calls), "the count is of another step"

    def ms_of_calls(self) -> list[float]:
        """Milliseconds of each operator call, medians over the steps."""
        return [median(self.ms(call) for call in same) for same in zip(*self.calls, strict=True)]

    def ms_of_the_rest(self) -> float:
        """Median milliseconds outside of the operators: copies; on a CPU Python, and the profiler's own work."""
        calls = ([self.ms(call) for call in calls] for calls in self.calls)
        return median(self.ms(step) - sum(times) for step, times in zip(self.steps, calls, strict=True))

    def ms(self, event: FunctionEvent) -> float:
        """Wall time on a CPU; on a GPU that of the kernels launched."""
        us = sum(time for _, time in self.kernels_of(event)) if self.on_gpu else event.time_range.elapsed_us()
        return float(us) / 1e3

    def idle_ms(self) -> float:
        """Milliseconds of a step in which the GPU computed nothing at all."""
        spans = sorted((e.time_range.start, e.time_range.end) for e in self.kernels)
        idle, end = 0.0, spans[0][0] if spans else 0.0
        for start, stop in spans:
            idle, end = idle + max(0.0, start - end), max(end, stop)
        return idle / 1e3 / len(self.steps)

    def kernels_of(self, event: FunctionEvent) -> Iterator[tuple[str, float]]:
        """The GPU kernels that an event and all below it launched, and their microseconds."""
        if not self._is_range(event):  # a range has a shadow on the GPU, which is no kernel
            for kernel in event.kernels:
                yield kernel.name, kernel.duration
        for child in event.cpu_children:
            yield from self.kernels_of(child)

    def _is_range(self, event: FunctionEvent) -> bool:
        return event.name == STEP or event.name in self.parts


def _operators(event: FunctionEvent) -> Iterator[FunctionEvent]:
    """Our operators below an event, in order, without what they call themselves."""
    for child in sorted(event.cpu_children, key=lambda e: e.time_range.start):
        if child.name.startswith(PREFIX):
            yield child
        else:
            yield from _operators(child)


def insides_of(event: FunctionEvent) -> Iterator[tuple[str, float]]:
    """An event and all below it on the CPU, and their microseconds apart from what is below them."""
    yield event.name, event.self_cpu_time_total
    for child in event.cpu_children:
        yield from insides_of(child)


def table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Lines of columns: the first one to the left, the others to the right; an empty row is an empty line."""
    cells = [list(heads), *map(list, rows)]
    widths = [max(len(row[i]) for row in cells if len(row) > i) for i in range(len(heads))]
    return [
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=False))
        ).rstrip()
        for row in cells
    ]


def about(
    machine: Machine | None, config: ResolvedConfig, kernels: Kernels | None, ceilings: Ceilings | None
) -> dict[str, Any]:
    """What was measured where, for JSON."""
    workload = {
        name: getattr(config, name) for name in ("input_nc", "output_nc", "crop_size", "batch_size", "precision")
    }
    return {
        "machine": None if machine is None else asdict(machine),
        "networks": {"model": config.model, **registry.find(config.model).own_options(config), **workload},
        "convolutions": None if kernels is None else asdict(kernels),
        "ceilings": None if ceilings is None else asdict(ceilings),
    }
