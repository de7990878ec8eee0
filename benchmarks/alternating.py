"""Two ways to do the same work, timed in turn, so that a machine that slows down slows both."""

import os
import statistics
import time
from collections.abc import Callable
from typing import Any

Call = Callable[[], object]


def alternate(benchmark: Any, eager: Call, ours: Call, *, rounds: int) -> None:
    """Time ours with pytest-benchmark and eager before each round of it; what both took goes into extra_info."""
    for call in (eager, ours):
        call()
    eager_seconds: list[float] = []
    benchmark.pedantic(ours, setup=lambda: eager_seconds.append(seconds(eager)), rounds=rounds)
    eager_ms = statistics.median(eager_seconds) * 1e3
    ours_ms = statistics.median(benchmark.stats.stats.data) * 1e3
    benchmark.extra_info |= {"eager_ms": eager_ms, "ours_ms": ours_ms, "speed_up": eager_ms / ours_ms}
    benchmark.extra_info["load_average"] = os.getloadavg()[0]


def seconds(call: Call) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start
