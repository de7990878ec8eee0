"""What the tests of roofline and profile share: the smallest networks, and ceilings that take no time to measure."""

from typing import Any

import pytest

from fastp2p.count import ceilings as ceilings_module
from fastp2p.models.pix2pix.options import Pix2PixConfig

# The smallest networks, as the command takes them
NETWORKS = ["--netG", "unet_8", "--ngf", "4", "--netD", "pixel", "--ndf", "4", "--crop-size", "32", "--device", "cpu"]

PARTS = (  # a step's, in the order in which they run
    "augment",
    "netG forward",
    "netD forward",
    "netD backward and Adam",
    "netD forward and backward for netG",
    "netG backward and Adam",
)


def tiny(**options: Any) -> Pix2PixConfig:
    sizes: dict[str, Any] = {"netG": "unet_8", "ngf": 4, "ndf": 4, "netD": "pixel", "crop_size": 32}
    return Pix2PixConfig(**sizes | {"device": "cpu", "batch_size": 2} | options)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch, own_cache: None) -> None:
    monkeypatch.setattr(ceilings_module, "COPY_BYTES", {"cpu": 2**20})
    monkeypatch.setattr(ceilings_module, "SIDES", {"cpu": 128})
    monkeypatch.setattr(ceilings_module, "SIDES_ON_CPU", {})
