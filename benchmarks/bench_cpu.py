"""Each part of a step on the CPU: eager float32 as upstream computes it, and fastp2p's operators, in turn.

What pytest-benchmark times is ours; the table after it has both, and what of the machine's copy bandwidth ours reaches.
"""

import os
import statistics
import time

import pytest
import torch
from cpu_parts import Part, parts

from fastp2p import ops

ROUNDS = 7
NAMES = [name for name, _ in parts(1, torch.float32)]
COPIED_BYTES = 2**28  # far more than a cache holds

pytestmark = [
    pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU: make gpu-check times those"),
    pytest.mark.skipif(ops.served_by("adam", "cpu") != "C++", reason="C++ does not serve the CPU: see fastp2p info"),
]


@pytest.fixture(scope="module")
def copy_gb_per_sec() -> float:
    """Of tensors that no cache holds, read and written bytes counted."""
    source, target = torch.ones(COPIED_BYTES // 4), torch.ones(COPIED_BYTES // 4)
    return 2 * COPIED_BYTES / min(_seconds(lambda: target.copy_(source)) for _ in range(9)) / 1e9


@pytest.mark.parametrize("batch_size", [1, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", NAMES)
def bench_part(benchmark, copy_gb_per_sec: float, name: str, dtype: torch.dtype, batch_size: int):
    if name.startswith("adam") and batch_size > 1:
        pytest.skip("does not depend on the batch")
    part = dict(parts(batch_size, dtype))[name]()
    eager = alternate(benchmark, part)
    ours = statistics.median(benchmark.stats.stats.data)
    benchmark.extra_info |= {"part": name, "batch": batch_size, "dtype": str(dtype).removeprefix("torch.")}
    benchmark.extra_info |= {"eager_ms": eager * 1e3, "ours_ms": ours * 1e3, "speed_up": eager / ours}
    if part.n_bytes:
        benchmark.extra_info["gb_per_sec"] = part.n_bytes / ours / 1e9
        benchmark.extra_info["of_copy_bandwidth"] = part.n_bytes / ours / 1e9 / copy_gb_per_sec
    benchmark.extra_info["load_average"] = os.getloadavg()[0]


def alternate(benchmark, part: Part) -> float:
    """Time ours with the benchmark and eager before each round of it; eager's median, in seconds."""
    for call in (part.eager, part.ours):
        call()
    eager: list[float] = []
    benchmark.pedantic(part.ours, setup=lambda: eager.append(_seconds(part.eager)), rounds=ROUNDS)
    return statistics.median(eager)


def _seconds(call) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start
