"""conv and conv_transpose as data gradients that flow on into a normalised layer."""

from typing import Any, NamedTuple

import pytest
import torch
from helpers.gemm_shapes import configurations
from helpers.on_device import generator
from torch import Tensor

from fastp2p import ops
from fastp2p.norm_gate import NormGate
from fastp2p.ops import norm_act_backward_ref, norm_dx_ref
from fastp2p.ops.activation import ACTIVATIONS
from fastp2p.ops.library import INTERPRETED

operators = torch.ops.fastp2p
LRELU, RELU = ACTIVATIONS.index("leaky_relu"), ACTIVATIONS.index("relu")


class Case(NamedTuple):
    """How the norm before is, and what else the result holds."""

    groups: int  # those of statistics
    first: int  # channels before the norm's
    addend: bool  # whether a gradient of a second result has come
    dropout: float
    affine: bool = True
    sums: bool = True


CASES = [
    Case(1, 0, False, 0.0),
    Case(2, 0, True, 0.0),
    Case(4, 7, False, 0.5),
    Case(2, 13, True, 0.5, affine=False),
    Case(1, 64, True, 0.0),
    Case(1, 3, True, 0.0, sums=False),
]


def draw(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=generator(sum(shape))).to(dtype).contiguous(memory_format=torch.channels_last)


def arguments(operator: str, case: Case, dtype: torch.dtype = torch.float32, channels: int = 19) -> tuple[Any, ...]:
    """A call for four images of 6 x 6 pixels. The addend is a slice of channels, as from a concatenation."""
    gate = 1 + 2 * draw(4, channels, 6, 6, dtype=dtype)
    mean, var = ops.norm_stats(gate, stat_groups=case.groups)
    weight, bias = torch.randn(2, channels, generator=generator(1)) if case.affine else (None, None)
    addend = draw(4, channels + 5, 6, 6, dtype=dtype)[:, 5:] if case.addend else None
    rng = torch.tensor([2**40 + 3, 5]) if case.dropout else None
    second = RELU if case.addend else -1
    norm = NormGate(mean, var, weight, bias, rng, addend, case.first, 1e-5, second, case.dropout, 7)
    after = (LRELU, 0.2, case.groups if case.sums else 0, *norm)
    n_out = channels + case.first
    if operator == "conv":
        x, w = draw(4, 32, 12, 12, dtype=dtype), (draw(n_out, 32, 4, 4) / 20).to(dtype)
        return x, w, None, gate, 2, 1, *after
    x, w = draw(4, 32, 3, 3, dtype=dtype), (draw(32, n_out, 4, 4) / 10).to(dtype)
    return x, None, w, None, gate, 2, 1, 6, 6, *after


