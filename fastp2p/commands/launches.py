"""fastp2p launches: every kernel that a training step launches on a GPU, and which of them wait for which."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from fastp2p.commands.measure import about, describe, table
from fastp2p.config import ResolvedConfig, RunConfig
from fastp2p.count.launches import MAIN, Launch, LaunchCount, check_triton, count_launches, h100
from fastp2p.errors import InputError
from fastp2p.train.state import TrainState

NAME = "H100"
SUM_HEADS = ("nodes", "main chain", "beside it", "programs", "serial", "merges", "MB", "GFLOP")
HEADS = ("programs", "serial", "merges", "MB", "GFLOP", "chain", "depth")


@dataclass(frozen=True)
class StepLaunches:
    """The launches of a step on a GPU that need not be there."""

    config: ResolvedConfig
    target: Any  # a fastp2p.kernels.ahead.Target
    launches: list[Launch]

    @property
    def count(self) -> LaunchCount:
        """The step's totals."""
        return LaunchCount.of(self.launches)

    def as_dict(self) -> dict[str, Any]:
        """For JSON: each launch, and the totals."""
        return {
            "networks": about(None, self.config, None, None)["networks"],
            "target": {"name": NAME} | asdict(self.target),
            "convolutions": "by rule",
            "launches": [asdict(launch) for launch in self.launches],
            "totals": asdict(self.count),
        }

    def table(self, *, summary: bool = False) -> str:
        """To read: every launch in order, the sums by part and by kernel, the totals.

        Args:
            summary: leave out the launches themselves.
        """
        lines = self._heading()
        if not summary:
            lines += ["", *table(("launches, in order", *HEADS), self._rows())]
        for title, key in (("part", _part), ("kernel", _kernel)):
            lines += ["", *table((title, *SUM_HEADS), self._sums(key))]
        return "\n".join([*lines, "", *self._totals()])

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
            yield [label, *told, launch.chain, str(launch.depth)]

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


def count_step_launches(config: RunConfig) -> StepLaunches:
    """Count the launches of a training step as an H100 would have them; nothing is run, and memory is not taken.

    Args:
        config: its networks, sizes, batch size and precision; auto is bf16. The device is not looked at.

    Raises:
        InputError: where Triton is not installed, on another engine than fused, or a precision that Triton leaves to
            PyTorch.
    """
    check_triton()
    if config.engine != "fused":
        raise InputError(
            f"engine: got {config.engine}, whose launches autograd makes; expected fused; fastp2p profile on a GPU "
            "shows the kernels of layers"
        )
    resolved = config.resolve("cuda", "bf16")
    meta = torch.device("meta")
    with meta:
        step = TrainState.new(resolved, meta, fingerprint="").engine_step(resolved)
    return StepLaunches(resolved, h100(), count_launches(step, config.batch_size))
