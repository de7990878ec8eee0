"""Each part of a step on the CPU: eager float32 as upstream computes it, and fastp2p's operators, in turn.

What pytest-benchmark times is ours; the table after it has both, and what of the machine's copy bandwidth ours reaches.
"""

import pytest
import torch
from alternating import alternate, seconds
from cpu_parts import parts

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
    return 2 * COPIED_BYTES / min(seconds(lambda: target.copy_(source)) for _ in range(9)) / 1e9


@pytest.mark.parametrize("batch_size", [1, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", NAMES)
def bench_part(benchmark, copy_gb_per_sec: float, name: str, dtype: torch.dtype, batch_size: int):
    if name.startswith("adam") and batch_size > 1:
        pytest.skip("does not depend on the batch")
    part = dict(parts(batch_size, dtype))[name]()
    benchmark.extra_info |= {"part": name, "batch": batch_size, "dtype": str(dtype).removeprefix("torch.")}
    alternate(benchmark, part.eager, part.ours, rounds=ROUNDS)
    if part.n_bytes:
        gb_per_sec = part.n_bytes / benchmark.extra_info["ours_ms"] / 1e6
        benchmark.extra_info |= {"gb_per_sec": gb_per_sec, "of_copy_bandwidth": gb_per_sec / copy_gb_per_sec}
