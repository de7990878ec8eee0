"""Link 4 on real data: training by the fused engine in the best precision ends where the reference in float32 ends."""

import statistics
from pathlib import Path

import pytest
import torch

from fastp2p.config import Engine, Precision
from fastp2p.device import best_precision
from fastp2p.models.pix2pix.model import MODEL as PIX2PIX
from fastp2p.models.pix2pix.options import Pix2PixConfig
from fastp2p.train.loop import train
from fastp2p.train.recorder import read_stats

SEEDS = range(3)


@pytest.mark.slow
def test_facades_end_at_the_same_validation_l1(facades: Path, tmp_path: Path):
    """Labels to photos at 64 px, six epochs of 400 pairs at batch size 1: the two engines' mean L1 on val/ lie no
    farther apart than the reference's own three seeds.

    A run's score is the mean of its last three epochs', since one epoch's jumps about as a GAN's do.
    """

    def score(engine: Engine, precision: Precision, seed: int) -> float:
        config = Pix2PixConfig(
            data=str(facades), direction="BtoA", load_size=72, crop_size=64, netG="unet_64", ngf=16, ndf=16,
            n_epochs=3, n_epochs_decay=3, seed=seed, engine=engine, precision=precision, device="cpu",
            panel_steps=10**6, save_minutes=100, out=tmp_path / f"{engine}-{seed}",
        )  # fmt: skip
        lines = read_stats(train(config) / "stats.jsonl", PIX2PIX)[0]
        return statistics.mean([line["val_L1"] for line in lines if "val_L1" in line][-3:])

    reference = [score("reference", "fp32", seed) for seed in SEEDS]
    precision = best_precision(torch.device("cpu"))  # bf16 where the CPU multiplies in it
    fused = [score("fused", precision, seed) for seed in SEEDS]
    print(f"validation L1, reference float32: {reference}, fused {precision}: {fused}")
    spread = max(reference) - min(reference)
    assert abs(statistics.mean(fused) - statistics.mean(reference)) < spread
    assert max(*reference, *fused) < 0.5, "nothing was learned, so this compared nothing"
