"""fastp2p launches: every kernel that a training step launches on a GPU, and which of them wait for which."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from fastp2p.commands.measure import about, describe, table
from fastp2p.config import ResolvedConfig, RunConfig
from fastp2p.count.launches import MAIN, Launch, LaunchCount, check_triton, count_launches, h100
from fastp2p.count.predict import GPUS, PredictedStep, predict_step
from fastp2p.errors import InputError
from fastp2p.train.state import TrainState

NAME = "H100"
SUM_HEADS = ("nodes", "main chain", "beside it", "programs", "serial", "merges", "MB", "GFLOP")
HEADS = ("programs", "serial", "merges", "MB", "GFLOP", "chain", "depth")
HALF = ("bf16", "fp16")  # the precisions whose rates the prediction knows
LARGEST = 5  # launches of the longest path to name


@dataclass(frozen=True)
class StepLaunches:
    """The launches of a step on a GPU that need not be there."""

    config: ResolvedConfig
    target: Any  # a fastp2p.kernels.ahead.Target
    launches: list[Launch]
    predicted: dict[str, PredictedStep] = field(default_factory=dict)  # by the GPU's name; empty: not asked for

    @property
    def count(self) -> LaunchCount:
        """The step's totals."""
        return LaunchCount.of(self.launches)

    def as_dict(self) -> dict[str, Any]:
        """For JSON: each launch, and the totals."""
        told = {
            "networks": about(None, self.config, None, None)["networks"],
            "target": {"name": NAME} | asdict(self.target),
            "convolutions": "by rule",
            "launches": [asdict(launch) for launch in self.launches],
            "totals": asdict(self.count),
        }
        if self.predicted:
            told["predicted"] = {gpu: _step_as_dict(step) for gpu, step in self.predicted.items()}
        return told

    def table(self, *, summary: bool = False) -> str:
        """To read: every launch in order, the sums by part and by kernel, the totals.

        Args:
            summary: leave out the launches themselves.
        """
        lines = self._heading()
        if not summary:
            heads = [*HEADS, *(f"predicted us, {gpu}" for gpu in self.predicted), *["bound by"] * bool(self.predicted)]
            lines += ["", *table(("launches, in order", *heads), self._rows())]
        for title, key in (("part", _part), ("kernel", _kernel)):
            lines += ["", *table((title, *SUM_HEADS), self._sums(key))]
        return "\n".join([*lines, "", *self._totals(), *self._predictions()])

    def _heading(self) -> list[str]:
        target = self.target
        return [
            describe(self.config),
            f"on an {NAME}: {target.processors} processors, compute capability {target.capability / 10:.1f}, "
            f"{target.shared_bytes // 1024} KiB of shared memory; nothing was run",
            "convolutions by the rule, which takes what fastp2p tune has not measured",
        ]

    def _rows(self) -> Iterator[list[str]]:
        """A row for each launch, under one for its part."""
        kernels = max(len(launch.kernel) for launch in self.launches)
        digits, part = len(str(len(self.launches))), None
        for number, launch in enumerate(self.launches, 1):
            if launch.part != part:
                part = launch.part
                yield [_part(launch)]
            label = f"  {number:>{digits}}  {launch.kernel:<{kernels}}  {launch.name}"
            told = [*map(_or_nothing, (launch.programs, launch.iterations, launch.merges)), *_work([launch])]
            times = [step.launches[number - 1] for step in self.predicted.values()]
            told += [launch.chain, str(launch.depth), *(f"{1e6 * one.total:.1f}" for one in times)]
            yield [label, *told, *(one.bound_by for one in times[:1])]

    def _sums(self, key: Callable[[Launch], str]) -> Iterator[list[str]]:
        groups: dict[str, list[Launch]] = {}
        for launch in self.launches:
            groups.setdefault(key(launch), []).append(launch)
        for label, launches in (*groups.items(), ("sum", self.launches)):
            main = sum(launch.chain == MAIN for launch in launches)
            programs = [launch.programs for launch in launches if launch.programs is not None]
            ends = dict.fromkeys((min(programs), max(programs))) if programs else ()
            most = (
                max((n for launch in launches if (n := getattr(launch, name)) is not None), default=None)
                for name in ("iterations", "merges")
            )
            counts = map(str, (len(launches), main, len(launches) - main))
            yield [label, *counts, " to ".join(map(str, ends)), *map(_or_nothing, most), *_work(launches)]

    def _totals(self) -> list[str]:
        count = self.count
        return [
            f"{count.nodes} nodes: {count.main} on the main chain, {count.beside} beside it",
            f"{count.longest} of them are the longest dependent chain",
            "serial: the iterations of a program's loop; merges: those of the last program, for what others left;",
            "MB: each tensor that a launch is given, once;",
            "aten:: kernels are PyTorch's, which tell neither programs nor iterations",
        ]

    def _predictions(self) -> Iterator[str]:
        """The steps' times, and what takes most of them."""
        for gpu, step in self.predicted.items():
            yield ""
            total, path, n_bytes, matrix = (1e3 * t for t in (step.total, step.path, step.bytes, step.matrix))
            yield f"predicted, not measured: {total:.2f} ms a step on an {gpu}, bound by its {step.bound_by}:"
            yield f"  {path:.2f} ms the longest path, of {len(step.on_path)} launches that wait for one another"
            yield f"  {n_bytes:.2f} ms all bytes at the rate of a copy, {matrix:.2f} ms all products"
            terms = ", ".join(f"{name} {1e3 * seconds:.2f}" for name, seconds in step.terms().items())
            yield f"  the path's time, ms: {terms}"
            longest = sorted(step.on_path, key=lambda number: -step.launches[number].total)[:LARGEST]
            names = (
                f"{1 + i} {self.launches[i].name or self.launches[i].kernel} {1e6 * step.launches[i].total:.0f}"
                for i in longest
            )
            yield f"  its longest launches, us: {', '.join(names)}"