def in_double(args: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(arg.double() if isinstance(arg, Tensor) and arg.is_floating_point() else arg for arg in args)


def assert_close(ours: tuple[Tensor, ...], operator: str, args: tuple[Any, ...]) -> None:
    """dz to some float32 roundings of sums of 500 products, or three of a lower dtype; sums to those of 144 pixels.

    An activation's derivative jumps where rounding turns the sign of z; the values are such that none is that small.
    """
    expected = getattr(ops, f"{operator}_ref")(*in_double(args))
    low = ours[0].dtype != torch.float32
    size = float(expected[0].abs().amax())
    tolerance = 3 * torch.finfo(ours[0].dtype).eps * size if low else 1e-5 * size
    torch.testing.assert_close(ours[0].double(), expected[0], rtol=0, atol=tolerance)
    assert ours[0].is_contiguous(memory_format=torch.channels_last)
    for one, other in zip(ours[1:], expected[1:], strict=True):
        assert one.shape == other.shape
        assert one.dtype == torch.float32
        torch.testing.assert_close(one.double(), other, rtol=0, atol=144 * 2 * tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("operator", ["conv", "conv_transpose"])
def test_against_float64(operator: str, case: Case, dtype: torch.dtype):
    args = arguments(operator, case, dtype)
    assert_close(getattr(operators, operator)(*args), operator, args)


@pytest.mark.parametrize("case", CASES[:5])
@pytest.mark.parametrize("operator", ["conv", "conv_transpose"])
def test_with_norm_dx_it_is_norm_act_backward(operator: str, case: Case):
    """In float64: the data gradient, and then the gradient of the whole layer before."""
    args = in_double(arguments(operator, case))
    *plain, activation, slope, groups, mean, var, weight, bias, rng, addend, first, eps, second, dropout, layer = args
    gate_at = 3 if operator == "conv" else 4
    gate, plain[gate_at] = plain[gate_at], None
    out, sum_dz, sum_dz_xhat = getattr(operators, operator)(*args)
    dy, _, _ = getattr(operators, operator)(*plain, 0, 0.0, 0)
    assert torch.equal(out[:, :first], dy[:, :first])
    norm_act = (gate, mean, var, weight, bias, rng, eps, activation, slope, second, dropout, layer, False)
    expected = norm_act_backward_ref(dy[:, first:], addend, *norm_act)
    found = norm_dx_ref(out[:, first:], gate, mean, var, weight, sum_dz, sum_dz_xhat, eps)
    assert groups == len(mean)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-11)


@pytest.mark.parametrize("operator", ["conv", "conv_transpose"])
def test_twice_the_same_bits(operator: str):
    args = arguments(operator, CASES[3], torch.bfloat16, channels=130)
    for one, other in zip(*(getattr(operators, operator)(*args) for _ in range(2)), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("operator", ["conv", "conv_transpose"])
def test_opcheck(operator: str):
    args = arguments(operator, CASES[3], torch.bfloat16)
    torch.library.opcheck(getattr(operators, operator).default, args)


@pytest.mark.kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("split", [1, 3])
@pytest.mark.parametrize("operator", ["conv", "conv_transpose"])
def test_every_configuration(operator: str, split: int, dtype: torch.dtype):
    from fastp2p.kernels import conv, conv_transpose

    launch = conv.conv if operator == "conv" else conv_transpose.conv_transpose
    args = arguments(operator, Case(2, 13, True, 0.0), dtype)
    for config in configurations(dtype):
        assert_close(launch(*args, config=config | {"SPLIT": split}), operator, args)


@pytest.mark.kernels
@pytest.mark.skipif(not INTERPRETED, reason="it replaces a function that kernels call")
@pytest.mark.parametrize("one_share", [64, 2])
@pytest.mark.parametrize("operator", ["conv", "conv_transpose"])
def test_groups_and_columns_of_tiles_count_apart(operator: str, one_share: int, monkeypatch: pytest.MonkeyPatch):
    """Four groups, five columns of tiles, one share or several: no two sums count on one place.

    The interpreter runs programs one after the other, so a place that two share would not show in the sums.
    """
    from helpers.counting import count_on

    from fastp2p.kernels import conv, conv_transpose, gemm, norm_stats, sums

    counted = torch.zeros(4096, dtype=torch.int32)
    monkeypatch.setattr(norm_stats, "ONE_SHARE", one_share)
    monkeypatch.setattr(gemm, "counters", lambda n, like: counted[:n])
    monkeypatch.setattr(sums, "is_last", count_on)
    launch = conv.conv if operator == "conv" else conv_transpose.conv_transpose
    config = next(c for c in configurations(torch.float32) if c["BLOCK_M"] == c["BLOCK_N"] == 16)
    launch(*arguments(operator, Case(4, 0, True, 0.0), channels=67), config=config | {"SPLIT": 1})
    tiles = 3 if operator == "conv" else 4  # a group's: of 36 pixels, or of four phases with 9 each
    share = norm_stats.share_of(tiles)
    sizes = [share] * (tiles // share) + [tiles % share] * (tiles % share > 0)
    sizes += [len(sizes)] if len(sizes) > 1 else []
    assert sorted(counted[counted > 0].tolist()) == sorted(sizes * 4 * 5)


@pytest.mark.kernels
@pytest.mark.parametrize("case", [CASES[1], CASES[3]])
@pytest.mark.parametrize("operator", ["conv", "conv_transpose"])
def test_after_the_convolution_of_aten(operator: str, case: Case):
    from fastp2p.kernels import aten

    args = arguments(operator, case)
    assert_close(getattr(aten, operator)(*args), operator, args)


@pytest.mark.usefixtures("cpp_serves")
@pytest.mark.parametrize(
    ("number", "value", "said"),
    [
        (3, None, "got gate_mean without a gate"),
        (10, None, "got gate_mean without gate_var"),
        (11, torch.zeros(4), r"got weight \(4\) .*, expected \(19\)"),
        (14, torch.zeros(4, 19, 6, 5), r"got addend .*, expected \(4, 19, 6, 6\)"),
        (15, 5, "first 5, expected the channels of the result, 19, from first on"),
        (8, 1, "got stat_groups 1, expected 2 as gate_mean has, or 0"),
    ],
)
def test_cpp_refuses(number: int, value: Any, said: str):
    args = list(arguments("conv", CASES[1]))
    args[number] = value
    with pytest.raises(RuntimeError, match=said):
        operators.conv(*args)
