import pytest
import torch
from helpers.on_device import generator
from torch import Tensor, nn

from fastp2p.errors import InputError
from fastp2p.ops import norm_stats, running_stats, running_stats_ref

UNIT = torch.finfo(torch.float32).eps / 2  # one rounding


def buffers(channels: int, stat_groups: int = 3) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """running_mean, running_var, mean, var with values over some orders of magnitude."""
    draws = generator(channels)
    scale = 10 ** torch.linspace(-3, 3, channels)
    running_mean, running_var = torch.randn(2, channels, generator=draws) * scale
    mean, var = torch.randn(2, stat_groups, channels, generator=draws) * scale
    return running_mean, running_var.abs(), mean, var.abs()


def assert_close(ours: tuple[Tensor, ...], before: tuple[Tensor, ...], n_values: int, momentum: float) -> None:
    """Within 3 float32 roundings a group, each relative to the largest value in play: means may cancel."""
    expected = [t.double() for t in before]
    running_stats_ref(*expected, n_values, momentum)
    for running, exact, old, new in zip(ours[:2], expected[:2], before[:2], before[2:], strict=True):
        size = torch.cat([old[None], new * n_values / (n_values - 1)]).abs().amax(0)
        assert ((running.double() - exact).abs() <= 3 * UNIT * max(1, len(new)) * size).all()


@pytest.mark.parametrize("channels", [1, 3, 33, 64, 130, 600])
@pytest.mark.parametrize("stat_groups", [0, 1, 2, 5])
def test_equals_float64(channels: int, stat_groups: int):
    ours = buffers(channels, stat_groups)
    running_stats(*ours, n_values=7, momentum=0.3)
    assert_close(ours, buffers(channels, stat_groups), 7, 0.3)
    for new, before in zip(ours[2:], buffers(channels, stat_groups)[2:], strict=True):
        assert torch.equal(new, before)


@pytest.mark.parametrize("momentum", [None, 0.1, 0.003, 1.0])
def test_are_the_buffers_of_batch_norm(momentum: float | None):
    """Three batches, one after the other, against three groups at once, and three more; None for both defaults."""
    given = {} if momentum is None else {"momentum": momentum}
    layer = nn.BatchNorm2d(5, **given)
    running_mean, running_var = layer.running_mean.clone(), layer.running_var.clone()
    for seed in range(2):
        x = 2 + 3 * torch.randn(6, 5, 2, 3, generator=generator(seed))
        for batch in x.chunk(3):
            layer(batch)
        running_stats(running_mean, running_var, *norm_stats(x, stat_groups=3), n_values=2 * 2 * 3, **given)
    torch.testing.assert_close(running_mean, layer.running_mean)
    torch.testing.assert_close(running_var, layer.running_var)


def test_nothing_else_in_the_buffer_changes():
    big = [torch.full((20,), 9.0) for _ in range(2)]
    _, _, mean, var = buffers(5)
    running_stats(big[0][7:12], big[1][7:12], mean, var, n_values=4)
    for tensor in big:
        assert (tensor[:7] == 9).all()
        assert (tensor[12:] == 9).all()
        assert (tensor[7:12] != 9).all()


def test_statistics_of_any_strides():
    ours = list(buffers(5))
    ours[2:] = [torch.stack([t, t + 1], dim=-1)[..., 0] for t in ours[2:]]
    assert not any(t.is_contiguous() for t in ours[2:])
    running_stats(*ours, n_values=7)
    assert_close(ours, buffers(5), 7, 0.1)


def test_nan_stays_in_its_channel():
    ours = buffers(5)
    ours[2][1, 3], ours[3][0, 2] = torch.nan, torch.nan
    running_stats(*ours, n_values=7)
    assert ours[0].isnan().nonzero().tolist() == [[3]]
    assert ours[1].isnan().nonzero().tolist() == [[2]]


def test_float64_is_computed_in_float64():
    """To within a few of its roundings: float32 anywhere on the way would show as 1e-7."""
    ours, expected = ([t.double() for t in buffers(33)] for _ in range(2))
    running_stats(*ours, n_values=7)
    running_stats_ref(*expected, 7, 0.1)
    torch.testing.assert_close(ours, expected, rtol=1e-13, atol=1e-13)


def test_autograd_notices_the_update():
    running_mean, running_var, mean, var = buffers(5)
    weight = torch.ones(5, requires_grad=True)
    for index in (0, 1):
        y = (weight * (running_mean, running_var)[index]).sum()
        running_stats(running_mean, running_var, mean, var, n_values=7)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.backward()


def test_opcheck():
    torch.library.opcheck(torch.ops.fastp2p.running_stats.default, (*buffers(5), 7, 0.1))
    torch.library.opcheck(torch.ops.fastp2p.running_stats.default, (*buffers(5, 0), 7, 0.1))


def test_torch_compile():
    """The update in place survives functionalisation."""
    ours, compiled = buffers(5), buffers(5)
    running_stats(*ours, n_values=7)
    torch.compile(running_stats, fullgraph=True, backend="aot_eager")(*compiled, n_values=7)
    assert all(torch.equal(one, other) for one, other in zip(ours, compiled, strict=True))


@pytest.mark.kernels
def test_every_configuration():
    from fastp2p.kernels import running_stats as kernel

    for config in kernel.CONFIGS:
        ours = buffers(600)
        kernel.running_stats(*ours, 7, 0.1, config=config)
        assert_close(ours, buffers(600), 7, 0.1)


def test_bad_input_is_told():
    running, stats = torch.zeros(3), torch.zeros(2, 3)
    bad = [
        (running, running, stats, torch.zeros(2, 4)),
        (running, running, torch.zeros(3), torch.zeros(3)),
        (running, torch.zeros(4), stats, stats),
        (torch.zeros(1, 3), torch.zeros(1, 3), stats, stats),
        (torch.zeros(6)[::2], running, stats, stats),
        (running, torch.zeros(6)[::2], stats, stats),
        (running, running, stats.double(), stats.double()),
        (running.bfloat16(), running, stats, stats),
    ]
    for tensors in bad:
        with pytest.raises(InputError, match=r"running_stats: got .*; expected contiguous \(C,\), \(C,\) and \(G, C\)"):
            running_stats(*tensors, n_values=4)
    for n_values in (1, 0):
        with pytest.raises(InputError, match=f"got {n_values} values per channel, expected 2 or more"):
            running_stats(running, running.clone(), stats, stats, n_values=n_values)
