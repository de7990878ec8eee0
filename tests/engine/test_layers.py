"""--engine layers is the reference step: losses, weights and moments in float64; and what it refuses."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers.nets import Trained, batches, small_nets
from helpers.on_device import generator
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from fastp2p.data import Crops
from fastp2p.engine import GraphedStep
from fastp2p.engine.graph import WARM_UP
from fastp2p.engine.layers import FlatAdam, LayersStep
from fastp2p.engine.record import peak_bytes, record
from fastp2p.engine.step import LossValues
from fastp2p.errors import InputError
from fastp2p.models.gan_losses import GANLoss
from fastp2p.models.pix2pix.losses import Losses
from fastp2p.models.pix2pix.reference import train_step
from fastp2p.nn.norm import take_statistics_of_samples
from fastp2p.ops.library import autocast_to
from fastp2p.ops.objectives import OBJECTIVES

F64 = torch.float64
SIZE = (16, 16)


def pix2pix(gan_mode: Any = "vanilla") -> Callable[[Any, Any, Any], LossValues]:
    def reference_step(nets: Any, optimizers: Any, batch: Any) -> LossValues:
        players = (nets["netG"], nets["netD"], optimizers["G"], optimizers["D"])
        gan_loss = GANLoss(gan_mode)
        return train_step(*players, batch["A"], batch["B"], gan_loss=gan_loss, lambda_L1=100.0)._asdict()

    return reference_step


def layers(nets: Trained, dtype: torch.dtype, size: tuple[int, int] = SIZE, gan_mode: Any = "vanilla") -> LayersStep:
    optimizers = dict(zip("GD", nets.optimizers, strict=True))
    shapes = {"A": (3, *size), "B": (3, *size)}
    return LayersStep(pix2pix(gan_mode), {"netG": nets.netG, "netD": nets.netD}, optimizers, shapes=shapes, dtype=dtype)


def train(step: LayersStep, real_A: Tensor, real_B: Tensor) -> Losses[Tensor]:
    return Losses(**step.train({"A": real_A, "B": real_B}))


def compare(nets: Trained, n: int, size: tuple[int, int] = SIZE, gan_mode: Any = "vanilla") -> None:
    """Three steps of each. Adam divides by the gradient's size, so where one is near 0 its rounding shows in lr."""
    twin = nets.twin()
    step = layers(twin, F64, size, gan_mode)
    for real_A, real_B in batches(n, size, F64):
        expected, losses = nets.reference(real_A, real_B, gan_mode), train(step, real_A, real_B)
        torch.testing.assert_close(torch.stack(losses), torch.stack(expected), rtol=1e-10, atol=1e-10)
    found = twin.tensors()
    for name, value in nets.tensors().items():
        torch.testing.assert_close(found[name], value, rtol=1e-7, atol=1e-9, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("n", [1, 2])
@pytest.mark.parametrize("norm", ["batch", "instance", "none"])
def test_networks(norm: str, n: int):
    compare(small_nets(levels=3, norm=norm, n_layers=2), n, (32, 16))


@pytest.mark.parametrize("gan_mode", OBJECTIVES)
def test_objectives(gan_mode: str):
    compare(small_nets(levels=3), 2, gan_mode=gan_mode)


def test_sides_that_G_pads():
    compare(small_nets(levels=3), 1, (17, 20))


def test_statistics_of_samples():
    nets = small_nets(levels=3)
    for net in (nets.netG, nets.netD):
        take_statistics_of_samples(net)
    compare(Trained(nets.netG, nets.netD), 2)


def test_dropout_draws_from_torch_s_generator():
    """Another mask than the reference's: torch.manual_seed repeats it, and the network's output varies."""
    results = []
    for seed in (1, 1, 2):
        nets = small_nets(levels=6, dropout="paper")
        step = layers(nets, F64, (64, 64))
        torch.manual_seed(seed)
        results.append([float(train(step, *batch).loss_G_L1) for batch in batches(1, (64, 64), F64, steps=2)])
    assert results[0] == results[1] != results[2]


def test_one_adam_over_two_networks():
    """CycleGAN has one over both its generators."""
    torch.manual_seed(0)
    nets = {name: nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), nn.Tanh()).double() for name in ("G_A", "G_B")}
    twins = copy.deepcopy(nets)

    def cycle(nets: Any, optimizers: Any, batch: Any) -> LossValues:
        optimizers["G"].zero_grad()
        loss = ((nets["G_B"](nets["G_A"](batch["A"])) - batch["A"]) ** 2).mean()
        loss.backward()
        optimizers["G"].step()
        return {"loss": loss.detach()}

    def adam(nets: Any) -> torch.optim.Adam:
        return torch.optim.Adam([p for net in nets.values() for p in net.parameters()], 1e-2)

    optimizer = adam(nets)
    step = LayersStep(cycle, twins, {"G": adam(twins)}, shapes={"A": (3, *SIZE)}, dtype=F64)
    for A, _ in batches(2, SIZE, F64):
        expected = cycle(nets, {"G": optimizer}, {"A": A})["loss"]
        torch.testing.assert_close(step.train({"A": A})["loss"], expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_lower_precisions_follow(dtype: torch.dtype, tolerance: float):
    """One step: float32 sums some thousand terms of 6e-8; bfloat16 rounds by 4e-3 at each of a dozen layers."""
    nets = small_nets(levels=4, dtype=torch.float32)
    ((real_A, real_B),) = batches(2, (32, 32), torch.float32, steps=1)
    step = layers(nets.twin(), dtype, (32, 32))
    expected, losses = nets.reference(real_A, real_B), train(step, real_A, real_B)
    torch.testing.assert_close(torch.stack(losses), torch.stack(expected), rtol=tolerance, atol=tolerance)
    assert {t.dtype for net in step.nets.values() for t in net.parameters()} == {torch.float32}


class Calls(TorchDispatchMode):
    """Our operators, with the shapes and types of what they get."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[Any, ...]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        namespace, _, name = func.name().partition("::")
        if namespace == "fastp2p":
            self.found.append((name, *((tuple(a.shape), a.dtype) for a in args if isinstance(a, Tensor))))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("norm", ["batch", "none"])
def test_its_record_is_what_it_calls(norm: str, dtype: torch.dtype):
    """So the tuner finds its convolutions, and the tables its bytes; the networks themselves stay as they are."""
    nets = small_nets(levels=4, norm=norm, dropout="upstream", dtype=torch.float32)
    step = layers(nets, dtype, (32, 32))
    before = {name: value.clone() for name, value in nets.tensors().items()}
    calls = record(step, 2)
    assert peak_bytes(step, 2) > 2 * 4 * 3 * 32 * 32
    assert all(torch.equal(value, before[name]) for name, value in nets.tensors().items())
    recorded = [
        (call.operator, *((a.shape, a.dtype) for a in call.args.values() if hasattr(a, "dtype"))) for call in calls
    ]
    ((real_A, real_B),) = batches(2, (32, 32), torch.float32, steps=1)
    with Calls() as found:
        train(step, real_A, real_B)
    assert [call for call in recorded if call[0] != "augment"] == found.found


def test_the_model_s_optimizers_go_on():
    """Their state_dict, their learning rate; and the reference's step after ours."""
    nets = small_nets(levels=3)
    twin = nets.twin()
    step = layers(twin, F64)
    all_batches = list(batches(1, SIZE, F64, steps=3))
    for index, (real_A, real_B) in enumerate(all_batches):
        for one in (nets, twin):
            one.optimizers[0].param_groups[0]["lr"] = 1e-3 / (index + 1)
        expected = nets.reference(real_A, real_B)
        losses = train(step, real_A, real_B) if index < 2 else twin.reference(real_A, real_B)
        torch.testing.assert_close(torch.stack(losses), torch.stack(expected), rtol=1e-10, atol=1e-10)
    assert twin.optimizers[0].state_dict()["state"][0]["step"] == 3


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_replay_is_the_step(dtype: torch.dtype):
    """Forward, backward and Adam as one CUDA graph."""
    one = small_nets(levels=5, ngf=16, dtype=torch.float32)
    other = one.twin()
    ordinary, graphed = layers(one, dtype, (32, 32)), GraphedStep(layers(other, dtype, (32, 32)))
    pairs = torch.randint(0, 256, (4, 32, 32, 6), dtype=torch.uint8, generator=generator(0))
    index, flip = torch.arange(4), torch.zeros(4, dtype=torch.bool)
    batch = Crops(pairs, index, torch.zeros(4, 2, dtype=torch.int64), flip, 32, 3)
    for step in range(WARM_UP + 3):
        expected, losses = ordinary.train(batch.cut(pairs.device)), graphed(batch)
        assert torch.equal(torch.stack([*losses.values()]), torch.stack([*expected.values()])), f"step {step}"
    found = other.tensors()
    assert all(torch.equal(value, found[name]) for name, value in one.tensors().items())


def test_what_it_refuses():
    nets = small_nets(levels=3, dtype=torch.float32)
    with pytest.raises(InputError, match=r"layers got torch\.float16, expected bfloat16"):
        layers(nets, torch.float16)
    step = layers(nets, torch.float32)
    A = torch.zeros(1, 3, *SIZE)
    for images in ({"A": A}, {"A": A, "B": A[..., :8]}, {"A": A, "B": A.int()}):
        with pytest.raises(InputError, match=r"this step was made for floating A \(3, 16, 16\), B"):
            step.train(images)
    nets.netG.double()
    with pytest.raises(InputError, match="were replaced since this step was made"):
        step.train({"A": A, "B": A})

    frozen = small_nets(levels=3, dtype=torch.float32)
    next(frozen.netG.parameters()).requires_grad_(False)
    with pytest.raises(
        InputError, match="got 1 parameters with requires_grad False, expected none; --engine reference"
    ):
        layers(frozen, torch.float32)
    other = small_nets(levels=3, dtype=torch.float32)
    other.optimizers[0] = torch.optim.AdamW(other.netG.parameters())  # type: ignore[call-overload]
    with pytest.raises(InputError, match=r"the optimizer AdamW, expected torch\.optim\.Adam; --engine reference"):
        layers(other, torch.float32)


def test_a_parameter_without_a_gradient_is_refused():
    net = nn.Sequential(nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1))
    adam = FlatAdam(torch.optim.Adam(net.parameters()), [net])
    net[0](torch.ones(1, 3, 2, 2)).sum().backward()
    with pytest.raises(InputError, match=r"2 parameters have no gradient in this step, the first of them 1\.weight"):
        adam.step()
    assert {float(state["step"]) for state in adam.state.values()} == {0.0}  # it counts no step


def test_autocast_on_meta_is_ended_by_an_error():
    conv, x = nn.Conv2d(3, 3, 1, device="meta"), torch.zeros(1, 3, 2, 2, device="meta")
    with autocast_to(torch.bfloat16, "meta"):
        assert conv(x).dtype == torch.bfloat16
    with pytest.raises(RuntimeError), autocast_to(torch.bfloat16, "meta"):
        conv(x[:, :2])
    assert conv(x).dtype == torch.float32
