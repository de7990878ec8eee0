"""Throughput of an epoch, data included, by each engine: unet_256 at 256 px."""

import statistics
from pathlib import Path

import pytest
import torch

from fastp2p.config import TrainConfig
from fastp2p.data import PairDataset, PairFormat, train_crops
from fastp2p.data.pairs import Pair
from fastp2p.device import best_precision
from fastp2p.state import TrainState

FACADES = 400  # pairs in an epoch


@pytest.mark.parametrize("batch_size", [1, 4])
@pytest.mark.parametrize("engine", ["reference", "fused"])
def bench_epoch(benchmark, engine: str, batch_size: int):
    """A round is one batch; extra_info extrapolates to facades' 400 pairs."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    config = TrainConfig(data="facades", batch_size=batch_size, engine=engine)
    config = config.resolve(device.type, best_precision(device))
    state = TrainState.new(config, device, "")
    pairs = torch.randint(0, 256, (64, 286, 286, 6), dtype=torch.uint8)
    dataset = PairDataset([Pair(str(i), Path()) for i in range(len(pairs))], PairFormat("AtoB", 286), pairs)
    batches = train_crops(dataset, seed=0, epoch=1, batch_size=batch_size, crop_size=256, flip=True)

    step = state.training_step(config)

    def timed() -> None:
        losses = step(next(batches))
        float(losses.loss_G_L1)  # waits for the device

    benchmark.pedantic(timed, rounds=8, warmup_rounds=2)
    seconds = statistics.median(benchmark.stats.stats.data) / batch_size
    benchmark.extra_info["img_per_sec"] = 1 / seconds
    benchmark.extra_info["s_per_epoch_of_400"] = FACADES * seconds
