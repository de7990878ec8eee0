"""The estimated memory is what steps hold: counted by hand, kept by autograd, and taken from the allocator."""

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from helpers.nets import Trained, batches, small_nets
from torch.profiler import ProfilerActivity, profile

from fastp2p.count.memory import MemoryEstimate, estimate_autograd_memory, estimate_memory
from fastp2p.engine.plan import Plan
from fastp2p.engine.record import peak_bytes
from fastp2p.models.pix2pix.model import MODEL
from fastp2p.models.pix2pix.networks import PatchDiscriminator, UnetGenerator
from fastp2p.models.pix2pix.options import Pix2PixConfig
from fastp2p.models.pix2pix.step import FusedStep
from fastp2p.nn.init import count_parameters


class OneLayer:
    """A step of plain autograd whose memory can be counted on fingers: y = exp(w x), and SGD with momentum."""

    def __init__(self) -> None:
        self.net = torch.nn.Conv2d(3, 3, 1, bias=False, device="meta")
        self.optimizer = torch.optim.SGD(self.net.parameters(), lr=0.1, momentum=0.5)
        self.batch = {"A": torch.empty(1, 3, 16, 16, device="meta")}

    def __call__(self) -> None:
        self.optimizer.zero_grad()
        y = self.net(self.batch["A"]).exp()  # x w is given back: exp's gradient reads y
        y.backward(y.new_empty(()).expand_as(y))
        self.optimizer.step()


def test_a_step_of_autograd_by_hand():
    """Between steps: weight, gradient, momentum. At the peak, in backward: maps x, y and dy y, and dy's one number.

    zero_grad gives the old gradient back before, and the new one takes its place.
    """
    one, weight = 4 * 3 * 16 * 16, 4 * 3 * 3
    step = OneLayer()
    need = estimate_autograd_memory(step, {"net": step.net}, {"optimizer": step.optimizer}, step.batch)
    assert (need.state, need.activations) == (3 * weight, 3 * one + 4)


def reference_memory(batch_size: int, crop_size: int = 64) -> MemoryEstimate:
    config = Pix2PixConfig(data="pairs", netG="unet_32", ngf=8, ndf=8, engine="reference", crop_size=crop_size)
    resolved = config.resolve("cpu", "fp32")
    return MODEL.memory(resolved, MODEL.nets(resolved), batch_size)


def test_the_reference_s_state_is_16_bytes_a_parameter():
    nets = UnetGenerator(levels=5, ngf=8), PatchDiscriminator(ndf=8)
    buffers = sum(b.numel() * b.itemsize for net in nets for b in net.buffers())
    need = reference_memory(1)
    assert need.state == 16 * sum(map(count_parameters, nets)) + buffers
    assert need.total == need.state + need.activations


@pytest.mark.parametrize("n", [1, 4])
def test_the_reference_s_memory_is_what_the_allocator_gives(n: int):
    """The allocator gives scratch space as well, and the profiler does not see that old gradients are given back."""
    nets, side = small_nets(levels=5, n_layers=3, ngf=8, dtype=torch.float32), 256
    need = reference_memory(n, side)
    measured = allocated_bytes(nets.reference, *next(batches(n, (side, side), torch.float32)))
    A_and_B = n * 6 * side**2 * 4  # in the estimate, and before `measured` begins
    assert 0.9 * measured < need.activations - A_and_B <= measured


def test_the_reference_s_activations_grow_with_batch_and_area():
    one = reference_memory(1).activations
    assert reference_memory(4).activations == pytest.approx(4 * one, 0.15)
    assert reference_memory(1, 128).activations == pytest.approx(4 * one, 0.15)


def test_an_estimate_leaves_the_nets_alone():
    resolved = Pix2PixConfig(data="pairs", netG="unet_32", engine="reference", crop_size=32).resolve("cpu", "fp32")
    nets = MODEL.nets(resolved)
    values = [value for net in nets.values() for value in net.state_dict().values()]
    random, before = torch.get_rng_state(), [value.clone() for value in values]
    MODEL.memory(resolved, nets, 2)
    assert all(torch.equal(old, new) for old, new in zip(before, values, strict=True))
    assert all(p.device.type == "cpu" and p.grad is None and p.requires_grad for p in nets["netG"].parameters())
    assert torch.equal(torch.get_rng_state(), random)


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

    shapes, networks = dict.fromkeys("AB", (3, 4, 4)), dict[str, Any]()
    dtype, image_dtypes = torch.float32, dict[str, torch.dtype]()
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


def allocated_bytes(step: Callable[..., object], *images: torch.Tensor) -> int:
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
