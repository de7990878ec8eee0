"""The parts of a pix2pix step, each as upstream computes it and as fastp2p's operators do: for bench_cpu.py.

The layers are those of unet_256 and the PatchGAN at 256 px, found by running the networks once. A part goes through all
its layers in turn, as a step does, so no layer finds its weights in the cache. Both ways get the same values, since
upstream's are first rounded to our dtype.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial

import torch
import torch.nn.functional as F
from harness.cases import Call, Case, adam_case, augment_case
from harness.parity import assert_loss, assert_norm_gradients, assert_normalised, assert_product
from harness.providers import PAPER, Scale
from torch import Tensor, nn

from fastp2p.ops import norm_act, norm_stats, patch_loss
from fastp2p.ops.activation import ACTIVATIONS

LAMBDA_L1 = 100.0
operators = torch.ops.fastp2p


@dataclass(frozen=True)
class Convolved:
    """A convolution of the networks with its operands, twice: as upstream has them, and as ours."""

    module: nn.Conv2d | nn.ConvTranspose2d
    x: Tensor
    weight: Tensor
    dy: Tensor
    our_x: Tensor
    our_weight: Tensor
    our_dy: Tensor

    @property
    def transposed(self) -> bool:
        return isinstance(self.module, nn.ConvTranspose2d)

    @property
    def products(self) -> int:
        """That make up a result, in any direction."""
        return self.weight.numel() * len(self.x) * min(t.shape[2] * t.shape[3] for t in (self.x, self.dy))

    @property
    def window(self) -> tuple[int, int]:
        return self.module.stride[0], self.module.padding[0]


def parts(batch: int, dtype: torch.dtype, scale: Scale = PAPER) -> Iterator[tuple[str, Callable[[], Case]]]:
    """Each part's name, and what makes it; dtype is that of our activations and weights."""
    for direction in DIRECTIONS:
        yield f"convolutions, {direction}", partial(_convolutions, batch, dtype, scale, direction)
    norms = partial(_norms, batch, dtype, scale)
    yield "norm_stats and norm_act, forward", lambda: norms(_eager_forward, _our_forward_norm, _check_forward, 3)
    yield "norm_act alone, forward", lambda: norms(_eager_forward, _our_norm_act, _check_forward, 2)
    yield "norm_act, backward", lambda: norms(_eager_backward, _our_backward, _check_backward, 5)
    yield "patch_loss, L1 of the image", lambda: _image_loss(batch, dtype, scale.size)
    yield "patch_loss, BCE of the map", lambda: _map_loss(batch, dtype)
    yield "adam, both networks", lambda: _adam(dtype, scale)
    options = {"eager_dtype": torch.float32, "device": torch.device("cpu")}
    yield "augment", lambda: augment_case(batch, scale.size, scale.load_size, dtype, **options)


@lru_cache(maxsize=1)
def _modules(batch: int, scale: Scale) -> list[tuple[nn.Module, torch.Size, torch.Size]]:
    """(module, shape of its input, shape of its output) of both networks, in the order in which they run."""
    found: list[tuple[nn.Module, torch.Size, torch.Size]] = []
    for net, channels in zip(scale.networks(dropout=True), (3, 6), strict=True):
        for module in net.modules():
            if isinstance(module, nn.Conv2d | nn.ConvTranspose2d | nn.BatchNorm2d):
                module.register_forward_hook(lambda m, x, y: found.append((m, x[0].shape, y.shape)))
        with torch.no_grad():
            net(torch.zeros(batch, channels, scale.size, scale.size))
    return found


def convolved_layers(batch: int, dtype: torch.dtype, scale: Scale = PAPER) -> list[Convolved]:
    """Every convolution of both networks; dtype is that of our operands."""
    layers = []
    for module, x_shape, y_shape in _modules(batch, scale):
        if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
            plain = _exactly(torch.randn(x_shape), module.weight.detach(), torch.randn(y_shape), dtype=dtype)
            layers.append(Convolved(module, *plain, *(_ours(t, dtype) for t in plain)))
    return layers


