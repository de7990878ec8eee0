import pytest
import torch

from fastp2p.count.memory import estimate_step_memory
from fastp2p.models.gan_losses import GANLoss
from fastp2p.models.pix2pix.networks import PatchDiscriminator, PixelDiscriminator, UnetGenerator
from fastp2p.nn.init import count_parameters


def test_state_is_16_bytes_a_parameter():
    netG, netD = UnetGenerator(levels=4, ngf=4), PatchDiscriminator(ndf=4)
    need = estimate_step_memory(netG, netD, batch_size=1, input_nc=3, crop_size=64)
    assert need.state == 16 * (count_parameters(netG) + count_parameters(netD))
    assert need.total == need.state + need.activations


def test_activations_by_hand():
    """A pixel discriminator without norm on 8x8: autograd keeps the inputs of its three convolutions and the two
    tensors that LeakyReLU's gradient reads, which are the convolutions' outputs."""
    netD = PixelDiscriminator(2, ndf=3, norm="none")
    netG = torch.nn.Conv2d(1, 1, 1)
    need = estimate_step_memory(netG, netD, batch_size=1, input_nc=1, crop_size=8)
    channels_kept = 2 + 3 + 3 + 6 + 6  # input, conv1, lrelu1, conv2, lrelu2
    generator_kept = 1  # its input; its output is copied by the concatenation
    assert need.activations == 4 * 64 * (2 * channels_kept + generator_kept)


def test_activations_are_what_autograd_keeps():
    """Against the tensors that the two forward passes of D and the one of G really save."""
    nets = UnetGenerator(levels=5, ngf=8), PatchDiscriminator(ndf=8)
    weights = {p.untyped_storage()._cdata for net in nets for p in net.parameters()}
    kept = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage()._cdata] = tensor
        return tensor

    real_A, real_B = torch.rand(2, 3, 64, 64), torch.rand(2, 3, 64, 64)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        fake_B = nets[0](real_A)
        losses = [GANLoss()(nets[1](torch.cat([real_A, x], 1)), True) for x in (fake_B.detach(), real_B)]
    measured = sum(tensor.untyped_storage().nbytes() for key, tensor in kept.items() if key not in weights)
    need = estimate_step_memory(*nets, batch_size=2, input_nc=3, crop_size=64)
    assert len(losses) == 2
    assert need.activations == pytest.approx(measured, rel=0.01)  # the losses' own tensors are left out


def test_activations_grow_with_batch_and_area():
    nets = UnetGenerator(levels=5, ngf=8), PatchDiscriminator(ndf=8)

    def activations(batch_size: int, crop_size: int) -> int:
        return estimate_step_memory(*nets, batch_size=batch_size, input_nc=3, crop_size=crop_size).activations

    one = activations(1, 64)
    assert activations(4, 64) == pytest.approx(4 * one, 0.01)  # norm keeps a few numbers a channel at any batch
    assert activations(1, 128) == pytest.approx(4 * one, 0.1)  # the logits grow from 6 to 14 a side, not by 2


def test_nets_are_left_alone():
    nets = UnetGenerator(levels=3, ngf=4), PatchDiscriminator(ndf=4)
    before = [value.clone() for net in nets for value in net.state_dict().values()]
    estimate_step_memory(*nets, batch_size=1, input_nc=3, crop_size=32)
    after = [value for net in nets for value in net.state_dict().values()]
    assert all(torch.equal(old, new) for old, new in zip(before, after, strict=True))
    assert all(parameter.device.type == "cpu" and parameter.grad is None for parameter in nets[0].parameters())
