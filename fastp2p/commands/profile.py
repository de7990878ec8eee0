"""fastp2p profile: where a training step's time goes, part by part and kernel by kernel, and its timeline as a file."""

import tempfile
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch.autograd.profiler_util import FunctionEvent

from fastp2p.commands.measure import (
    PREFIX,
    Kernels,
    Machine,
    Profiled,
    Workload,
    about,
    check_steps,
    heading,
    insides_of,
    table,
)
from fastp2p.config import ResolvedConfig, RunConfig
from fastp2p.count.ceilings import Ceilings
from fastp2p.count.cost import Cost, Sum
from fastp2p.errors import InputError
from fastp2p.files import is_there, write_atomically

SMALL = 0.002  # share of a step: what takes less stands in one line, as others
LONGEST_NAME = 60  # letters of a kernel's name; a template's has hundreds
SUFFIXES = (".json", ".json.gz")


@dataclass(frozen=True)
class Share:
    """Where some of a step's time goes: means over the profiled steps."""

    name: str
    calls: float  # in a step
    ms: float  # in a step
    cost: Sum | None = None  # the work that it must do; None where nobody counts it
    insides: list["Share"] = field(default_factory=list)  # kernels; on a CPU operators of ATen, each without its own


@dataclass(frozen=True)
class Profile:
    """A profiled training step."""

    machine: Machine
    config: ResolvedConfig
    kernels: Kernels
    ceilings: Ceilings
    on_gpu: bool
    n_steps: int
    ms: float  # a step's; on a GPU its kernels'
    idle_ms: float | None  # the part of a step in which a GPU computed nothing
    parts: list[Share]
    operators: list[Share]
    rest: Share  # what belongs to no operator
    trace: Path

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        result = about(self.machine, self.config, self.kernels, self.ceilings)
        result |= {"steps": self.n_steps, "ms_per_step": self.ms, "idle_ms_per_step": self.idle_ms}
        result |= {"parts": [*map(asdict, self.parts)], "operators": [*map(asdict, self.operators)]}
        return result | {"rest": asdict(self.rest), "trace": str(self.trace)}

    def table(self) -> str:
        """To read."""
        what = "kernels of a step" if self.on_gpu else "a step under the profiler"
        lines = [
            *heading(self.machine, self.config, self.kernels, self.ceilings),
            f"{what}: {self.ms:.2f} ms, mean of {self.n_steps}; % of limit: least time by the ceilings / time taken",
        ]
        if self.on_gpu:
            lines.append("profiled without the CUDA graph that training replays, so launch gaps are not training's")
        rates = ("GFLOP", "MB", "TFLOP/s", "GB/s", "% of limit", "bound by")
        outside = Share("outside of the parts", 0, self.ms - sum(part.ms for part in self.parts))
        rows = [self._row(part) for part in (*self.parts, outside)]
        lines += ["", *table(("part of the step", "calls", "ms", "share", *rates), rows)]

        inside = "its kernels" if self.on_gpu else "what it calls, each without what that calls"
        rows = []
        for operator in (*self.operators, self.rest):
            rows.append(self._row(operator))
            rows += [self._row(share, "  ") for share in self._shown(operator.insides)]
        lines += ["", *table((f"operator, and {inside}", "calls", "ms", "share", *rates), rows)]
        if self.idle_ms is not None:
            lines.append(f"the GPU is idle for {self.idle_ms:.2f} ms a step; kernels of parallel branches overlap")
        lines += ["", f"timeline of {self.n_steps} steps: {self.trace}; open it at https://ui.perfetto.dev"]
        return "\n".join(lines)

    def _row(self, share: Share, indent: str = "") -> list[str]:
        name = share.name if len(share.name) <= LONGEST_NAME else share.name[: LONGEST_NAME - 3] + "..."
        cells = [
            indent + name,
            f"{share.calls:.4g}" if share.calls else "",
            f"{share.ms:.3f}",
            f"{share.ms / self.ms:.1%}",
        ]
        if share.cost is None or not share.ms:
            return cells
        cost, seconds = share.cost, share.ms / 1e3
        cells += [f"{cost.flop / 1e9:.2f}", f"{cost.traffic.total / 1e6:.1f}", f"{cost.flop / seconds / 1e12:.3f}"]
        cells += [f"{cost.traffic.total / seconds / 1e9:.1f}", f"{cost.floor / seconds:.0%}", cost.bound_by]
        return cells

    def _shown(self, insides: Sequence[Share]) -> Iterator[Share]:
        """The longest first; small ones together."""
        small = [share for share in insides if share.ms < SMALL * self.ms]
        large = [share for share in insides if share.ms >= SMALL * self.ms]
        yield from sorted(large, key=lambda share: -share.ms)
        if large and small:
            yield Share("others", sum(s.calls for s in small), sum(s.ms for s in small))


