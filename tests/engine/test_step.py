"""Link 1 of the proof: the fused step in float64 is the autograd step, whatever the networks and the objective."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.nets import Trained, batches, inject_dropout, small_nets
from torch import Tensor, nn

from fastp2p.errors import InputError
from fastp2p.models.pix2pix.networks import PatchDiscriminator, PixelDiscriminator, UnetGenerator
from fastp2p.nn.init import init_weights
from fastp2p.nn.norm import take_statistics_of_samples
from fastp2p.ops.objectives import OBJECTIVES

F64 = torch.float64
SIZE = (16, 24)

# Both sides sum the same products in float64, in another order: 2^-53 a term, some thousand terms, and a few steps.
LOSS = 1e-12
# Adam divides by the gradient's size, so where one is near 0 its rounding shows as a part of lr.
WEIGHT = 1e-9


def compare(nets: Trained, twin: Trained, size: tuple[int, int], n: int, gan_mode: Any = "vanilla") -> None:
    """Three steps of each, from the same weights: losses, weights, buffers and Adam's moments."""
    step = twin.fused(size, F64, gan_mode=gan_mode, seed=7)
    for real_A, real_B in batches(n, size, F64):
        expected, losses = nets.reference(real_A, real_B, gan_mode), step(real_A, real_B)
        torch.testing.assert_close(torch.stack(losses), torch.stack(expected), rtol=LOSS, atol=LOSS)
    found = twin.tensors()
    for name, value in nets.tensors().items():
        torch.testing.assert_close(found[name], value, rtol=1e-7, atol=WEIGHT, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("norm", ["batch", "instance", "none"])
@pytest.mark.parametrize(
    ("levels", "size", "n"), [(2, (12, 8), 1), (3, (16, 24), 2), (4, (16, 16), 3), (5, (64, 32), 1)]
)
def test_networks_of_any_depth(norm: str, levels: int, size: tuple[int, int], n: int):
    """(4, 16²) has a 1² bottleneck, whose kernels are left with four taps."""
    nets = small_nets(levels=levels, norm=norm)
    compare(nets, nets.twin(), size, n)


@pytest.mark.parametrize("gan_mode", OBJECTIVES)
@pytest.mark.parametrize("n_layers", [1, 2, 3])
def test_objectives_and_patches(gan_mode: str, n_layers: int):
    nets = small_nets(levels=3, n_layers=n_layers)
    compare(nets, nets.twin(), (32, 40), 2, gan_mode)


@pytest.mark.parametrize("norm", ["batch", "instance", "none"])
def test_pixel_discriminator(norm: str):
    nets = small_nets(levels=3, norm=norm)
    nets = Trained(nets.netG, PixelDiscriminator(ndf=4, norm=norm).double())
    compare(nets, nets.twin(), SIZE, 2)


@pytest.mark.parametrize("size", [(17, 30), (33, 16)])
def test_sizes_that_G_pads(size: tuple[int, int]):
    nets = small_nets(levels=4)
    compare(nets, nets.twin(), size, 2)


@pytest.mark.parametrize("norm", ["batch", "instance", "none"])
@pytest.mark.parametrize(("dropout", "count"), [("upstream", 1), ("paper", 3)])
def test_dropout_with_the_engine_s_masks_in_autograd(norm: str, dropout: str, count: int):
    nets = small_nets(levels=6, norm=norm, dropout=dropout)
    twin = nets.twin()
    assert inject_dropout(nets.netG, seed=7) == count
    compare(nets, twin, (64, 64), 2)


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block = nn.Sequential(nn.ReflectionPad2d(1), nn.Conv2d(4, 4, 3), nn.InstanceNorm2d(4))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.block(x)


def test_a_residual_generator():
    """A network that nothing in the engine names, as docs/adding.md tells of one."""
    ends = (
        (nn.Conv2d(3, 4, 3, 2, 1), nn.BatchNorm2d(4), nn.ReLU(True)),
        (nn.Upsample(scale_factor=2), nn.ReflectionPad2d(1)),
    )
    torch.manual_seed(0)
    netG = nn.Sequential(*ends[0], Residual(), Residual(), *ends[1], nn.Conv2d(4, 3, 3), nn.Tanh()).double()
    nets = Trained(netG, small_nets().netD)
    compare(nets, nets.twin(), SIZE, 2)


def test_statistics_of_samples():
    nets = small_nets(levels=4)
    for net in (nets.netG, nets.netD):
        take_statistics_of_samples(net)
    nets = Trained(nets.netG, nets.netD)
    compare(nets, nets.twin(), SIZE, 3)
    assert nets.netG.state_dict()["model.model.1.model.2.num_batches_tracked"] == 9


def test_golden_trace(golden: Path):
    """Upstream's own four steps of unet_256 on real facades."""
    trace = np.load(golden)

    def state_dict(prefix: str) -> dict[str, Tensor]:
        found = {key.removeprefix(prefix): trace[key] for key in trace.files if key.startswith(prefix)}
        return {key: torch.tensor(value) for key, value in found.items()}

    nets = Trained(UnetGenerator(ngf=8, dropout="none").double(), PatchDiscriminator(ndf=8).double(), lr=2e-4)
    nets.netG.load_state_dict(state_dict("init/G/"))
    nets.netD.load_state_dict(state_dict("init/D/"))
    images = torch.tensor(trace["images"]).permute(0, 3, 1, 2).double() / 255 * 2 - 1
    photos, labels = images.split(256, dim=3)
    step = nets.fused((256, 256), F64)
    for number in range(4):
        batch = slice(2 * number, 2 * number + 2)
        losses = step(labels[batch], photos[batch])
        np.testing.assert_allclose([float(loss) for loss in losses], trace["losses"][number], rtol=1e-9)
    for net, prefix in ((nets.netG, "final/G/"), (nets.netD, "final/D/")):
        for name, value in net.state_dict().items():
            expected = state_dict(prefix)[name].to(value.dtype)
            torch.testing.assert_close(value, expected, rtol=0, atol=1e-7, msg=f"{prefix}{name} differs")


@pytest.mark.slow
@pytest.mark.parametrize("n", [1, 2, 3])
@pytest.mark.parametrize("norm", ["batch", "instance"])
@pytest.mark.parametrize("levels", [7, 8])
def test_the_paper_s_networks(levels: int, norm: str, n: int):
    """unet_128 and unet_256 with the 70x70 PatchGAN and dropout, an eighth as wide, from the recipe's weights."""
    torch.manual_seed(0)
    netG = UnetGenerator(levels=levels, ngf=8, norm=norm).double()
    netD = PatchDiscriminator(ndf=8, norm=norm).double()
    for net in (netG, netD):
        init_weights(net)
    nets = Trained(netG, netD, lr=2e-4)
    twin = nets.twin()
    inject_dropout(nets.netG, seed=7)
    compare(nets, twin, (2**levels, 2**levels), n)


def test_other_sizes_and_networks_are_refused():
    nets = small_nets()
    step = nets.fused(SIZE, F64)
    A, B = torch.zeros(2, 1, 3, 16, 16, dtype=F64)
    with pytest.raises(
        InputError,
        match=r"got real_A, real_B \(1, 3, 16, 16\).*made for floating \(1, 3, 16, 24\) and \(1, 3, 16, 24\)",
    ):
        step(A, B)
    for a, b in (((1, 3), (2, 3)), ((2, 1), (2, 3)), ((1, 3), (1, 1))):
        with pytest.raises(InputError, match="this step was made for"):
            step(torch.zeros(*a, *SIZE, dtype=F64), torch.zeros(*b, *SIZE, dtype=F64))
    with pytest.raises(InputError, match="got parameters in float64, expected float32"):
        small_nets().fused(SIZE, torch.bfloat16)
    with pytest.raises(InputError, match=r"got dtype torch\.int8, expected one of torch\.bfloat16"):
        small_nets().fused(SIZE, torch.int8)
    for images in (torch.zeros(1, 3, *SIZE, dtype=torch.uint8), torch.zeros(0, 3, *SIZE)):
        with pytest.raises(InputError, match="this step was made for floating"):
            step(images, images)
    nets.netD.eval()
    for call in (lambda: nets.fused(SIZE, F64), lambda: step(*next(batches(1, SIZE, F64)))):
        with pytest.raises(InputError, match="got a network in eval mode"):
            call()
    nets.netD.train()
    with pytest.raises(InputError, match="got a discriminator of 2 channels, expected 6"):
        Trained(nets.netG, PatchDiscriminator(2, ndf=4).double()).fused((32, 32), F64)
    with pytest.raises(InputError, match="got a discriminator that does not end in a convolution of logits"):
        Trained(nets.netG, torch.nn.Sequential(torch.nn.Conv2d(6, 1, 3), torch.nn.Tanh())).fused(SIZE, F64)
    with pytest.raises(InputError, match="got a generator that does not end in a convolution and Tanh"):
        Trained(torch.nn.Conv2d(3, 3, 1), nets.netD).fused(SIZE, F64)
    with pytest.raises(InputError, match=r"layer c3 leaves \(0, 2\) of an input of \(1, 3\)"):
        small_nets(levels=2, n_layers=1).fused((4, 8), F64)
    nets.netG.model.model[0].weight.requires_grad_(False)
    with pytest.raises(InputError, match="got 1 parameters with requires_grad False"):
        nets.fused(SIZE, F64)
