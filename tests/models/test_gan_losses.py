import math
import re
from typing import Any

import pytest
import torch

from fastp2p.errors import InputError
from fastp2p.models.gan_losses import GANLoss
from fastp2p.models.pix2pix.losses import Losses, read_losses
from fastp2p.nn import PatchGANLoss


def test_vanilla_is_binary_cross_entropy():
    logits = torch.randn(2, 1, 5, 5, dtype=torch.float64)
    p = logits.sigmoid()
    torch.testing.assert_close(GANLoss("vanilla")(logits, True), -p.log().mean())
    torch.testing.assert_close(GANLoss("vanilla")(logits, False), -(1 - p).log().mean())
    assert GANLoss()(torch.zeros(1, 1, 2, 2), True).item() == pytest.approx(math.log(2))


def test_lsgan_is_the_squared_distance():
    logits = torch.tensor([0.0, 0.5, 2.0])
    assert GANLoss("lsgan")(logits, True).item() == pytest.approx((1 + 0.25 + 1) / 3)
    assert GANLoss("lsgan")(logits, False).item() == pytest.approx((0 + 0.25 + 4) / 3)


def test_hinge_differs_by_player():
    logits, hinge = torch.tensor([-2.0, 0.5, 3.0]), GANLoss("hinge")
    assert hinge(logits, True).item() == pytest.approx((3 + 0.5 + 0) / 3)
    assert hinge(logits, False).item() == pytest.approx((0 + 1.5 + 4) / 3)
    assert hinge(logits, True, for_discriminator=False).item() == pytest.approx(-0.5)


@pytest.mark.parametrize("gan_mode", ["wgan", ["vanilla"], None])
@pytest.mark.parametrize("loss", [GANLoss, PatchGANLoss])
def test_unknown_mode_is_refused(loss: Any, gan_mode: Any):
    with pytest.raises(
        InputError, match=re.escape(f"gan_mode: got {gan_mode!r}, expected one of vanilla, lsgan, hinge")
    ):
        loss(gan_mode)


@pytest.mark.parametrize(
    ("gan_mode", "losses", "says", "warns"),
    [
        ("vanilla", Losses(0.7, 30, 0.69, 0.7), "both players are in the game", False),
        ("vanilla", Losses(2.5, 30, 0.3, 0.2), "D is ahead", False),
        ("vanilla", Losses(7.0, 30, 0.01, 0.01), "D has won", True),
        ("vanilla", Losses(0.01, 30, 2.0, 3.0), "G has won", True),
        ("lsgan", Losses(0.25, 30, 0.25, 0.25), "both players are in the game", False),
        ("hinge", Losses(-0.1, 30, 1.0, 1.0), "both players are in the game", False),
        ("hinge", Losses(-9.0, 30, 0.9, 9.0), "G has won", True),
        ("hinge", Losses(3.0, 30, 0.01, 0.02), "D has won", True),
        ("vanilla", Losses(9e7, 50, 5e8, 1.0), "training runs away", True),
        ("vanilla", Losses(0.7, 50, 1.0, 5.0), "training runs away", True),
        ("vanilla", Losses(0.0, 50, 5e8, 1.0), "training runs away", True),
        ("vanilla", Losses(80.0, 50, 0.6, 0.7), "training runs away", True),
        ("lsgan", Losses(0.3, 50, 1e3, 0.2), "training runs away", True),
        ("hinge", Losses(-1e6, 50, 2.0, 9e5), "training runs away", True),
    ],
)
def test_reading_of_the_losses(gan_mode: str, losses: Losses, says: str, warns: bool):
    text, warning = read_losses(losses, gan_mode)
    assert says in text
    assert warning == warns
