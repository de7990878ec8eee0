"""The whole training step: the reference as upstream computes it (eager float32, NCHW, single-tensor Adam), and the
fused engine, in turn. unet_256 and the 70x70 PatchGAN at 256 px.
"""

import pytest
import torch
from alternating import alternate

from fastp2p.engine import FusedStep
from fastp2p.losses import GANLoss
from fastp2p.networks import PatchDiscriminator, UnetGenerator, init_weights
from fastp2p.reference import train_step

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(), reason="times with the wall clock, for machines without a GPU"
)
ROUNDS = 9


@pytest.mark.parametrize("batch_size", [1, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def bench_step(benchmark, dtype: torch.dtype, batch_size: int):
    """A round is one step of each."""
    sets = []
    for _ in range(2):
        torch.manual_seed(0)
        nets = [UnetGenerator(), PatchDiscriminator()]
        for net in nets:
            init_weights(net)
        options = {"lr": 2e-4, "betas": (0.5, 0.999), "foreach": False}
        sets.append((*nets, *(torch.optim.Adam(net.parameters(), **options) for net in nets)))
    real_A, real_B = torch.rand(2, batch_size, 3, 256, 256) * 2 - 1
    fused = FusedStep(*sets[1], size=(256, 256), dtype=dtype)

    def eager() -> float:
        return float(train_step(*sets[0], real_A, real_B, gan_loss=GANLoss(), lambda_L1=100.0).loss_G_L1)

    def ours() -> float:
        return float(fused(real_A, real_B).loss_G_L1)

    # The same first step: dropout aside, which draws other masks
    assert ours() == pytest.approx(eager(), rel=0.05)
    benchmark.extra_info |= {"part": "training step", "batch": batch_size, "dtype": str(dtype).removeprefix("torch.")}
    alternate(benchmark, eager, ours, rounds=ROUNDS)
    benchmark.extra_info["img_per_sec"] = batch_size * 1e3 / benchmark.extra_info["ours_ms"]
