"""Each part of a step on the CPU: eager float32 as upstream computes it, and fastp2p's operators, in turn."""

import pytest
import torch
from cpu_parts import parts
from harness.calls import compare_calls
from harness.providers import PAPER, TINY

from fastp2p import ops
from fastp2p.device import DTYPES, best_precision

CPU = torch.device("cpu")
ROUNDS, QUICK_ROUNDS = 7, 3

pytestmark = [
    pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU: make gpu-first times those"),
    pytest.mark.skipif(ops.served_by("adam", "cpu") != "C++", reason="C++ does not serve the CPU: see fastp2p info"),
]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Every part at two batch sizes, in the CPU's best dtype and in float32; with --quick at one, in the best alone.

    Adam does not depend on the batch.
    """
    best = DTYPES[best_precision(CPU)]
    quick = metafunc.config.getoption("quick")
    for_all = [(dtype, batch) for dtype in dict.fromkeys([best, *([] if quick else [torch.float32])])
               for batch in ([1] if quick else [1, 4])]  # fmt: skip
    names = [name for name, _ in parts(1, best)]
    cases = [(n, d, b) for d, b in for_all for n in names if b == 1 or not n.startswith("adam")]
    ids = [f"{n}-{d}-batch {b}".replace("torch.", "") for n, d, b in cases]
    metafunc.parametrize(("name", "dtype", "batch_size"), cases, ids=ids)


def bench_part(
    benchmark, quick: bool, rehearse: bool, copy_gb_per_sec: float, name: str, dtype: torch.dtype, batch_size: int
):
    part = dict(parts(batch_size, dtype, TINY if rehearse else PAPER))[name]()
    compare_calls(
        benchmark,
        name if name.startswith("adam") else f"{name}, batch {batch_size}",
        suite="parts of a step, CPU",
        what="eager in float32, NCHW, as upstream has it, and fastp2p in the dtype told; every layer of the step once",
        device=CPU,
        dtype=dtype,
        rounds=QUICK_ROUNDS if quick else ROUNDS,
        copy_gb_per_sec=copy_gb_per_sec,
        **vars(part),
    )
