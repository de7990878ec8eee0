"""The time of a call: on a CUDA GPU by events around replays of a graph of calls, on a CPU by the wall clock."""

import itertools
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

COLD_BYTES = 128_000_000  # what consecutive calls must touch so that none finds its inputs in a cache of 60 MB or less
MOST_SETS = 256  # so sets of 0.5 MB or more are timed cold; less would take longer to launch than it is worth
BATCH_MS = 0.5  # of calls between two events, whose own resolution is a thousandth of that
CPU_SAMPLES = 3

Call = Callable[[], object]


@dataclass(frozen=True)
class Timing:
    """Milliseconds a call."""

    ms: float  # the median
    first_quartile: float
    third_quartile: float
    n: int  # samples
    calls: int  # in each sample, one after the other
    method: str  # "graph", "stream" (with the time of launching) or "cpu"


def input_sets(input_bytes: int, device: torch.device) -> int:
    """How many sets of inputs of so many bytes calls must go through in turn to find each cold.

    One set, which the cache may then hold, where that would take more than MOST_SETS, and on a CPU.
    """
    sets = -(-COLD_BYTES // input_bytes)
    return sets if sets <= MOST_SETS and device.type == "cuda" else 1


def measure(calls: list[Call], device: torch.device, *, capturable: bool = True, seconds: float = 0.15) -> Timing:
    """Time calls that do the same on different inputs, in turn.

    Args:
        calls: one per set of inputs; each is called once beforehand, so compiling and choosing is done by then.
        device: where they run. CUDA calls run on the current stream, which must not be the default one.
        capturable: a CUDA graph can hold them; otherwise the time to launch them is measured, too.
        seconds: to spend on samples, of which there are at least 5 and at most 50.
    """
    if device.type == "cpu":
        return _measure_on_cpu(calls)
    for call in calls:
        call()
    once = _elapsed(lambda: _run(calls, 1), 1)[0]
    rounds = max(1, min(50, round(BATCH_MS / once)))
    run: Call = partial(_run, calls, rounds)
    if capturable:
        graph = torch.cuda.CUDAGraph()
        stream = torch.cuda.current_stream()
        # Autograd and inductor have threads of their own, of which a capture need know nothing
        with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
            run()
        run = graph.replay
    run()
    sample = _elapsed(run, 1)[0]
    samples = _elapsed(run, max(5, min(50, round(seconds * 1000 / sample))))
    n_calls = rounds * len(calls)
    return _timing([sample / n_calls for sample in samples], n_calls, "graph" if capturable else "stream")


def _run(calls: list[Call], rounds: int) -> None:
    for _ in range(rounds):
        for call in calls:
            call()


def _elapsed(run: Call, n: int) -> list[float]:
    """Milliseconds of each of n runs on the current stream."""
    events = [torch.cuda.Event(enable_timing=True) for _ in range(n + 1)]
    torch.cuda.synchronize()
    events[0].record()
    for event in events[1:]:
        run()
        event.record()
    torch.cuda.synchronize()
    return [max(start.elapsed_time(end), 1e-3) for start, end in itertools.pairwise(events)]


def _measure_on_cpu(calls: list[Call]) -> Timing:
    _run(calls, 1)
    samples = []
    for _ in range(CPU_SAMPLES):
        start = time.perf_counter()
        _run(calls, 1)
        samples.append((time.perf_counter() - start) * 1000 / len(calls))
    return _timing(samples, len(calls), "cpu")


def _timing(samples: list[float], calls: int, method: str) -> Timing:
    first, median, third = statistics.quantiles(samples, n=4, method="inclusive")
    return Timing(median, first, third, len(samples), calls, method)
