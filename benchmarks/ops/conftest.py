"""What the benchmarks of the operators share: how they compare, and what --quick leaves of them."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from harness.calls import compare_calls
from layers import DEVICE

ROUNDS, QUICK_ROUNDS = 9, 5


@pytest.fixture
def compare(benchmark: Any, quick: bool, copy_gb_per_sec: float) -> Callable[..., None]:
    """calls.compare_calls, lacking case, dtype, eager, ours and check."""
    what = "eager PyTorch and fastp2p on the very same operands, in the dtype and layout told"
    settings = {"suite": "operators", "what": what, "device": DEVICE, "copy_gb_per_sec": copy_gb_per_sec}
    return partial(compare_calls, benchmark, rounds=QUICK_ROUNDS if quick else ROUNDS, **settings)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """With --quick the first case of each operator alone."""
    if not config.getoption("quick"):
        return
    first: dict[tuple[Path, str], pytest.Item] = {}
    left_out = []
    for item in items:
        if item.path.parent == Path(__file__).parent and first.setdefault((item.path, item.originalname), item) != item:
            left_out.append(item)
    config.hook.pytest_deselected(items=left_out)
    items[:] = [item for item in items if item not in left_out]
