"""patch_loss: value and gradient of the L1 loss of an image batch, against eager PyTorch."""

import pytest
import torch
from layers import DEVICE, synchronize
from torch.nn.functional import l1_loss

from fastp2p.ops import patch_loss


@pytest.mark.parametrize("provider", ["fastp2p", "eager"])
@pytest.mark.parametrize("batch_size", [1, 16])
def bench_patch_loss(benchmark, provider: str, batch_size: int):
    fake_B, real_B = (torch.rand(batch_size, 3, 256, 256, device=DEVICE) for _ in range(2))
    fake_B.requires_grad_()

    def timed() -> None:
        if provider == "fastp2p":
            patch_loss(fake_B.detach(), "l1", target=real_B, weight=100.0)
        else:
            torch.autograd.grad(100.0 * l1_loss(fake_B, real_B), fake_B)
        synchronize()

    benchmark.extra_info["bytes"] = fake_B.numel() * 12  # two read, one written
    benchmark(timed)
