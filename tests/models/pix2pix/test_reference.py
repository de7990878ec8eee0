"""The readable step against the official implementation's own numbers."""

import copy
from pathlib import Path

import numpy as np
import pytest
import torch

from fastp2p.models.gan_losses import GANLoss
from fastp2p.models.pix2pix.networks import PatchDiscriminator, UnetGenerator
from fastp2p.models.pix2pix.reference import train_step
from fastp2p.ops.objectives import OBJECTIVES


def test_golden_trace_in_float64(golden: Path):
    """Four steps of upstream's unet_256 on real facades: losses to 1e-9 relative, weights and BN statistics to 1e-7.

    The weights may drift further than the losses, since Adam amplifies rounding where a gradient is near zero.
    """
    trace = np.load(golden)

    def state_dict(prefix: str) -> dict[str, torch.Tensor]:
        return {key.removeprefix(prefix): torch.from_numpy(trace[key]) for key in trace.files if key.startswith(prefix)}

    netG, netD = UnetGenerator(ngf=8, dropout="none").double(), PatchDiscriminator(ndf=8).double()
    netG.load_state_dict(state_dict("init/G/"))
    netD.load_state_dict(state_dict("init/D/"))
    optimizer_G, optimizer_D = (torch.optim.Adam(net.parameters(), lr=2e-4, betas=(0.5, 0.999)) for net in (netG, netD))
    images = torch.from_numpy(trace["images"]).permute(0, 3, 1, 2).double() / 255 * 2 - 1
    photos, labels = images.split(256, dim=3)
    with torch.no_grad():
        fake_B = netG(labels[:2])
    netG.load_state_dict(state_dict("init/G/"))  # undo that pass's statistics
    stored = torch.from_numpy(trace["fake_B_step0"])  # in float32
    torch.testing.assert_close(fake_B.float(), stored, rtol=0, atol=1e-6)

    for step in range(4):
        batch = slice(2 * step, 2 * step + 2)
        losses = train_step(
            netG, netD, optimizer_G, optimizer_D, labels[batch], photos[batch], gan_loss=GANLoss(), lambda_L1=100.0
        )
        np.testing.assert_allclose([float(loss) for loss in losses], trace["losses"][step], rtol=1e-9)
    for net, prefix in ((netG, "final/G/"), (netD, "final/D/")):
        expected = state_dict(prefix)
        assert net.state_dict().keys() == expected.keys()
        for name, value in net.state_dict().items():
            torch.testing.assert_close(
                value, expected[name].to(value.dtype), rtol=0, atol=1e-7, msg=f"{prefix}{name} differs"
            )


@pytest.mark.parametrize("gan_mode", OBJECTIVES)
def test_step_updates_both_nets_and_G_s_half_leaves_D_alone(gan_mode: str):
    torch.manual_seed(0)
    netG, netD = UnetGenerator(levels=4, ngf=4), PatchDiscriminator(ndf=4, n_layers=1)
    optimizers = [torch.optim.Adam(net.parameters(), lr=1e-3) for net in (netG, netD)]
    weights = [p for net in (netG, netD) for p in net.parameters() if p.ndim == 4]  # hinge's may cancel on a bias
    before = [p.clone() for p in weights]
    A, B = torch.randn(2, 3, 16, 16), torch.randn(2, 3, 16, 16).tanh()
    losses = train_step(netG, netD, *optimizers, A, B, gan_loss=GANLoss(gan_mode), lambda_L1=10.0)
    assert all(loss.isfinite() and not loss.requires_grad for loss in losses)
    assert not any(torch.equal(old, new) for old, new in zip(before, weights, strict=True))
    assert all(p.requires_grad for p in netD.parameters())


def test_D_s_gradient_is_its_own():
    """What is left in netD's .grad is that of D's loss: none of G's comes through."""
    torch.manual_seed(0)
    netG, netD = UnetGenerator(levels=4, ngf=4), PatchDiscriminator(ndf=4, n_layers=1)
    copies = copy.deepcopy((netG, netD))
    optimizers = [torch.optim.SGD(net.parameters(), lr=0.0) for net in (netG, netD)]
    A, B = torch.randn(1, 3, 16, 16), torch.randn(1, 3, 16, 16)
    train_step(netG, netD, *optimizers, A, B, gan_loss=GANLoss(), lambda_L1=10.0)

    fake_B = copies[0](A).detach()
    loss_fake = GANLoss()(copies[1](torch.cat([A, fake_B], 1)), False)
    loss_real = GANLoss()(copies[1](torch.cat([A, B], 1)), True)
    (0.5 * (loss_fake + loss_real)).backward()
    for ours, expected in zip(netD.parameters(), copies[1].parameters(), strict=True):
        torch.testing.assert_close(ours.grad, expected.grad)


def test_D_sees_fake_and_real_apart_and_moves_its_statistics_three_times():
    netG, netD = UnetGenerator(levels=4, ngf=4), PatchDiscriminator(ndf=4, n_layers=1)
    optimizers = [torch.optim.Adam(net.parameters()) for net in (netG, netD)]
    A, B = torch.randn(1, 3, 16, 16), torch.randn(1, 3, 16, 16)
    train_step(netG, netD, *optimizers, A, B, gan_loss=GANLoss(), lambda_L1=10.0)
    assert netD.state_dict()["model.3.num_batches_tracked"] == 3
    assert {value.item() for name, value in netG.state_dict().items() if "tracked" in name} == {1}


def test_overfits_one_pair():
    """With lambda_L1 alone the generator must be able to learn one pair by heart."""
    torch.manual_seed(0)
    netG, netD = UnetGenerator(levels=4, ngf=16, dropout="none"), PatchDiscriminator(ndf=4, n_layers=1)
    optimizers = [torch.optim.Adam(net.parameters(), lr=2e-3, betas=(0.5, 0.999)) for net in (netG, netD)]
    A, B = torch.randn(1, 3, 16, 16), torch.rand(1, 3, 16, 16) * 1.6 - 0.8
    first, *_, last = (
        float(train_step(netG, netD, *optimizers, A, B, gan_loss=GANLoss(), lambda_L1=100.0).loss_G_L1)
        for _ in range(150)
    )
    assert last < first / 4