def profile_step(
    config: RunConfig, *, trace: Path = Path("fastp2p-trace.json.gz"), steps: int = 5, overwrite: bool = False
) -> Profile:
    """Run some training steps under torch.profiler, and write their timeline.

    Args:
        config: its networks, sizes, batch size, precision and device.
        trace: file for the timeline, of Chrome's trace format.
        steps: how many are profiled, after others to warm up.
        overwrite: replace `trace`.

    Raises:
        InputError: when the configuration does not fit this machine, or the file is there already.
        WriteError: when it cannot be written.
    """
    check_steps(steps)
    _check_trace(trace, overwrite)
    workload = Workload(config)
    machine = Machine.here(workload.device)
    ceilings = workload.ceilings()
    workload.warm_up()
    profiled = workload.profiled(steps)
    ceilings = ceilings.or_higher(workload.ceilings())  # on a shared machine they change while the steps run
    with tempfile.TemporaryDirectory() as folder:
        made = Path(folder) / trace.name
        profiled.profiler.export_chrome_trace(str(made))
        write_atomically(trace, made.read_bytes())
    return Profile(
        machine=machine,
        config=workload.config,
        kernels=workload.kernels(),
        ceilings=ceilings,
        on_gpu=profiled.on_gpu,
        n_steps=steps,
        ms=sum(map(profiled.ms, profiled.steps)) / steps,
        idle_ms=profiled.idle_ms() if profiled.on_gpu else None,
        parts=_parts(profiled, ceilings),
        operators=_operators(profiled, ceilings),
        rest=_rest(profiled),
        trace=trace,
    )


def _check_trace(trace: Path, overwrite: bool) -> None:
    if not trace.name.endswith(SUFFIXES):
        raise InputError(f"trace: got {trace}, expected a name that ends in {' or '.join(SUFFIXES)}")
    if trace.is_dir() or (is_there(trace) and not overwrite):
        raise InputError(f"trace: {trace} exists; choose another --trace, or add --overwrite")
    if not trace.parent.is_dir():
        raise InputError(f"trace: got {trace}, but there is no folder {trace.parent}; make it first")


def _parts(profiled: Profiled, ceilings: Ceilings) -> list[Share]:
    """The parts of the step, in their order, copies between the operators included."""
    ms: dict[str, float] = defaultdict(float)
    for step in profiled.steps:
        for event in step.cpu_children:
            if event.name in profiled.parts:
                ms[event.name] += profiled.ms(event)
    of_part: dict[str, list[Cost]] = {}
    for cost in profiled.costs:
        of_part.setdefault(cost.call.part, []).append(cost)
    n = len(profiled.steps)
    return [Share(name, len(costs), ms[name] / n, Sum.of(costs, ceilings)) for name, costs in of_part.items()]


def _operators(profiled: Profiled, ceilings: Ceilings) -> list[Share]:
    """Our operators, the longest first, each with what it launches or calls."""
    events: dict[str, list[FunctionEvent]] = {}
    costs: dict[str, list[Cost]] = {}
    for number, cost in enumerate(profiled.costs):
        costs.setdefault(cost.call.operator, []).append(cost)
        events.setdefault(cost.call.operator, []).extend(calls[number] for calls in profiled.calls)
    n = len(profiled.steps)
    shares = []
    for operator, called in events.items():
        ms = sum(map(profiled.ms, called)) / n
        insides = _insides(called, profiled)
        shares.append(Share(operator, len(called) / n, ms, Sum.of(costs[operator], ceilings), insides))
    return sorted(shares, key=lambda share: -share.ms)


def _insides(events: Sequence[FunctionEvent], profiled: Profiled) -> list[Share]:
    calls: dict[str, int] = defaultdict(int)
    us: dict[str, float] = defaultdict(float)
    for event in events:
        for name, time in profiled.kernels_of(event) if profiled.on_gpu else insides_of(event):
            name = "itself" if name.startswith(PREFIX) else name
            calls[name] += 1
            us[name] += time
    n = len(profiled.steps)
    return [Share(name, calls[name] / n, us[name] / n / 1e3) for name in us]


def _rest(profiled: Profiled) -> Share:
    """What is of no operator: copies, on a CPU Python as well."""
    apart = [event for step in profiled.steps for event in _apart(step, profiled.parts)]
    insides = _insides(apart, profiled)
    n = len(profiled.steps)
    claimed = sum(profiled.ms(call) for calls in profiled.calls for call in calls)
    ms = (sum(map(profiled.ms, profiled.steps)) - claimed) / n
    if not profiled.on_gpu:
        insides.append(Share("Python, and the profiler's own work", 0, ms - sum(share.ms for share in insides)))
    return Share("the rest", len(apart) / n, ms, insides=insides)


def _apart(event: FunctionEvent, parts: Sequence[str]) -> Iterator[FunctionEvent]:
    """What a step calls beside our operators."""
    for child in event.cpu_children:
        if child.name in parts:
            yield from _apart(child, parts)
        elif not child.name.startswith(PREFIX):
            yield child
