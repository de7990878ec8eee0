"""The estimated memory is what steps hold: counted by hand, kept by autograd, and taken from the allocator."""

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from helpers.nets import Trained, batches, small_nets
from torch.profiler import ProfilerActivity, profile

from fastp2p.count.memory import estimate_memory
from fastp2p.engine.plan import Plan
from fastp2p.engine.record import peak_bytes
from fastp2p.models.gan_losses import GANLoss
from fastp2p.models.pix2pix.memory import estimate_step_memory
from fastp2p.models.pix2pix.networks import PatchDiscriminator, PixelDiscriminator, UnetGenerator
from fastp2p.models.pix2pix.step import FusedStep
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


def kept_elements(plan: Plan, images: int) -> int:
    """How many elements a network's forward pass keeps at least, by its layers."""
    copies = [1 if layer.activation_in_conv else 2 + (layer.second is not None) for layer in plan.layers]
    return sum(
        images * n * layer.out_channels * layer.out_size[0] * layer.out_size[1]
        for n, layer in zip(copies, plan.layers, strict=True)
    )


def kept_bytes(step: FusedStep, n: int) -> int:
    """What G keeps, and D of fake and real, and the pairs that D sees."""
    pairs = 2 * n * step.netD.plan.in_channels * step.size[0] * step.size[1]
    return (kept_elements(step.netG.plan, n) + kept_elements(step.netD.plan, 2 * n) + pairs) * step.dtype.itemsize


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_fused_engine_s_state_is_its_arenas(dtype: torch.dtype):
    """Twelve bytes a parameter, two more of each weight to compute with, in float16 four more of gradients."""
    with torch.device("meta"):
        step = Trained(UnetGenerator(), PatchDiscriminator()).fused((256, 256), dtype)
    need = estimate_memory(step, 1)
    per_parameter = {torch.float32: 12, torch.bfloat16: 14, torch.float16: 18}[dtype]
    assert need.state == pytest.approx(per_parameter * sum(map(count_parameters, step.nets)), rel=1e-4)
    assert need.total == need.state + need.activations


class Chain:
    """A step whose memory can be counted on fingers; A and B are of 12 bytes a pixel each."""

    shapes, dtype, networks = dict.fromkeys("AB", (3, 4, 4)), torch.float32, dict[str, Any]()
    arenas = networks

    def on_meta(self) -> "Chain":
        return self

    def launch(self, batch: Mapping[str, torch.Tensor]) -> Any:
        y = batch["A"] + batch["B"]
        y = y.permute(0, 2, 3, 1)  # no memory of its own
        z = torch.cat([y, y])
        del y
        w = z * 2  # z and w
        del z
        w.mul_(2)
        return w[:1] + 1


def test_the_peak_by_hand():
    """A and B of 12 bytes for each of 16 pixels; A + B, and twice as much after it; once more as much as that."""
    one = 12 * 16
    chain: Any = Chain()
    assert peak_bytes(chain, 1) == 2 * one + max(one + 2 * one, 2 * one + 2 * one)
    assert peak_bytes(chain, 5) == 5 * peak_bytes(chain, 1)


@pytest.mark.parametrize("norm", ["batch", "instance", "none"])
@pytest.mark.parametrize("n", [1, 4])
def test_the_fused_engine_s_activations_lie_between_what_is_kept_and_what_the_allocator_gives(norm: Any, n: int):
    """What forward passes keep is not all that a step holds; the allocator's peak has scratch space on top."""
    nets = small_nets(levels=5, norm=norm, n_layers=2, ngf=16, dtype=torch.float32)
    step = nets.fused((64, 64), torch.float32)
    need = estimate_memory(step, n)
    measured = allocated_bytes(step, *next(batches(n, (64, 64), torch.float32)))
    A_and_B = n * 6 * 64 * 64 * 4  # in the estimate, and before `measured` begins
    assert kept_bytes(step, n) < need.activations - A_and_B <= measured


def allocated_bytes(step: FusedStep, *images: torch.Tensor) -> int:
    """The most bytes that PyTorch's allocator gave at once during a step, as torch.profiler tells."""
    step(*images)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step(*images)
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = most = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most


def test_an_estimate_leaves_the_step_alone():
    nets = small_nets(dtype=torch.float32)
    step = nets.fused((16, 16), torch.float32)
    before = {name: value.clone() for name, value in nets.tensors().items()}
    random, rng = torch.get_rng_state(), step.rng.clone()
    estimate_memory(step, 2)
    assert all(torch.equal(value, before[name]) for name, value in nets.tensors().items())
    assert torch.equal(torch.get_rng_state(), random)
    assert torch.equal(step.rng, rng)
