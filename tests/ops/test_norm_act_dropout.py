"""norm_act's dropout: a mask that is a pure function of seed, step, layer and place, whoever computes it."""

from typing import Any

import pytest
import torch
from helpers.on_device import generator
from torch import Tensor

from fastp2p.ops import norm_act
from fastp2p.ops.philox import drop_below, keep_mask, philox


def rng_state() -> Tensor:
    return torch.tensor([20_25, 3])


def dropped(x: Tensor, rng: Tensor | None = None, layer: int = 0, dropout: float = 0.5) -> Tensor:
    """norm_act of ones under statistics that change nothing: 1 / (1 - dropout) where kept, else 0."""
    zeros = torch.zeros(1, x.shape[1])
    y, _ = norm_act(x, zeros, zeros + 1, eps=0.0, dropout=dropout, rng=rng_state() if rng is None else rng, layer=layer)
    return y


def test_philox_gives_the_published_bits():
    """The known answers of Random123, the authors' own code, for philox4x32-10."""
    pi = (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344, 0xA4093822, 0x299F31D0)
    answers = {
        (0,) * 6: (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8),
        (0xFFFFFFFF,) * 6: (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD),
        pi: (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    }
    for words, expected in answers.items():
        c0, c1, c2, c3, k0, k1 = (torch.tensor(word) for word in words)
        assert tuple(word.item() for word in philox((k0, k1), (c0, c1, c2, c3))) == expected


@pytest.mark.parametrize(
    ("rng", "layer", "dropout"),
    [
        ((0, 0), 0, 0.5),
        ((1, 0), 0, 0.1),
        ((2**40 + 7, 2**33 + 5), 2**32 - 1, 0.5),
        ((-1, -1), 2**31, 0.9),
        ((-(2**63), 2**63 - 1), 1, 1e-3),
        ((3, 4), 5, 1 - 2**-40),  # the limit is 2^32: none is kept
        ((3, 4), 5, 2**-40),  # the limit is 0: all are kept
    ],
)
@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (2, 5, 3, 17), (3, 33, 2, 2), (1, 64, 5, 3)])
def test_mask_is_that_of_keep_mask(shape: tuple[int, ...], rng: tuple[int, int], layer: int, dropout: float):
    x = torch.ones(shape)
    y = dropped(x, torch.tensor(rng), layer, dropout)
    keep = keep_mask(x, torch.tensor(rng), layer, dropout)
    assert torch.equal(y != 0, keep)
    torch.testing.assert_close(y[keep], (x / (1 - dropout))[keep])


def test_kernel_and_reference_drop_below_the_same_limit():
    kernel = pytest.importorskip("fastp2p.kernels.norm_tile", reason="needs triton")
    for dropout in (0.0, 2**-40, 1e-3, 0.1, 1 / 3, 0.5, 0.9, 1 - 2**-40):
        assert kernel.drop_below(dropout) == drop_below(dropout)


def test_layout_and_groups_do_not_change_the_mask():
    """Nor do other channels in the same buffer: an element's place is the one in its own image batch."""
    keep = keep_mask(torch.ones(2, 5, 3, 7), rng_state(), 0, 0.5)
    buffer = torch.ones(2, 3, 7, 12).permute(0, 3, 1, 2)
    for x in (torch.ones(2, 5, 3, 7), buffer[:, 3:8], torch.ones(5, 2, 7, 3).permute(1, 0, 3, 2)):
        assert torch.equal(dropped(x) != 0, keep)
    zeros = torch.zeros(2, 5)
    y, y2 = norm_act(
        buffer[:, :5], zeros, zeros + 1, activation="relu", second="leaky_relu", dropout=0.5, rng=rng_state()
    )
    assert torch.equal(y != 0, keep)
    assert torch.equal(y2 != 0, keep)


@pytest.mark.parametrize("dropout", [0.1, 0.5, 0.9])
def test_keep_rate(dropout: float):
    """Within five standard deviations of a fair draw, over all and in each channel."""
    keep = (dropped(torch.ones(4, 16, 32, 16), dropout=dropout) != 0).double()
    for sample in (keep, *keep.unbind(1)):
        bound = 5 * (dropout * (1 - dropout) / sample.numel()) ** 0.5
        assert abs(sample.mean() - (1 - dropout)) <= bound


def test_seed_step_and_layer_each_give_another_mask():
    """Independent ones: they agree in half of their places, within five standard deviations."""
    x = torch.ones(2, 16, 8, 16)
    drawn = [((1, 2), 3), ((1, 3), 3), ((2, 2), 3), ((1, 2), 4), ((1 + 2**32, 2), 3), ((2, 1), 3), ((1, 3), 2)]
    masks = [dropped(x, torch.tensor(rng), layer) != 0 for rng, layer in drawn]
    for i, one in enumerate(masks):
        for other in masks[:i]:
            agreement = (one == other).double().mean()
            assert abs(agreement - 0.5) <= 5 * 0.5 / x.numel() ** 0.5


def test_step_is_read_from_memory():
    """The same tensors give the next step its own mask, as a captured graph needs it."""
    rng = rng_state()
    x = torch.ones(2, 5, 3, 7)
    before = dropped(x, rng)
    rng[1] += 1
    assert torch.equal(dropped(x, rng) != 0, keep_mask(x, rng_state() + torch.tensor([0, 1]), 0, 0.5))
    assert not torch.equal(dropped(x, rng), before)


@pytest.mark.parametrize("fixed_stats", [False, True])
def test_backward_makes_the_same_mask(fixed_stats: bool):
    """With one group and statistics that change nothing, dx under fixed statistics is dy times the mask."""
    x = torch.randn(2, 5, 3, 7, generator=generator(0)).requires_grad_()
    mean, var = torch.zeros(1, 5), torch.ones(1, 5)
    y, y2 = norm_act(
        x, mean, var, eps=0.0, second="none", dropout=0.5, rng=rng_state(), layer=7, fixed_stats=fixed_stats
    )
    keep = keep_mask(x, rng_state(), 7, 0.5)
    assert torch.equal(y, x * keep * 2)
    (dx,) = torch.autograd.grad(y.sum() + y2.sum(), x)
    dz = keep * 4.0
    if not fixed_stats:
        dz = dz - dz.mean((0, 2, 3), keepdim=True) - x * (dz * x).mean((0, 2, 3), keepdim=True)
    torch.testing.assert_close(dx, dz.detach())


def test_no_dropout_draws_nothing():
    """Not even with an rng at hand."""
    x = torch.ones(2, 5, 3, 7)
    assert torch.equal(dropped(x, dropout=0.0), x)


@pytest.mark.kernels
def test_configurations_make_the_same_mask():
    from fastp2p.kernels import norm_act as kernel

    x = torch.ones(2, 65, 3, 7)
    keep = keep_mask(x, rng_state(), 3, 0.5)
    mean, var = torch.zeros(2, 65), torch.ones(2, 65)
    settings: tuple[Any, ...] = (0.0, 0, 0.2, -1, 0.5, 3, True)
    for config in kernel.CONFIGS:
        y, _ = kernel.norm_act(x, mean, var, None, None, rng_state(), *settings, config=config)
        dx, *_ = kernel.norm_act_backward(x, None, x, mean, var, None, None, rng_state(), *settings, config=config)
        assert torch.equal(y, keep * 2.0)
        assert torch.equal(dx, keep * 2.0)
