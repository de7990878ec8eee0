"""How close fake_B is to real_B: L1, PSNR and SSIM, per image."""

from collections.abc import Iterable, Mapping

from torch import Tensor, nn

from fastp2p.errors import InputError
from fastp2p.models.generate import NormStats, generate

METRICS = ("L1", "PSNR", "SSIM")
SSIM_WINDOW = 11  # px


def score(fake_B: Tensor, real_B: Tensor) -> dict[str, Tensor]:
    """Score images in [-1, 1]: (N, C, H, W) each -> (N,) float32 for each metric.

        L1    mean |fake_B - real_B| in [-1, 1], as in the training loss before lambda_L1; lower is better
        PSNR  dB, of 8-bit range; higher is better
        SSIM  Wang et al. 2004, 11x11 Gaussian window of sigma 1.5, where it lies within the image; at most 1, higher
              is better

    PSNR and SSIM are torchmetrics'; its SSIM map goes on to the borders by reflection, which is cut off here.

    Raises:
        InputError: when an image is smaller than the window.
    """
    from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure

    if min(real_B.shape[-2:]) < SSIM_WINDOW:
        raise InputError(f"SSIM: got images of {tuple(real_B.shape[-2:])} px, expected at least {SSIM_WINDOW} a side")
    fake, real = ((image.float() + 1) / 2 for image in (fake_B, real_B))  # in [0, 1]: SSIM depends on where 0 is
    l1 = 2 * (fake - real).abs().mean(dim=(1, 2, 3))
    psnr = peak_signal_noise_ratio(fake, real, data_range=1.0, reduction="none", dim=(1, 2, 3))
    _, ssim_map = structural_similarity_index_measure(
        fake, real, data_range=1.0, reduction="none", return_full_image=True
    )
    border = SSIM_WINDOW // 2
    ssim = ssim_map[..., border:-border, border:-border].mean(dim=(1, 2, 3))
    return dict(zip(METRICS, (l1, psnr, ssim), strict=True))


def evaluate_generator(
    netG: nn.Module,
    batches: Iterable[Mapping[str, Tensor]],
    *,
    norm_stats: NormStats = "image",
    dropout: bool = False,
) -> dict[str, list[float]]:
    """Score netG on batches of images A and B: metric -> one value per image, in order."""
    values: dict[str, list[float]] = {name: [] for name in METRICS}
    for batch in batches:
        fake_B = generate(netG, batch["A"], norm_stats=norm_stats, dropout=dropout)
        for name, value in score(fake_B, batch["B"]).items():
            values[name] += value.tolist()
    return values