def _step_as_dict(step: PredictedStep) -> dict[str, Any]:
    """Seconds, of each launch in order as well."""
    launches = [{"seconds": one.total, "bound_by": one.bound_by} for one in step.launches]
    told = {name: getattr(step, name) for name in ("total", "path", "bytes", "matrix", "bound_by")}
    return told | {"path_by_term": step.terms(), "launches": launches}


def _part(launch: Launch) -> str:
    return launch.part or "the model's step"


def _kernel(launch: Launch) -> str:
    return launch.kernel


def _or_nothing(number: int | None) -> str:
    return "" if number is None else str(number)


def _work(launches: Sequence[Launch]) -> list[str]:
    """Megabytes and GFLOP; nothing where there is no product."""
    flop = sum(launch.flop for launch in launches)
    return [f"{sum(launch.n_bytes for launch in launches) / 1e6:.3f}", f"{flop / 1e9:.3f}" if flop else ""]


def count_step_launches(config: RunConfig, *, predict: bool = False) -> StepLaunches:
    """Count the launches of a training step as an H100 would have them; nothing is run, and memory is not taken.

    Args:
        config: its networks, sizes, batch size and precision; auto is bf16. The device is not looked at.
        predict: how long each should take on an H100 and an H200, too.

    Raises:
        InputError: where Triton is not installed, on another engine than fused, or a precision that Triton leaves to
            PyTorch, or whose times it cannot predict.
    """
    check_triton()
    if config.engine != "fused":
        raise InputError(
            f"engine: got {config.engine}, whose launches autograd makes; expected fused; fastp2p profile on a GPU "
            "shows the kernels of layers"
        )
    resolved = config.resolve("cuda", "bf16")
    if predict and resolved.precision not in HALF:
        raise InputError(
            f"predict: got precision {resolved.precision}, expected one of {', '.join(HALF)}, whose rates are known; "
            "leave --predict out to count alone"
        )
    meta = torch.device("meta")
    with meta:
        step = TrainState.new(resolved, meta, fingerprint="").engine_step(resolved)
    launches = count_launches(step, config.batch_size)
    predicted = {gpu: predict_step(launches, ceilings) for gpu, ceilings in GPUS.items()} if predict else {}
    return StepLaunches(resolved, h100(), launches, predicted)