def _convolutions(batch: int, dtype: torch.dtype, scale: Scale, direction: str) -> Case:
    eager, ours = DIRECTIONS[direction]
    layers = convolved_layers(batch, dtype, scale)

    def check() -> None:
        for number, layer in enumerate(layers):
            what, expected = f"{direction} of convolution {number}", eager(layer)
            terms = layer.products / expected.numel()
            size = 1.0 if direction == "weight gradient" else float(layer.weight.std())  # the maps' deviation is 1
            assert_product(what, ours(layer), expected, dtype=dtype, terms=terms, size=size)

    return Case(*(_all([partial(call, layer) for layer in layers]) for call in (eager, ours)), check)


def _exactly(*tensors: Tensor, dtype: torch.dtype) -> list[Tensor]:
    """In float32, what dtype can hold of them."""
    return [t.to(dtype).float() for t in tensors]


def _ours(t: Tensor, dtype: torch.dtype) -> Tensor:
    return t.to(dtype).contiguous(memory_format=torch.channels_last)


def _forward(layer: Convolved) -> Tensor:
    convolve = F.conv_transpose2d if layer.transposed else F.conv2d
    return convolve(layer.x, layer.weight, None, *layer.window)


def _our_forward(layer: Convolved) -> Tensor:
    x, weight, size = layer.our_x, layer.our_weight, layer.dy.shape[2:]
    if layer.transposed:
        return operators.conv_transpose(x, None, weight, None, None, *layer.window, *size, 0, 0.0, 0)[0]
    return operators.conv(x, weight, None, None, *layer.window, 0, 0.0, 0)[0]


def _data_gradient(layer: Convolved) -> Tensor:
    return _convolution_backward(layer, [True, False, False])[0]


def _our_data_gradient(layer: Convolved) -> Tensor:
    dy, weight, size = layer.our_dy, layer.our_weight, layer.x.shape[2:]
    if layer.transposed:
        return operators.conv(dy, weight, None, None, *layer.window, 0, 0.0, 0)[0]
    return operators.conv_transpose(dy, None, weight, None, None, *layer.window, *size, 0, 0.0, 0)[0]


def _weight_gradient(layer: Convolved) -> Tensor:
    return _convolution_backward(layer, [False, True, False])[1]


def _our_weight_gradient(layer: Convolved) -> Tensor:
    outer, inner = (layer.our_x, layer.our_dy) if layer.transposed else (layer.our_dy, layer.our_x)
    return operators.conv_wgrad(outer, None, inner, 4, 4, *layer.window, torch.float32)


def _convolution_backward(layer: Convolved, wanted: list[bool]) -> tuple[Tensor, ...]:
    stride, padding = ([number] * 2 for number in layer.window)
    return torch.ops.aten.convolution_backward(
        layer.dy, layer.x, layer.weight, None, stride, padding, [1, 1], layer.transposed, [0, 0], 1, wanted
    )


# How upstream computes each direction of a convolution, and how we do.
DIRECTIONS = {
    "forward": (_forward, _our_forward),
    "data gradient": (_data_gradient, _our_data_gradient),
    "weight gradient": (_weight_gradient, _our_weight_gradient),
}
Results = Sequence[Tensor]
MakeNorm = Callable[[Tensor, Tensor, Tensor, Tensor], Callable[[], Results]]
CheckNorm = Callable[[Results, Results, Tensor, Tensor, Tensor, Tensor], None]


def _norms(
    batch: int,
    dtype: torch.dtype,
    scale: Scale,
    eager: MakeNorm,
    ours: MakeNorm,
    compare: CheckNorm,
    passes: int,
) -> Case:
    """Batch norm and LeakyReLU wherever the networks have a norm; passes: over its map, to read or to write.

    dy is 0 where rounding may decide on which side of its kink LeakyReLU is.
    """
    eager_calls, our_calls, layers = [], [], []
    for module, shape, _ in _modules(batch, scale):
        if isinstance(module, nn.BatchNorm2d):
            weight, bias = torch.rand(shape[1]), torch.randn(shape[1])
            x, dy = _exactly(torch.randn(shape), torch.randn(shape), dtype=dtype)
            dy *= F.batch_norm(x, None, None, weight, bias, training=True).abs() > 1e-3
            our_calls.append(ours(_ours(x, dtype), weight.clone(), bias.clone(), _ours(dy, dtype)))
            eager_calls.append(eager(x, weight, bias, dy))
            layers.append((x.detach(), weight.detach(), bias.detach(), dy))

    def check() -> None:
        for theirs, mine, operands in zip(eager_calls, our_calls, layers, strict=True):
            compare(mine(), theirs(), *operands)

    n_bytes = sum(x.numel() for x, *_ in layers) * dtype.itemsize * passes
    return Case(_all(eager_calls), _all(our_calls), check, n_bytes)


