"""Throughput of training with its data: reading, cropping, copying to the device, and the step."""

from pathlib import Path

import pytest
from harness.epochs import PAIRS
from harness.providers import BATCHES
from harness.team import Team


@pytest.mark.parametrize("batch_size", BATCHES)
def bench_epoch(benchmark, team: Team, data: Path, pytestconfig: pytest.Config, batch_size: int):
    direction = pytestconfig.getoption("direction")
    team.compare(benchmark, "epoch", batch_size, images=PAIRS, data=str(data), direction=direction)
