import pytest
import torch
from helpers.on_device import generator, with_threads
from torch import Tensor

from fastp2p.errors import InputError
from fastp2p.ops import norm_stats, norm_stats_ref

UNIT = torch.finfo(torch.float32).eps / 2  # one rounding
SHAPES = [(1, 1, 1, 1), (1, 3, 1, 2), (2, 5, 3, 17), (3, 33, 2, 3), (4, 64, 2, 1), (4, 1, 3, 3), (2, 3, 17, 17)]


def values(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Channels of different mean and spread, one of them constant."""
    x = torch.randn(shape, generator=generator(sum(shape)))
    x = x * torch.linspace(3, 0, shape[1]).view(-1, 1, 1) + torch.linspace(5, -2, shape[1]).view(-1, 1, 1)
    return x.to(dtype).contiguous(memory_format=torch.channels_last)


def assert_close(ours: tuple[Tensor, Tensor], x: Tensor, stat_groups: int) -> None:
    """16 float32 roundings, a tree of additions, of the values for the mean and of the spread for the variance.

    And the error of a mean around which deviations are taken enters the variance: as itself times the spread, squared.
    """
    x = x.double()
    mean, var = norm_stats_ref(x, stat_groups)
    size = x.abs().unflatten(0, (stat_groups, -1)).amax((1, 3, 4))
    mean_error = 16 * UNIT * size
    assert [t.dtype for t in ours] == [torch.float32] * 2
    assert [t.shape for t in ours] == [mean.shape, var.shape]
    assert ((ours[0].double() - mean).abs() <= mean_error).all()
    assert ((ours[1].double() - var).abs() <= 16 * UNIT * var + mean_error * (var.sqrt() + mean_error)).all()
    assert (ours[1] >= 0).all()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_equals_float64(shape: tuple[int, ...], dtype: torch.dtype):
    x = values(*shape, dtype=dtype)
    for stat_groups in {1, shape[0], 2 if shape[0] % 2 == 0 else 1}:
        assert_close(norm_stats(x, stat_groups=stat_groups), x, stat_groups)


def test_groups_are_consecutive_images():
    x = values(4, 5, 3, 3)
    mean, var = norm_stats(x, stat_groups=2)
    for group, half in enumerate(x.chunk(2)):
        half_mean, half_var = norm_stats(half, stat_groups=1)
        assert torch.equal(mean[group], half_mean[0])
        assert torch.equal(var[group], half_var[0])


def test_no_groups_no_statistics():
    mean, var = norm_stats(values(4, 5, 3, 3).bfloat16(), stat_groups=0)
    assert mean.shape == var.shape == (0, 5)
    assert mean.dtype == var.dtype == torch.float32


@pytest.mark.parametrize("value", [0.0, 0.1, -1000.0, 65504.0])
def test_a_constant_has_no_variance(value: float):
    """Whatever the rounding of its mean: the variance is that of the deviations from it."""
    x = torch.full((2, 5, 11, 13), value)
    mean, var = norm_stats(x, stat_groups=1)
    torch.testing.assert_close(mean, torch.full((1, 5), value), rtol=16 * UNIT, atol=0)
    assert (var <= (16 * UNIT * value) ** 2).all()


@pytest.mark.parametrize("spread", [1.0, 0.1])
def test_a_small_spread_around_a_large_mean(spread: float):
    """A difference of squares would be off by 1000² roundings: 0.06, more than the smaller variance has."""
    x = 1000 + spread * torch.randn(2, 3, 16, 16, generator=generator(0))
    mean, var = norm_stats(x, stat_groups=1)
    exact_mean, exact_var = norm_stats_ref(x.double(), 1)
    torch.testing.assert_close(mean.double(), exact_mean, rtol=4 * UNIT, atol=0)
    torch.testing.assert_close(var.double(), exact_var, rtol=1e-4, atol=0)


def test_any_strides():
    x = values(2, 5, 3, 7)
    wider = torch.full((2, 3, 7, 12), torch.nan).permute(0, 3, 1, 2)[:, 4:9]
    taller = torch.full((2, 5, 7, 5), torch.nan).permute(0, 3, 1, 2)[:, :, 1:4]
    strided = torch.full((2, 5, 3, 14), torch.nan)[..., ::2]
    for view in (x.contiguous(), wider.copy_(x), taller.copy_(x), strided.copy_(x), x[:1].expand(2, 5, 3, 7)):
        assert_close(norm_stats(view, stat_groups=2), view, 2)


def test_nan_stays_in_its_channel_and_group():
    x = values(2, 5, 3, 7)
    x[1, 2, 0, 3] = torch.nan
    for stats in norm_stats(x, stat_groups=2):
        assert stats.isnan().nonzero().tolist() == [[1, 2]]


def test_twice_the_same_bits():
    x = values(2, 65, 19, 11)
    for one, other in zip(norm_stats(x, stat_groups=1), norm_stats(x, stat_groups=1), strict=True):
        assert torch.equal(one, other)


def test_float64_is_computed_in_float64():
    """To within a few of its roundings: float32 anywhere on the way would show as 1e-7."""
    x = values(2, 5, 3, 7).double()
    for ours, exact in zip(norm_stats(x, stat_groups=2), norm_stats_ref(x, 2), strict=True):
        assert ours.dtype == torch.float64
        torch.testing.assert_close(ours, exact, rtol=1e-13, atol=1e-13)


@pytest.mark.usefixtures("cpp_serves")
@pytest.mark.parametrize("mean", [1.0, 100.0])
def test_a_spread_far_smaller_than_the_mean(mean: float):
    """float32 stores the values to 4e-6 of a spread of 1e-3 around 100; a dozen roundings of the values stored."""
    x = (mean + 1e-3 * values(3, 257, 17, 2)).contiguous(memory_format=torch.channels_last)
    for stat_groups in (1, 3):
        _, var = norm_stats(x, stat_groups=stat_groups)
        _, exact = norm_stats_ref(x.double(), stat_groups)
        torch.testing.assert_close(var.double(), exact, rtol=1e-6, atol=0)


@pytest.mark.usefixtures("cpp_serves")
def test_the_same_bits_with_any_number_of_threads():
    x = values(4, 64, 64, 64)
    results = with_threads(lambda: norm_stats(x, stat_groups=2))
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))


def test_has_no_gradient_of_its_own():
    x = values(2, 5, 3, 7).requires_grad_()
    assert not any(stats.requires_grad for stats in norm_stats(x, stat_groups=1))
    mean, _ = torch.ops.fastp2p.norm_stats(x, 1)
    with pytest.raises(InputError, match="norm_stats: has no gradient"):
        mean.sum().backward()


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_opcheck(layout: torch.memory_format):
    x = torch.randn(2, 3, 4, 5).contiguous(memory_format=layout)
    torch.library.opcheck(torch.ops.fastp2p.norm_stats.default, (x, 0))
    torch.library.opcheck(torch.ops.fastp2p.norm_stats.default, (x.bfloat16(), 2))


@pytest.mark.kernels
def test_every_configuration():
    from fastp2p.kernels import norm_stats as kernel

    x = values(2, 65, 7, 13)
    for config in kernel.CONFIGS:
        assert_close(kernel.norm_stats(x, 2, config=config), x, 2)


@pytest.mark.kernels
@pytest.mark.parametrize("tiles", [8, 9, 63, 64])
def test_more_tiles_than_one_step_of_the_merge_takes(tiles: int):
    from fastp2p.kernels import norm_stats as kernel

    config = next(config for config in kernel.CONFIGS if config["BLOCK_C"] == 128)  # 8 tiles a step
    x = values(2, 3, tiles, config["BLOCK_M"])
    for stat_groups in (1, 2):
        assert_close(kernel.norm_stats(x, stat_groups, config=config), x, stat_groups)


@pytest.mark.kernels
@pytest.mark.parametrize("tiles", [8, 9, 33, 70])
def test_a_merge_in_levels(tiles: int, monkeypatch: pytest.MonkeyPatch):
    """A last share that is not full. A constant channel keeps its variance of 0."""
    from fastp2p.kernels import norm_stats as kernel

    monkeypatch.setattr(kernel, "ONE_SHARE", 8)
    config = kernel.CONFIGS[1]
    x = values(4, 19, config["BLOCK_M"], tiles // 2)
    for stat_groups in (1, 2):
        assert_close(kernel.norm_stats(x, stat_groups, config=config), x, stat_groups)


@pytest.mark.kernels
@pytest.mark.parametrize("programs", [1, 4, 7])
def test_programs_of_several_tiles(programs: int, monkeypatch: pytest.MonkeyPatch):
    """The last one's are fewer, and the last of these is not full. Deviations are taken from the first tile's mean."""
    from fastp2p.kernels import norm_stats as kernel

    monkeypatch.setattr(kernel, "PROGRAMS", programs)
    config = kernel.CONFIGS[1]
    x = values(2, 3, 13, config["BLOCK_M"] - 1)
    x[:, :, 0] += 100  # most of the first tile, far from the rest
    for stat_groups in (1, 2):
        assert_close(kernel.norm_stats(x, stat_groups, config=config), x, stat_groups)


@pytest.mark.kernels
def test_a_merge_has_few_steps_whatever_the_number_of_tiles():
    """512 images of 256 px in tiles of 64 pixels are 2^19 tiles."""
    from fastp2p.kernels import norm_stats as kernel

    for tiles in (1, 2, 63, 64, 65, 1000, 4095, 4097, 2**19):
        share = kernel.share_of(tiles)
        shares = -(-tiles // share)
        assert share * shares >= tiles > share * (shares - 1)
        assert max(share, shares) <= max(64, 2 * tiles**0.5)


def test_bad_input_is_told():
    x = torch.zeros(4, 3, 2, 2)
    for bad in (x[0], x[:0], x.int()):
        with pytest.raises(InputError, match=r"norm_stats: got x .*, expected \(N, C, H, W\) floating, with elements"):
            norm_stats(bad, stat_groups=1)
    for stat_groups in (3, 8, -1):
        with pytest.raises(InputError, match=f"got stat_groups {stat_groups}, expected 0 or a divisor of 4 images"):
            norm_stats(x, stat_groups=stat_groups)
