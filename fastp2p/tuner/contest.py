"""The tuner: each convolution of a training step is timed with every kernel that can compute it, on this machine.

A candidate whose result is wrong is dropped, and told. The rule's choice is kept unless another is faster by more than
MARGIN, so that noise flips nothing. On a CPU the candidates take turns through many problems' operands, as a step does,
so that none finds its weights in the cache (in a hot loop oneDNN's copies of the weights would look cheaper than they
are), and the least time counts: what other processes take only ever adds. On a GPU each is a CUDA graph over as many
sets of operands as no cache holds, and the median counts.
"""

import importlib
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from fastp2p.engine.graph import Graphed, joined
from fastp2p.ops import kernel_choices, library
from fastp2p.ops.kernel_choices import Choice, Measured, Place, Table, name_of
from fastp2p.tuner import ahead
from fastp2p.tuner.operations import Args, Noise, Operation, Trial

MARGIN = 0.05  # share of the rule's time
COLD_BYTES = 128_000_000  # operands between two uses of one: more than caches hold
MOST_SETS = 16  # copies of a problem's operands on a GPU; smaller ones find theirs in its cache, as in a step
FEWEST_ROUNDS, MOST_ROUNDS, SECONDS = 3, 25, 0.4  # for a group of problems; within the rounds so many seconds
HOPELESS = 2.0  # a candidate so many times slower than the best in its first PRELIMINARY turns gets no other one
PRELIMINARY = 2
LONG_MS = 5.0  # where a call takes so long, the first one tells enough, although it does more than the work
GPU_ROUNDS = 9
GRAPH_MS = 0.5  # a graph's calls take so long: events resolve a thousandth of that

Run = Callable[[Args], Any]
Report = Callable[[str], object]


@dataclass
class Contest:
    """An operation's candidates that compute it, and their times."""

    operation: Operation
    rule: str  # name of the rule's choice
    choices: dict[str, Choice]  # by name
    typical: Callable[[list[float]], float]  # what stands for a candidate's times
    first: dict[str, float] = field(default_factory=dict)  # milliseconds of each candidate's first call of all
    samples: dict[str, list[float]] = field(default_factory=dict)  # and of those that count

    def add(self, name: str, ms: float) -> None:
        self.samples.setdefault(name, []).append(ms)

    def hopeful(self, name: str) -> bool:
        """Whether a candidate is worth another turn."""
        if name == self.rule and len(self.samples.get(name, [])) < PRELIMINARY:
            return True  # a hiccup in one call must not take the rule's choice out of the contest
        if name not in self.samples:
            return not self.first or self.first[name] <= max(LONG_MS, 2 * HOPELESS * min(self.first.values()))
        if len(self.samples[name]) < PRELIMINARY:
            return True
        best = min(min(samples[:PRELIMINARY]) for samples in self.samples.values())
        return min(self.samples[name][:PRELIMINARY]) <= HOPELESS * best

    def winner(self) -> Measured:
        """The rule's choice, unless it was dropped or another one is faster by more than MARGIN."""
        ms = self.first | {name: self.typical(samples) for name, samples in self.samples.items()}
        best = min(ms, key=lambda name: ms[name])
        if self.rule in ms and ms[best] > (1 - MARGIN) * ms[self.rule]:
            best = self.rule
        return Measured(self.choices[best], self.rule, {name: round(t, 4) for name, t in ms.items()})


