"""Link 4 of the proof: float32 follows the reference, bfloat16 errs no more than autocast, float16 skips and halves."""

import itertools

import pytest
import torch
from helpers.nets import Trained, batches, small_nets
from torch import Tensor, nn

from fastp2p.engine import LossScale
from fastp2p.models.pix2pix.losses import Losses
from fastp2p.models.pix2pix.networks import PatchDiscriminator, UnetGenerator
from fastp2p.nn.init import init_weights

SIZE = (64, 64)
SCALE = 1024.0  # float16's losses; at the first scale a few steps are skipped until it fits
STILL = 1e-12  # learning rate: so small that G's gradient is through D as it was


def loss_scale() -> Tensor:
    """The state of a loss scale that fits these networks."""
    return torch.tensor([SCALE, 0.0])


def recipe_nets(lr: float, seed: int = 0) -> Trained:
    """Narrow, but deep enough for every kind of layer, with the recipe's weights."""
    torch.manual_seed(seed)
    netG = UnetGenerator(levels=6, ngf=8, dropout="none")
    netD = PatchDiscriminator(ndf=8)
    for net in (netG, netD):
        init_weights(net)
    return Trained(netG, netD, lr=lr)


def test_twenty_small_steps_in_float32():
    """Where nothing is amplified, twenty steps keep to rounding: 1e-5 is some hundred times float32's 6e-8."""
    nets = recipe_nets(lr=2e-6)
    twin = nets.twin()
    step = twin.fused(SIZE, torch.float32)
    for real_A, real_B in batches(2, SIZE, torch.float32, steps=20):
        expected, losses = nets.reference(real_A, real_B), step(real_A, real_B)
        torch.testing.assert_close(torch.stack(losses), torch.stack(expected), rtol=1e-5, atol=1e-6)


def test_twenty_steps_at_the_recipe_s_learning_rate_in_float32():
    """Adam's first steps are lr * sign(gradient), so one rounding that turns a sign, or a ReLU, moves the losses by
    1e-3 within twenty steps: the reference's float32 stands that far from its own float64. Ours must not be farther:
    the distances summed over steps and seeds, within a factor of two.
    """
    theirs = ours = 0.0
    for seed in range(4):
        nets = recipe_nets(lr=2e-4, seed=seed)
        twin, exact = nets.twin(), nets.twin()
        exact = Trained(exact.netG.double(), exact.netD.double(), lr=2e-4)
        step = twin.fused(SIZE, torch.float32)
        for real_A, real_B in batches(2, SIZE, torch.float32, steps=20, seed=seed):
            truth = torch.stack(exact.reference(real_A.double(), real_B.double()))
            theirs += float((torch.stack(nets.reference(real_A, real_B)) / truth - 1).abs().max())
            ours += float((torch.stack(step(real_A, real_B)) / truth - 1).abs().max())
    assert ours < 2 * theirs
    assert theirs > 1e-6, "float32 did not round, so this compared nothing"


def autograd_gradients(nets: Trained) -> list[Tensor]:
    """G's gradients and D's, each flat, as the reference step left them."""
    return [torch.cat([p.grad.double().flatten() for p in net.parameters()]) for net in (nets.netG, nets.netD)]


def fused_gradients(
    nets: Trained, dtype: torch.dtype, real_A: Tensor, real_B: Tensor
) -> tuple[list[Tensor], Losses[Tensor]]:
    """Likewise, gathered in the arenas; and the losses."""
    step = nets.fused(tuple(real_A.shape[2:]), dtype, reduce=lambda grad: None, loss_scale=loss_scale())
    losses = step(real_A, real_B)
    found = []
    for net, arena in ((nets.netG, step.netG.arena), (nets.netD, step.netD.arena)):
        found.append(torch.cat([arena.grads[id(p)].double().flatten() for p in net.parameters()]))
    return found, losses


def relative_error(value: Tensor, exact: Tensor) -> float:
    return float((value - exact).norm() / exact.norm())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_errs_at_most_twice_as_much_as_autocast(dtype: torch.dtype):
    """Gradients and losses against float64, summed over seeds: as many roundings as autocast's, in other places.

    One seed says little: a rounding that turns the sign of a ReLU's input or of the L1 loss moves a whole gradient.
    """
    theirs, ours = torch.zeros(3), torch.zeros(3)  # relative errors of G's gradient, of D's, of the losses
    for seed in range(4):
        nets = recipe_nets(STILL, seed)
        real_A, real_B = next(batches(1, SIZE, torch.float32, seed=seed))
        exact = nets.twin()
        exact = Trained(exact.netG.double(), exact.netD.double(), lr=STILL)
        truth = torch.stack(exact.reference(real_A.double(), real_B.double()))
        autocast = nets.twin()
        with torch.autocast(real_A.device.type, dtype):
            autocast_losses = autocast.reference(real_A, real_B)
        found, losses = fused_gradients(nets.twin(), dtype, real_A, real_B)
        scale = SCALE if dtype == torch.float16 else 1.0
        rows = zip(
            [*autograd_gradients(exact), truth],
            [*autograd_gradients(autocast), torch.stack(autocast_losses).double()],
            [*(gradient / scale for gradient in found), torch.stack(losses).double()],
            strict=True,
        )
        for i, (of_exact, of_autocast, of_ours) in enumerate(rows):
            theirs[i] += relative_error(of_autocast, of_exact)
            ours[i] += relative_error(of_ours, of_exact)
    assert (ours < 2 * theirs).all(), f"G, D, losses: ours {ours.tolist()}, autocast's {theirs.tolist()}"
    # float32 rounds to 6e-8; on one CPU float16 moved the losses by no more than 9.7e-6 in all
    assert (theirs > 1e-6).all(), "autocast did not round, so this compared nothing"


