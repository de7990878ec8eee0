"""Small networks, their optimizers, and the two ways to train them, for the engine's tests."""

import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch
from helpers.on_device import generator
from torch import Tensor, nn

from fastp2p.errors import InputError
from fastp2p.models.gan_losses import GANLoss
from fastp2p.models.pix2pix.losses import Losses
from fastp2p.models.pix2pix.networks import PatchDiscriminator, UnetGenerator
from fastp2p.models.pix2pix.reference import train_step
from fastp2p.models.pix2pix.step import FusedStep
from fastp2p.nn.init import init_weights
from fastp2p.ops.philox import keep_mask

LR = 2e-3


class Trained:
    """Two networks and their optimizers."""

    def __init__(self, netG: nn.Module, netD: nn.Module, lr: float = LR):
        self.netG, self.netD = netG, netD
        self.optimizers = [torch.optim.Adam(net.parameters(), lr=lr, betas=(0.5, 0.999)) for net in (netG, netD)]

    def twin(self) -> "Trained":
        """The same weights, in memory of their own; the optimizers begin anew."""
        return Trained(*copy.deepcopy((self.netG, self.netD)), lr=self.optimizers[0].param_groups[0]["lr"])

    def reference(self, real_A: Tensor, real_B: Tensor, gan_mode: Any = "vanilla") -> Losses[Tensor]:
        nets = (self.netG, self.netD, *self.optimizers)
        return train_step(*nets, real_A, real_B, gan_loss=GANLoss(gan_mode), lambda_L1=100.0)

    def fused(self, size: tuple[int, int], dtype: torch.dtype, **options: Any) -> FusedStep:
        return FusedStep(self.netG, self.netD, *self.optimizers, size=size, dtype=dtype, **options)

    def tensors(self) -> dict[str, Tensor]:
        """Everything that training changes, by name."""
        found = {}
        for name, net, optimizer in zip("GD", (self.netG, self.netD), self.optimizers, strict=True):
            found |= {f"{name}.{key}": value for key, value in net.state_dict().items()}
            names = [key for key, _ in net.named_parameters()]
            for number, state in optimizer.state_dict()["state"].items():
                found |= {f"{name}.{names[number]}.{key}": value for key, value in state.items()}
        return found


def small_nets(
    *,
    levels: int = 4,
    norm: Any = "batch",
    dropout: Any = "none",
    n_layers: int = 1,
    dtype: torch.dtype = torch.float64,
    ngf: int = 4,
    seed: int = 0,
) -> Trained:
    """A U-Net and a PatchGAN with weights so large that every layer matters."""
    torch.manual_seed(seed)
    netG = UnetGenerator(levels=levels, ngf=ngf, norm=norm, dropout=dropout).to(dtype)
    netD = PatchDiscriminator(ndf=ngf, n_layers=n_layers, norm=norm).to(dtype)
    for net in (netG, netD):
        init_weights(net, 0.2)
        for module in net.modules():
            if isinstance(module, nn.Conv2d | nn.ConvTranspose2d) and module.bias is not None:
                nn.init.normal_(module.bias, 0.0, 0.2)
    return Trained(netG, netD)


def batches(
    n: int, size: tuple[int, int], dtype: torch.dtype, *, steps: int = 3, seed: int = 1
) -> Iterator[tuple[Tensor, Tensor]]:
    """Smooth images, in [-1, 1]."""
    random = generator(seed)
    for _ in range(steps):
        coarse = torch.rand(2 * n, 3, 8, 8, dtype=dtype, generator=random) * 2 - 1
        images = nn.functional.interpolate(coarse, size, mode="bilinear")
        yield images[:n], images[n:]


class InjectedDropout(nn.Module):
    """Dropout with the engine's masks: those of layer `layer` at step 0, 1, ... under a seed."""

    def __init__(self, p: float, layer: int, seed: int):
        super().__init__()
        self.p, self.layer, self.seed, self.step = p, layer, seed, 0

    def forward(self, x: Tensor) -> Tensor:
        mask = keep_mask(x, torch.tensor([self.seed, self.step]), self.layer, self.p)
        self.step += 1
        return x * mask / (1 - self.p)


def inject_dropout(netG: UnetGenerator, seed: int) -> int:
    """Replace the network's dropouts; returns how many there are. The decoder's layers come after the encoder's."""
    count, block, depth = 0, netG.model, 1
    while block is not None:
        below = None
        for index, module in enumerate(block.model):
            if isinstance(module, nn.Dropout):
                block.model[index] = InjectedDropout(module.p, layer=2 * netG.levels - depth, seed=seed)
                count += 1
            below = module if isinstance(module, type(netG.model)) else below
        block, depth = below, depth + 1
    return count


def outcome(
    change: Callable[[Trained], object], optimizers: Callable[[Any], torch.optim.Optimizer] | None = None
) -> str:
    """Whether the engine refuses the small networks after a change, or three steps in float64 are equal."""
    trained, twin = small_nets(), small_nets()
    for one in (trained, twin):
        change(one)
        make = optimizers or (lambda parameters: torch.optim.Adam(parameters, LR, betas=(0.5, 0.999)))
        one.optimizers = [make(net.double().parameters()) for net in (one.netG, one.netD)]
    try:
        step = trained.fused((32, 32), torch.float64)
    except InputError:
        return "refused"
    for A, B in batches(2, (32, 32), torch.float64):
        expected, found = twin.reference(A, B), step(A, B)
        torch.testing.assert_close(torch.stack(tuple(found)), torch.stack(tuple(expected)), rtol=1e-10, atol=1e-10)
    return "equal"
