"""A benchmark's epochs are the trainer's steps, and a worker can look at their losses."""

from pathlib import Path

import pytest
import torch

pytest.importorskip("pytest_benchmark", reason="needs pytest-benchmark")

from harness.epochs import fused_steps, write_builtin_pairs
from harness.providers import TINY, providers

CPU = torch.device("cpu")


@pytest.mark.parametrize("engine", ["fused", "layers"])
def test_a_step_gives_its_losses(tmp_path: Path, engine: str):
    write_builtin_pairs(tmp_path / "train", side=36)
    provider = next(p for p in providers(CPU, quick=True)[0] if p.ours and p.engine == engine)
    losses = next(fused_steps(provider, TINY, CPU, 2, tmp_path, "AtoB"))
    assert losses._fields[0] == "loss_G_GAN"
    assert all(bool(loss.isfinite()) for loss in losses)
