"""Fused models at sizes that vary: compiled, exported, traced, and with no images at all."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers.comparing import DOUBLE, fuse_it, fused_copy, grads, small, total
from helpers.on_device import generator
from helpers.plain_models import DCGANGenerator, ResidualGenerator, ResNet
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

from fastp2p.errors import InputError
from fastp2p.nn import ConvNormAct, UpConvNormAct

MODELS: list[Callable[[], nn.Module]] = [small, ResNet, ResidualGenerator]


def pictures(n: int, side: int = 16) -> Tensor:
    return torch.randn(n, 3, side, side, dtype=DOUBLE, generator=generator(n))


@pytest.fixture(params=MODELS, ids=["small", "resnet", "residual"])
def model(request: pytest.FixtureRequest) -> nn.Module:
    torch._dynamo.reset()
    torch.manual_seed(0)
    return request.param().double()


@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
def test_exported_for_any_size(model: nn.Module, training: bool):
    fused, _ = fused_copy(model.train(training))
    any_size = dict.fromkeys((0, 2, 3), torch.export.Dim.AUTO)
    exported = torch.export.export(copy.deepcopy(fused), (pictures(4),), dynamic_shapes=(any_size,))
    for x in (pictures(3), pictures(2, 32)):
        torch.testing.assert_close(exported.module()(x), copy.deepcopy(model)(x))


@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
@pytest.mark.parametrize("make", [small, *(pytest.param(m, marks=pytest.mark.slow) for m in MODELS[1:])])
def test_compiled_no_more_often_than_the_unfused(make: Callable[[], nn.Module], training: bool):
    torch.manual_seed(0)
    model = make().double()
    fused, _ = fused_copy(model.train(training))
    counts, outputs = [], []
    for m in (model, fused):
        torch._dynamo.reset()
        counter = CompileCounterWithBackend("aot_eager")
        compiled = torch.compile(m, backend=counter, dynamic=None)
        outputs.append([compiled(pictures(n, side)) for n, side in ((4, 16), (2, 16), (5, 32))])
        sum(map(total, outputs[-1])).backward()
        counts.append(counter.frame_count)
    assert counts[1] <= counts[0]
    torch.testing.assert_close(outputs[1], outputs[0])
    torch.testing.assert_close(grads(fused), grads(model))
    torch.testing.assert_close(dict(fused.named_buffers()), dict(model.named_buffers()))


@pytest.mark.parametrize("twist", [
    lambda m: setattr(m[0], "dilation", (2, 2)),
    lambda m: setattr(m[2], "negative_slope", -0.5),
    lambda m: setattr(m[5], "momentum", None),
    lambda m: m[1].eval(),
    lambda m: m[0].weight.data.mul_(0.5),
])  # fmt: skip
def test_settings_changed_after_compiling(twist: Callable[[nn.Module], object]):
    torch._dynamo.reset()
    model, fused = small(), fuse_it(small())
    compiled = torch.compile(fused, backend="aot_eager")
    for _ in range(2):
        torch.testing.assert_close(compiled(pictures(2)), model(pictures(2)))
        for m in (model, fused):
            twist(m)


def test_pieces_compiled():
    torch._dynamo.reset()
    model, fused = small(), fuse_it(small())
    for piece in (lambda m: m[:2], lambda m: m[:6], lambda m: m):
        compiled = torch.compile(piece(fused), backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(compiled(pictures(2)), piece(model)(pictures(2)))


@pytest.mark.parametrize("index", [1, 2, 9])
def test_replaced_before_compiling(index: int):
    torch._dynamo.reset()
    fused = fuse_it(small())
    fused[index] = nn.SiLU()
    with pytest.raises(InputError, match="its result went elsewhere"):
        torch.compile(fused, backend="aot_eager")(pictures(2))


def test_traced(model: nn.Module):
    fused, _ = fused_copy(model.eval())
    with torch.no_grad():
        traced = torch.jit.trace(fused, (pictures(2),))
        torch.testing.assert_close(traced(pictures(2)), model(pictures(2)))
        torch.testing.assert_close(traced(pictures(4, 32)), model(pictures(4, 32)))


def test_averaged_model(model: nn.Module):
    fused, _ = fused_copy(model)
    outputs = []
    for m in (model, fused):
        average = torch.optim.swa_utils.AveragedModel(m, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.5))
        optimizer = torch.optim.SGD(m.parameters(), lr=0.01)
        for n in (2, 3):
            total(m(pictures(n))).backward()
            optimizer.step()
            average.update_parameters(m)
            with torch.no_grad():
                outputs.append(average.eval()(pictures(2)))
        torch.optim.swa_utils.update_bn([pictures(2), pictures(4)], average)
        outputs.append(average.eval()(pictures(2)))
    torch.testing.assert_close(outputs[3:], outputs[:3])


@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
@pytest.mark.parametrize("make", [*MODELS, DCGANGenerator])
def test_no_images(make: Callable[[], nn.Module], training: bool):
    torch.manual_seed(0)
    model = make().double().train(training)
    fused, _ = fused_copy(model)
    x = torch.randn(2, 10, 1, 1, dtype=DOUBLE) if isinstance(model, DCGANGenerator) else pictures(2)
    outcomes = [of_no_images(m, x) for m in (model, fused)]
    if isinstance(outcomes[0], str):
        assert outcomes[1] == outcomes[0]
    else:
        torch.testing.assert_close(outcomes[1], outcomes[0], equal_nan=True)
    torch.testing.assert_close(fused.train()(x), model.train()(x))


def of_no_images(model: nn.Module, x: Tensor) -> Any:
    """Output, gradients and buffers of an empty batch; or the error's kind and text."""
    empty = x[:0].clone().requires_grad_()
    try:
        output = model(empty)
    except (RuntimeError, ValueError, IndexError) as error:  # instance norm has an IndexError
        return f"{type(error).__name__}: {error}"
    output.sum().backward()
    return output, empty.grad, grads(model), dict(model.named_buffers())


def test_layers_traced():
    conv, conv_transpose = ConvNormAct(3, 4, norm="instance", activation="tanh"), UpConvNormAct(5, 4, norm="instance")
    traced = torch.jit.trace(conv, (pictures(2).float(),)), torch.jit.trace(conv_transpose, (torch.ones(1, 5, 4, 4),))
    x, z = pictures(3, 32).float(), torch.randn(2, 5, 8, 8, generator=generator(0))
    torch.testing.assert_close(
        [traced[0](x), traced[1](z)], [conv(x), conv_transpose(z)], rtol=1e-4, atol=1e-5
    )  # float32


@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
@pytest.mark.parametrize("norm", ["batch", "none"])
def test_layers_without_images(norm: str, training: bool):
    conv, conv_transpose = (
        ConvNormAct(3, 4, norm=norm, activation="leaky_relu", dropout=0.5),
        UpConvNormAct(5, 4, norm=norm),
    )
    for layer in (conv, conv_transpose):
        layer.train(training)
    results = [conv(torch.zeros(0, 3, 8, 8)), conv_transpose(torch.zeros(0, 3, 4, 4), torch.zeros(0, 2, 4, 4))]
    assert [y.shape for y in results] == [(0, 4, 4, 4), (0, 4, 8, 8)]
    sum(y.sum() for y in results).backward()
    assert not any(p.grad.any() for layer in (conv, conv_transpose) for p in layer.parameters())
