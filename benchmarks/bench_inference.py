"""The generator alone, in eval mode, by every provider in turn: unet_256 at 256 px."""

import pytest
from harness.providers import BATCHES
from harness.team import Team


@pytest.mark.parametrize("batch_size", BATCHES)
def bench_inference(benchmark, team: Team, batch_size: int):
    team.compare(benchmark, "inference", batch_size)
