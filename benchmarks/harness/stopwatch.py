"""How time is taken: on a CPU by the wall clock, on a GPU by events on its stream; and what is told of many times."""

import statistics
import time
from collections.abc import Callable, Sequence

import torch

HIDING_CYCLES = 2_000_000  # about a millisecond: the GPU sleeps while the host launches


def elapsed_ms(run: Callable[[], object], device: torch.device, *, calls: int = 1, hide_launch: bool = False) -> float:
    """Milliseconds of so many calls, one after the other, to the end of all that they launch on the current stream.

    Args:
        run: called here.
        device: where it computes.
        calls: how many.
        hide_launch: a GPU first sleeps for as long as the host may need, so that its time alone counts.
    """
    if device.type == "cpu":
        began = time.perf_counter()
        for _ in range(calls):
            run()
        return (time.perf_counter() - began) * 1e3
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    if hide_launch:
        torch.cuda._sleep(HIDING_CYCLES)
    begin.record()
    for _ in range(calls):
        run()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end))


def quartiles(samples: Sequence[float]) -> tuple[float, float, float]:
    """The first one, the median and the third one; between two samples in proportion."""
    if len(samples) == 1:
        return samples[0], samples[0], samples[0]
    first, median, third = statistics.quantiles(samples, n=4, method="inclusive")
    return first, median, third
