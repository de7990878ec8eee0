"""Two ways to do the same work, timed in turn, so that a machine that slows down slows both."""

import os
import statistics
import time
from collections.abc import Callable
from typing import Any

Call = Callable[[], object]


def alternate(benchmark: Any, eager: Call, ours: Call, *, rounds: int) -> None:
    """Time ours with pytest-benchmark and eager before each round of it; extra_info gets both."""
    load = os.getloadavg()[0]  # before we are it ourselves
    for call in (eager, ours):
        call()
    eager_seconds: list[float] = []
    benchmark.pedantic(ours, setup=lambda: eager_seconds.append(seconds(eager)), rounds=rounds)
    eager_ms = statistics.median(eager_seconds) * 1e3
    ours_ms = statistics.median(benchmark.stats.stats.data) * 1e3
    benchmark.extra_info |= {"eager_ms": eager_ms, "ours_ms": ours_ms, "speed_up": eager_ms / ours_ms}
    benchmark.extra_info |= {"eager_quartiles_ms": _quartiles(eager_seconds), "load_average": load}
    benchmark.extra_info["ours_quartiles_ms"] = _quartiles(benchmark.stats.stats.data)


def _quartiles(samples: list[float]) -> list[float]:
    first, _, third = statistics.quantiles(samples, n=4, method="inclusive")
    return [first * 1e3, third * 1e3]


def seconds(call: Call) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start
