"""docs/adding.md's recipe of an adversarial objective, followed with a dummy: two entries, and every engine has it."""

import pytest
import torch
import torch.nn.functional as F
from helpers.nets import Trained, batches, small_nets
from torch import Tensor

from fastp2p.models.gan_losses import FORMULAS, GANLoss
from fastp2p.models.pix2pix.losses import Losses, read_losses
from fastp2p.nn import PatchGANLoss
from fastp2p.ops.objectives import OBJECTIVES, Objective, Target

SIZE = (16, 24)


def dummy(logits: Tensor, real: bool, for_discriminator: bool) -> Tensor:
    """D tells by distances to 0.9 and -0.5, G is paid by BCE with 0.8."""
    if for_discriminator:
        return (logits - (0.9 if real else -0.5)).abs().mean()
    return F.binary_cross_entropy_with_logits(logits, torch.full_like(logits, 0.8 if real else -0.5))


@pytest.fixture(autouse=True)
def _added(monkeypatch: pytest.MonkeyPatch):
    objective = Objective(Target("l1", 0.9), Target("l1", -0.5), Target("bce", 0.8), balance=0.7)
    monkeypatch.setitem(OBJECTIVES, "dummy", objective)
    monkeypatch.setitem(FORMULAS, "dummy", dummy)


@pytest.mark.parametrize("for_discriminator", [True, False])
@pytest.mark.parametrize("real", [True, False])
def test_the_layer_is_the_formula(real: bool, for_discriminator: bool):
    logits = torch.randn(2, 1, 5, 5, dtype=torch.float64)
    ours, formula = (
        loss("dummy")(logits, real, for_discriminator=for_discriminator) for loss in (PatchGANLoss, GANLoss)
    )
    torch.testing.assert_close(ours, formula)


def test_the_fused_step_is_the_reference():
    """Float64: sums in another order, through two networks and Adam, twice."""
    nets = small_nets(levels=3, n_layers=2)
    twin: Trained = nets.twin()
    step = twin.fused(SIZE, torch.float64, gan_mode="dummy", seed=7)
    for real_A, real_B in batches(2, SIZE, torch.float64):
        expected, losses = nets.reference(real_A, real_B, "dummy"), step(real_A, real_B)
        torch.testing.assert_close(torch.stack(losses), torch.stack(expected), rtol=1e-10, atol=1e-10)


def test_the_losses_are_read():
    text, warning = read_losses(Losses(0.6, 30.0, 0.7, 0.7), "dummy")
    assert (text.startswith("loss_D 0.70, balance is 0.7: both players"), warning) == (True, False)
