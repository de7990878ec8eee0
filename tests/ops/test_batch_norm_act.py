from typing import Any

import pytest
import torch
from helpers.on_device import generator
from torch import Tensor, nn

from fastp2p.errors import InputError
from fastp2p.ops import batch_norm_act_ref, norm_stats, running_stats

operators = torch.ops.fastp2p
SHAPES = [(2, 3, 1, 1), (2, 5, 3, 17), (4, 65, 5, 7), (2, 130, 9, 8)]
SETTINGS: dict[str, tuple[Any, ...]] = {  # eps, activation, slope, second, dropout, layer
    "lrelu+relu": (1e-5, 2, 0.2, 1, 0.0, 0),
    "relu": (1e-5, 1, 0.2, -1, 0.0, 0),
    "dropout": (1e-5, 0, 0.2, -1, 0.5, 3),
}


def arguments(shape: tuple[int, ...], groups: int, settings: tuple[Any, ...], dtype: torch.dtype) -> list[Any]:
    """x, its statistics, weight, bias, rng, averages, momentum."""
    draws = generator(sum(shape))
    x = (1 + 2 * torch.randn(shape, generator=draws)).to(dtype).contiguous(memory_format=torch.channels_last)
    weight, bias, running_mean, running_var = torch.randn(4, shape[1], generator=draws)
    rng = torch.tensor([7, 11]) if settings[4] else None
    return [x, *norm_stats(x, stat_groups=groups), weight, bias, rng, running_mean, running_var.abs(), 0.1, *settings]


def copied(args: list[Any]) -> list[Any]:
    return [arg.clone() if isinstance(arg, Tensor) else arg for arg in args]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize("shape", SHAPES)
def test_is_norm_act_and_running_stats(shape: tuple[int, ...], settings: tuple[Any, ...], dtype: torch.dtype):
    """To the last bit: it is their arithmetic."""
    for groups in (1, 2) if shape[0] * shape[2] > 2 else (1,):
        args = arguments(shape, groups, settings, dtype)
        apart = copied(args)
        results = operators.batch_norm_act(*args)
        expected = operators.norm_act(*apart[:6], *settings, False)
        running_stats(*apart[6:8], *apart[1:3], n_values=args[0].numel() // args[1].numel(), momentum=0.1)
        for ours, theirs in zip((*results, *args[6:8]), (*expected, *apart[6:8]), strict=True):
            assert torch.equal(ours, theirs)


def test_is_batch_norm():
    """Three batches, one after the other, as PyTorch's layer takes them."""
    layer = nn.BatchNorm2d(5)
    averages = (layer.running_mean.clone(), layer.running_var.clone())
    for seed in range(3):
        x = 2 + 3 * torch.randn(4, 5, 2, 3, generator=generator(seed))
        stats = norm_stats(x, stat_groups=1)
        y, _ = operators.batch_norm_act(x, *stats, None, None, None, *averages, 0.1, 1e-5, 0, 0.0, -1, 0.0, 0)
        torch.testing.assert_close(y, layer(x).detach())
    torch.testing.assert_close(averages[0], layer.running_mean)
    torch.testing.assert_close(averages[1], layer.running_var)


def test_float64_is_computed_in_float64():
    args = arguments((2, 5, 3, 7), 2, SETTINGS["lrelu+relu"], torch.float64)
    args = [arg.double() if isinstance(arg, Tensor) else arg for arg in args]
    expected_args = copied(args)
    results, expected = operators.batch_norm_act(*args), batch_norm_act_ref(*expected_args)
    for ours, exact in zip((*results, *args[6:8]), (*expected, *expected_args[6:8]), strict=True):
        assert ours.dtype == torch.float64
        torch.testing.assert_close(ours, exact, rtol=1e-13, atol=1e-13)


def test_has_no_gradient():
    args = arguments((2, 5, 3, 7), 1, SETTINGS["relu"], torch.float32)
    before = args[6].clone()
    args[0].requires_grad_()
    with pytest.raises(InputError, match="batch_norm_act: has no gradient; give it tensors that are detached"):
        operators.batch_norm_act(*args)
    assert torch.equal(args[6], before)
    with torch.no_grad():
        operators.batch_norm_act(*args)
    assert not torch.equal(args[6], before)


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_opcheck(settings: tuple[Any, ...]):
    args = tuple(arguments((2, 3, 4, 5), 2, settings, torch.bfloat16))
    torch.library.opcheck(operators.batch_norm_act.default, args)


@pytest.mark.kernels
def test_every_configuration():
    from fastp2p.kernels import batch_norm_act, norm_tile

    args = arguments((4, 65, 5, 7), 2, SETTINGS["lrelu+relu"], torch.float32)
    expected_args = [arg.double() if isinstance(arg, Tensor) else arg for arg in args]
    expected = batch_norm_act_ref(*expected_args)
    for config in norm_tile.CONFIGS:
        ours = copied(args)
        results = batch_norm_act.batch_norm_act(*ours, config=config)
        for result, exact in zip((*results, *ours[6:8]), (*expected, *expected_args[6:8]), strict=True):
            torch.testing.assert_close(result.double(), exact, rtol=1e-6, atol=1e-5)  # some float32 roundings of z
