import math

import pytest
import torch

from fastp2p.errors import InputError
from fastp2p.models.metrics import evaluate_generator, score
from fastp2p.models.pix2pix.networks import UnetGenerator


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


def test_ssim_is_wang_s_by_hand():
    """Wang et al. 2004 in float64: the local statistics of every window that lies within the image, nothing padded."""
    torch.manual_seed(0)
    x, y = torch.rand(2, 1, 20, 26, dtype=torch.float64), torch.rand(2, 1, 20, 26, dtype=torch.float64)
    t = torch.arange(-5, 6, dtype=torch.float64)
    window = torch.exp(-(t[:, None] ** 2 + t**2) / (2 * 1.5**2))
    window = (window / window.sum()).view(1, 1, 11, 11)

    def mean(z: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.conv2d(z, window)

    mx, my = mean(x), mean(y)
    vx, vy, cov = mean(x * x) - mx**2, mean(y * y) - my**2, mean(x * y) - mx * my
    c1, c2 = 0.01**2, 0.03**2
    expected = (2 * mx * my + c1) * (2 * cov + c2) / ((mx**2 + my**2 + c1) * (vx + vy + c2))
    ours = score((2 * x - 1).float(), (2 * y - 1).float())["SSIM"]
    torch.testing.assert_close(ours.double(), expected.mean(dim=(1, 2, 3)), rtol=0, atol=1e-5)  # ours is in float32


def test_image_smaller_than_the_window_is_told():
    with pytest.raises(InputError, match=r"got images of \(10, 30\) px, expected at least 11"):
        score(torch.rand(1, 3, 10, 30), torch.rand(1, 3, 10, 30))


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
    batches = [{name: torch.rand(n, 3, 16, 16) for name in "AB"} for n in (2, 1)]
    values = evaluate_generator(netG, batches)
    assert {name: len(v) for name, v in values.items()} == {"L1": 3, "PSNR": 3, "SSIM": 3}
    assert all(math.isfinite(x) for v in values.values() for x in v)
