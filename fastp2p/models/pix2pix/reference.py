"""The pix2pix step in upstream's order, in plain autograd: the oracle that every faster path is checked against."""

from torch import Tensor, cat, nn
from torch.nn.functional import l1_loss
from torch.optim import Optimizer

from fastp2p.models.gan_losses import GANLoss
from fastp2p.models.pix2pix.losses import Losses


def train_step(
    netG: nn.Module,
    netD: nn.Module,
    optimizer_G: Optimizer,
    optimizer_D: Optimizer,
    real_A: Tensor,
    real_B: Tensor,
    *,
    gan_loss: GANLoss,
    lambda_L1: float,
) -> Losses[Tensor]:
    """One step of D, then one of G through the D just updated (Isola et al., section 3.3; upstream's order).

    Args:
        netG, netD: both in training mode.
        optimizer_G, optimizer_D: over their parameters.
        real_A, real_B: (N, C, H, W) in [-1, 1], on the nets' device and in their dtype.
        gan_loss, lambda_L1: the objective.

    Returns:
        The four losses, detached, on the device. Reading them synchronises.
    """
    fake_B = netG(real_A)

    # D: fake and real apart, so that each pass has its own batch statistics
    optimizer_D.zero_grad()
    loss_D_fake = gan_loss(netD(cat([real_A, fake_B.detach()], dim=1)), False)
    loss_D_real = gan_loss(netD(cat([real_A, real_B], dim=1)), True)
    ((loss_D_fake + loss_D_real) * 0.5).backward()
    optimizer_D.step()

    # G: D's weights are fixed, its gradient flows through to fake_B
    netD.requires_grad_(False)
    optimizer_G.zero_grad()
    loss_G_GAN = gan_loss(netD(cat([real_A, fake_B], dim=1)), True, for_discriminator=False)
    loss_G_L1 = l1_loss(fake_B, real_B) * lambda_L1
    (loss_G_GAN + loss_G_L1).backward()
    optimizer_G.step()
    netD.requires_grad_(True)

    return Losses(*(loss.detach() for loss in (loss_G_GAN, loss_G_L1, loss_D_real, loss_D_fake)))