def test_float16_follows_float32():
    """With the scale and its inverse in place, twenty steps stay as near to float32 as rounding to 11 bits allows."""
    nets = recipe_nets(lr=2e-4)
    twin = nets.twin()
    step = twin.fused(SIZE, torch.float16, loss_scale=loss_scale())
    for real_A, real_B in batches(2, SIZE, torch.float32, steps=20):
        expected, losses = nets.reference(real_A, real_B), step(real_A, real_B)
        torch.testing.assert_close(torch.stack(losses), torch.stack(expected), rtol=0.03, atol=0.03)
    assert step.loss_scale.state.tolist() == [SCALE, 20]


@pytest.mark.parametrize("network", ["netG", "netD"])
def test_an_infinity_skips_its_network_and_halves_the_scale(network: str):
    """An infinite gradient in one network's second step: it keeps every bit, the other one trains, the scale halves."""
    nets = recipe_nets(lr=2e-4)
    state, calls = loss_scale(), itertools.count()
    poisoned_call = {"netD": 2, "netG": 3}[network]  # D's gradients come before G's

    def poison(grad: Tensor) -> None:
        if next(calls) == poisoned_call:
            grad[5] = float("inf")

    step = nets.fused(SIZE, torch.float16, loss_scale=state, reduce=poison)
    data = batches(1, SIZE, torch.float32)
    step(*next(data))
    before = {name: value.clone() for name, value in nets.tensors().items()}
    step(*next(data))
    assert state.tolist() == [SCALE / 2, 0]
    after = nets.tensors()
    own = [f"{network[-1]}.{name}" for name, _ in getattr(nets, network).named_parameters()]
    assert all(torch.equal(before[name], after[name]) for name in before if name.startswith(tuple(own)))
    other = "D" if network == "netG" else "G"
    assert any(not torch.equal(before[name], after[name]) for name in before if name.startswith(f"{other}.model"))
    step(*next(data))
    assert state.tolist() == [SCALE / 2, 1]
    assert all(value.isfinite().all() for value in nets.tensors().values())
    assert any(not torch.equal(before[name], nets.tensors()[name]) for name in own)


def test_the_scale_doubles_after_so_many_good_steps():
    scale = LossScale(torch.tensor([1024.0, 1998.0]))
    grad = torch.ones(3)
    for expected in ([1024.0, 1999.0], [2048.0, 0.0]):
        assert float(scale.unscale(grad)) == 1 / 1024
        scale.update()
        assert scale.state.tolist() == expected
    assert float(scale.unscale(torch.tensor([1.0, float("nan")]))) == 0
    scale.update()
    assert scale.state.tolist() == [1024.0, 0.0]


def test_the_scale_is_taken_out_again():
    """Adam's moments after one step, whatever the scale, are those of float32 but for float16's rounding. A weight
    would not show it: Adam divides by the gradient's size."""
    nets = recipe_nets(lr=2e-4)
    exact = nets.twin()
    batch = next(batches(1, SIZE, torch.float32))
    exact.fused(SIZE, torch.float32)(*batch)
    for scale in (SCALE, SCALE / 8):
        found = nets.twin()
        found.fused(SIZE, torch.float16, loss_scale=torch.tensor([scale, 0.0]))(*batch)
        for name in ("G.model.model.3.weight.exp_avg", "D.model.11.weight.exp_avg", "D.model.11.weight.exp_avg_sq"):
            assert relative_error(found.tensors()[name], exact.tensors()[name]) < 0.02


def test_weights_keep_what_bfloat16_cannot_hold():
    """Ten steps of 1e-6 on weights of 1, each far below bfloat16's spacing, add up.

    A step of Adam exceeds the learning rate where the gradient grows: by 2.5 % on an H200's random images, 2x allowed.
    """
    nets = small_nets(dtype=torch.float32)
    for group in (optimizer.param_groups[0] for optimizer in nets.optimizers):
        group["lr"] = 1e-6
    weight = nets.netD.model[0].weight
    nn.init.ones_(weight)
    step = nets.fused((16, 16), torch.bfloat16)
    for batch in batches(1, (16, 16), torch.float32, steps=10):
        step(*batch)
    assert 1e-6 < float((weight - 1).detach().abs().max()) <= 2e-5
    assert torch.equal(step.netD.arena.weight(step.netD.plan.layers[0]).float(), weight.bfloat16().float())
