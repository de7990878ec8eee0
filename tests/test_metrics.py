import math

import pytest
import torch

from fastp2p.metrics import evaluate_generator, score
from fastp2p.networks import UnetGenerator


def test_identical_images_are_perfect():
    x = torch.rand(2, 3, 32, 32) * 2 - 1
    result = score(x, x)
    assert result["L1"].tolist() == [0, 0]
    assert result["PSNR"].isinf().all()
    torch.testing.assert_close(result["SSIM"], torch.ones(2))


def test_values_by_hand():
    """A constant difference of 0.2 in [-1, 1] is 0.1 of full range: PSNR = 20 dB; SSIM is its luminance term alone."""
    x = torch.full((1, 1, 24, 24), -0.2)  # 0.4 in [0, 1]
    result = score(x + 0.2, x)
    assert result["L1"].item() == pytest.approx(0.2, rel=1e-5)
    assert result["PSNR"].item() == pytest.approx(20, rel=1e-4)
    c1 = 0.01**2
    assert result["SSIM"].item() == pytest.approx((2 * 0.4 * 0.5 + c1) / (0.4**2 + 0.5**2 + c1), rel=1e-3)


def test_per_image():
    x = torch.rand(3, 3, 32, 32) * 2 - 1
    y = (x + 0.1 * torch.randn(3, 3, 32, 32)).clamp(-1, 1)
    together = score(y, x)
    for i in range(3):
        for name, value in score(y[i : i + 1], x[i : i + 1]).items():
            torch.testing.assert_close(together[name][i : i + 1], value)
    mse = ((y - x) / 2).square().mean(dim=(1, 2, 3))
    torch.testing.assert_close(together["PSNR"], -10 * mse.log10())


def test_evaluate_generator_covers_all_images():
    netG = UnetGenerator(levels=3, ngf=2)
    batches = [(torch.rand(n, 3, 16, 16), torch.rand(n, 3, 16, 16)) for n in (2, 1)]
    values = evaluate_generator(netG, batches)
    assert {name: len(v) for name, v in values.items()} == {"L1": 3, "PSNR": 3, "SSIM": 3}
    assert all(math.isfinite(x) for v in values.values() for x in v)
