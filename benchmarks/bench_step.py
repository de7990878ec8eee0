"""The training step of unet_256 and the 70x70 PatchGAN at 256 px, by every provider in turn."""

import pytest
from harness.providers import BATCHES
from harness.team import Team


@pytest.mark.parametrize("batch_size", BATCHES)
def bench_step(benchmark, team: Team, batch_size: int):
    team.compare(benchmark, "step", batch_size)