def why_not(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why there is nothing to choose from on this device; None where there is."""
    served = library.served_by("conv", device.type)
    if served == "C++":
        return None
    if served == "Triton":
        return "plain PyTorch computes in float64" if dtype == torch.float64 else None
    return f"the convolutions are served by: {served}"


def tune(operations: Sequence[Operation], place: Place, *, report: Report, tick: Callable[[], object]) -> Table:
    """Measure, and keep in the place's file what was measured, also when it is interrupted.

    Args:
        operations: of a problem each.
        place: this device.
        report: takes a line about each candidate that is dropped.
        tick: called when an operation is done.

    Returns:
        The choices; an operation without a candidate that computes it is left out.
    """
    measured: Table = {}
    measure = _measure_on_cpu if place.device_type == "cpu" else _measure_on_gpu
    try:
        with torch._C._AutoDispatchBelowAutograd():  # as the step calls them
            for contest in measure(operations, place, report):
                if contest.samples:
                    measured[contest.operation.problem] = contest.winner()
                tick()
    finally:
        if measured:
            kernel_choices.add_to_cache(place, measured)
    return measured


def run_with(operation: Operation, choice: Choice, device: torch.device) -> Run:
    """What computes an operation by a choice."""
    name = operation.operator
    if device.type != "cpu":
        return lambda args: library.launch(name, choice, args)
    operator, force = getattr(torch.ops.fastp2p, name), _extension().force_convolution

    def run(args: Args) -> Any:
        force(choice)
        try:
            return operator(*args)
        finally:
            force("auto")

    return run


def candidates_of(operation: Operation, args: Args) -> list[Choice]:
    """What is worth timing, the rule's choice first."""
    p = operation.problem
    if not args[0].is_cuda:
        rule = _extension().convolution_by_rule(p.operator, str(p.dtype).removeprefix("torch."), *p[2:])
        return [rule, *(choice for choice in kernel_choices.CPU_CHOICES if choice != rule)]
    return ahead.candidates_of(p.operator, args)


def _extension() -> Any:
    return importlib.import_module("fastp2p._C")


def _refusals(device: torch.device) -> tuple[type[Exception], ...]:
    """What a candidate raises that cannot compute here; anything else is a mistake of ours."""
    if device.type == "cpu":
        return (RuntimeError,)
    return RuntimeError, *importlib.import_module("fastp2p.kernels.candidates").CANNOT


def _contest(trial: Trial, device: torch.device, report: Report) -> tuple[Contest, dict[str, Run]]:
    """The candidates that compute what the reference does; each has been called by then."""
    operation = trial.operation
    choices = {name_of(choice): choice for choice in candidates_of(operation, trial.args)}
    typical = min if device.type == "cpu" else statistics.median
    contest, runs = Contest(operation, next(iter(choices)), choices, typical), {}
    for name, choice in choices.items():
        run = run_with(operation, choice, device)
        try:
            error = trial.error(run if device.type == "cuda" else partial(_timed, run, contest.first, name))
        except torch.AcceleratorError:  # the GPU is lost to this process
            raise
        except _refusals(device) as fault:  # such as a tile that this GPU has no memory for
            contest.first.pop(name, None)
            report(f"{operation.name} by {name} is left out: it fails with {fault!r:.200}")
            continue
        if error <= 1:
            runs[name] = run
        else:
            contest.first.pop(name, None)
            report(f"{operation.name} by {name} is left out: its result is off by {error:.3g} tolerances")
    trial.forget_expected()
    if not runs:
        report(f"{operation.name}: no candidate computes what the reference does; it goes by rule")
    return contest, runs


def _measure_on_cpu(operations: Sequence[Operation], place: Place, report: Report) -> Iterator[Contest]:
    """By the wall clock, in groups of operations that take turns."""
    device = torch.device("cpu")
    for group in _groups(operations):
        noise = Noise(device)
        trials = [Trial(operation, noise) for operation in group]
        contests = [_contest(trial, device, report) for trial in trials]
        began = time.perf_counter()
        for turn in range(MOST_ROUNDS):
            _take_turns(trials, contests)
            if turn + 1 >= FEWEST_ROUNDS and time.perf_counter() - began > SECONDS:
                break
        yield from (contest for contest, _ in contests)


def _groups(operations: Sequence[Operation]) -> Iterator[list[Operation]]:
    """As many as there can be, whose operands take COLD_BYTES each, or one."""
    total = sum(operation.n_bytes for operation in operations)
    most = total / max(1, total // COLD_BYTES)  # bytes of a group
    group: list[Operation] = []
    n_bytes = 0
    for number, operation in enumerate(operations, 1):
        group.append(operation)
        n_bytes += operation.n_bytes
        if n_bytes >= most or number == len(operations):
            yield group
            group, n_bytes = [], 0


def _timed(run: Run, milliseconds: dict[str, float], name: str, args: Args) -> Any:
    began = time.perf_counter()
    result = run(args)
    milliseconds[name] = (time.perf_counter() - began) * 1e3
    return result


def _take_turns(trials: list[Trial], contests: list[tuple[Contest, dict[str, Run]]]) -> None:
    """One sample of each candidate, all operations by one before any by the next."""
    for turn in range(max(len(runs) for _, runs in contests)):
        for trial, (contest, runs) in zip(trials, contests, strict=True):
            for name, run in list(runs.items())[turn : turn + 1]:
                if contest.hopeful(name):
                    began = time.perf_counter()
                    run(trial.args)
                    contest.add(name, (time.perf_counter() - began) * 1e3)


def _measure_on_gpu(operations: Sequence[Operation], place: Place, report: Report) -> Iterator[Contest]:
    """By events around replays of graphs, which take turns."""
    device = torch.device("cuda", place.number)
    noise = Noise(device)
    stream = torch.cuda.Stream(device)  # a graph cannot be captured on the default one
    for operation in operations:
        with torch.cuda.device(device), joined(stream):
            sets = min(MOST_SETS, -(-COLD_BYTES // operation.n_bytes))
            trials = [Trial(operation, noise) for _ in range(sets)]
            contest, runs = _contest(trials[0], device, report)
            graphs = {name: _capture(run, trials, stream) for name, run in runs.items()}
            for _ in range(GPU_ROUNDS):
                for name, (graphed, calls) in graphs.items():
                    if contest.hopeful(name):
                        contest.add(name, _elapsed(graphed) / calls)
        yield contest
    torch.cuda.empty_cache()  # the graphs' memory, for the step


def _capture(run: Run, trials: list[Trial], stream: torch.cuda.Stream) -> tuple[Graphed[None], int]:
    """A graph of calls in turn through the sets of operands, and how many there are."""

    def through(rounds: int) -> None:
        for _ in range(rounds):
            for trial in trials:
                run(trial.args)

    once = partial(through, 1)
    once()
    rounds = max(1, min(50, round(GRAPH_MS / _elapsed(once))))
    graphed = Graphed(partial(through, rounds), stream=stream, warm_up=0)
    graphed()
    return graphed, rounds * len(trials)


def _elapsed(run: Callable[[], object]) -> float:
    """Milliseconds on the current stream."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    run()
    end.record()
    end.synchronize()
    ms: float = start.elapsed_time(end)
    return max(ms, 1e-3)