def _eager_forward(x: Tensor, weight: Tensor, bias: Tensor, _: Tensor) -> Callable[[], Results]:
    return lambda: [F.leaky_relu(F.batch_norm(x, None, None, weight, bias, training=True), 0.2)]


def _eager_backward(x: Tensor, weight: Tensor, bias: Tensor, dy: Tensor) -> Callable[[], Results]:
    inputs = [t.requires_grad_() for t in (x, weight, bias)]
    (y,) = _eager_forward(x, weight, bias, dy)()
    return lambda: torch.autograd.grad(y, inputs, dy, retain_graph=True)


def _our_forward_norm(x: Tensor, weight: Tensor, bias: Tensor, _: Tensor) -> Callable[[], Results]:
    return lambda: norm_act(x, *norm_stats(x, stat_groups=1), weight, bias, activation="leaky_relu")


def _our_norm_act(x: Tensor, weight: Tensor, bias: Tensor, _: Tensor) -> Callable[[], Results]:
    statistics = norm_stats(x, stat_groups=1)
    return lambda: norm_act(x, *statistics, weight, bias, activation="leaky_relu")


def _our_backward(x: Tensor, weight: Tensor, bias: Tensor, dy: Tensor) -> Callable[[], Results]:
    statistics = norm_stats(x, stat_groups=1)
    settings = (1e-5, ACTIVATIONS.index("leaky_relu"), 0.2, -1, 0.0, 0, False)
    return lambda: operators.norm_act_backward(dy, None, x, *statistics, weight, bias, None, *settings)


def _check_forward(ours: Results, eager: Results, x: Tensor, weight: Tensor, bias: Tensor, _: Tensor) -> None:
    assert_normalised(ours[0], eager[0], x, weight, bias)


def _check_backward(ours: Results, eager: Results, x: Tensor, weight: Tensor, _: Tensor, dy: Tensor) -> None:
    assert_norm_gradients(ours, eager, x, weight, dy)


def _image_loss(batch: int, dtype: torch.dtype, size: int) -> Case:
    fake_B, real_B = _exactly(*torch.rand(2, batch, 3, size, size), dtype=dtype)
    ours, target = (_ours(t, dtype) for t in (fake_B, real_B))
    return _loss(
        fake_B,
        lambda: LAMBDA_L1 * F.l1_loss(fake_B, real_B),
        lambda: patch_loss(ours, "l1", target=target, weight=LAMBDA_L1),
        fake_B.numel() * 3 * dtype.itemsize,  # both images read, dx written
    )


def _map_loss(batch: int, dtype: torch.dtype) -> Case:
    (logits,) = _exactly(torch.randn(batch, 1, 30, 30), dtype=dtype)
    ours = _ours(logits, dtype)
    return _loss(
        logits,
        lambda: F.binary_cross_entropy_with_logits(logits, torch.ones_like(logits)),
        lambda: patch_loss(ours, "bce", target=1.0),
        logits.numel() * 2 * dtype.itemsize,
    )


def _loss(x: Tensor, eager: Callable[[], Tensor], ours: Callable[[], Results], n_bytes: int) -> Case:
    """A loss of x with its gradient."""
    x.requires_grad_()

    def loss_and_gradient() -> Results:
        loss = eager()
        return loss.detach(), *torch.autograd.grad(loss, x)

    return Case(loss_and_gradient, ours, lambda: assert_loss(ours(), loss_and_gradient()), n_bytes)


def _adam(dtype: torch.dtype, scale: Scale) -> Case:
    trained = [parameter for module, *_ in _modules(1, scale) for parameter in module.parameters()]
    parameters = [nn.Parameter(parameter.detach().clone()) for parameter in trained]
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter)
    return adam_case(parameters, dtype)


def _all(calls: Iterable[Call]) -> Call:
    """All of them, each result dropped at once: what the system takes to hand out fresh pages is not to be timed."""

    def run() -> None:
        for call in calls:
            call()

    return run
