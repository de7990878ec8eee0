"""augment: one batch of crops from resident 286 px pairs."""

import pytest
import torch
from layers import DEVICE, synchronize

from fastp2p.ops import augment


@pytest.mark.parametrize("batch_size", [1, 4, 16])
def bench_augment(benchmark, batch_size: int):
    pairs = torch.randint(0, 256, (32, 286, 286, 6), dtype=torch.uint8, device=DEVICE)
    index = torch.arange(batch_size, device=DEVICE)
    offset = torch.full((batch_size, 2), 15, device=DEVICE)
    flip = index % 2 == 0

    def timed() -> None:
        augment(pairs, index, offset, flip, crop_size=256, input_nc=3)
        synchronize()

    benchmark.extra_info["bytes"] = batch_size * 256 * 256 * 6 * (1 + 4)  # uint8 read, float32 written
    benchmark(timed)
