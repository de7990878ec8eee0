"""unfuse(model) gives back what fuse(model) took, to the bit."""

import copy
import io
from collections.abc import Callable

import pytest
import torch
from helpers.comparing import assert_same_training, fuse_it, images, small, total
from helpers.plain_models import ResidualGenerator, ResNet, SegmentationUNet
from torch import nn

import fastp2p
from fastp2p.errors import InputError


@pytest.mark.parametrize("channels_last", [True, False])
@pytest.mark.parametrize("make", [small, ResNet, SegmentationUNet, ResidualGenerator])
def test_round_trip(make: Callable[[], nn.Module], channels_last: bool):
    torch.manual_seed(0)
    model = make().double()
    x = images() if isinstance(model, nn.Sequential) else torch.randn(2, 3, 16, 16, dtype=torch.float64)
    back = copy.deepcopy(model)
    parameters = list(map(id, back.parameters()))
    for _ in range(2):
        assert fastp2p.fuse(back, channels_last=channels_last).fused
        fastp2p.unfuse(back)
    assert list(map(id, back.parameters())) == parameters
    assert list(back.state_dict()) == list(model.state_dict())
    for one, other in zip(back.modules(), model.modules(), strict=True):
        assert type(one) is type(other)
        assert one.__dict__.keys() == other.__dict__.keys()
        assert not one._forward_hooks
        assert not one._forward_pre_hooks
        assert not one._forward_hooks_always_called
    for mode in (True, False):
        outputs = [m.train(mode)(x) for m in (model, back)]
        torch.testing.assert_close(*outputs, rtol=0, atol=0)
        for m, output in zip((model, back), outputs, strict=True):
            m.zero_grad()
            total(output).backward()
        # On a GPU some of PyTorch's own gradients, such as reflect padding's, are added as threads arrive; and a bias
        # before a norm has no gradient but the rounding of the others
        largest = max(p.grad.abs().max().item() for p in model.parameters())
        for one, other in zip(back.parameters(), model.parameters(), strict=True):
            tolerance = 1e-10 * largest if one.is_cuda else 0
            torch.testing.assert_close(one.grad, other.grad, rtol=0, atol=tolerance)
    fuse_it(back)
    assert_same_training(model.train(), back.train(), x)


def test_what_works_afterwards():
    model = fuse_it(small().float().eval())
    x = images(dtype=torch.float32)
    expected = small().float().eval()(x)
    with pytest.raises(InputError, match=r"torch.jit.script: got a fused model; call fastp2p.unfuse\(model\) first"):
        torch.jit.script(model)
    fastp2p.unfuse(model)
    script = torch.jit.script(model)
    file = io.BytesIO()
    torch.jit.save(script, file)
    assert torch.equal(script(x), expected)
    gradient = torch.func.grad(lambda x: model(x).sum())(x)
    assert gradient.shape == x.shape
    torch.nn.utils.parameters_to_vector(model.parameters())


def test_hooks_of_others_stay():
    model = small()
    seen: list[int] = []
    model.register_forward_hook(lambda *args: seen.append(1), always_call=True)
    model[5].register_forward_hook(lambda *args: seen.append(2))
    fuse_it(model)
    model.register_forward_pre_hook(lambda *args: seen.append(3))
    fastp2p.unfuse(model)
    model(images())
    assert seen == [3, 2, 1]


def test_part_of_a_model():
    """A chain that lies in two parts, of which one is unfused."""

    def build() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Sequential(nn.Conv2d(3, 4, 3)), nn.Sequential(nn.BatchNorm2d(4), nn.ReLU())).double()

    for index in (0, 1):
        fused = fuse_it(build())
        fastp2p.unfuse(fused[index])
        torch.testing.assert_close(fused(images()), build()(images()), rtol=1e-12, atol=1e-12)


def test_after_surgery():
    """A replaced activation is refused; unfused and fused again it is served."""
    model, fused = small(), fuse_it(small())
    for m in (model, fused):
        m[2] = nn.SiLU()
    with pytest.raises(InputError, match=r"1 \(BatchNorm2d\)|2 \(LeakyReLU\)"):
        copy.deepcopy(fused)(images())
    fastp2p.unfuse(fused)
    assert len(fastp2p.fuse(fused).fused) == 3
    assert_same_training(model, fused, images())


def test_what_cannot_be_unfused():
    fastp2p.unfuse(small())
    with pytest.raises(InputError, match=r"unfuse: got a str, expected an nn\.Module"):
        fastp2p.unfuse("model")
    model = fuse_it(small())
    nn.utils.parametrizations.weight_norm(model[0])
    with pytest.raises(InputError, match="unfuse: 0 has become a ParametrizedFusedConv2d since; remove that first"):
        fastp2p.unfuse(model)
    nn.utils.parametrize.remove_parametrizations(model[0], "weight")
    fastp2p.unfuse(model)
    assert type(model[0]) is nn.Conv2d
