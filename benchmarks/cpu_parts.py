"""The parts of a pix2pix step, each as upstream computes it and as fastp2p's operators do: for bench_cpu.py.

The layers are those of unet_256 and the PatchGAN at 256 px, found by running the networks once. A part goes through all
its layers in turn, as a step does, so no layer finds its weights in the cache.
"""

import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastp2p.networks import PatchDiscriminator, UnetGenerator
from fastp2p.ops import adam, augment, augment_ref, norm_act, norm_stats, patch_loss
from fastp2p.ops._activation import ACTIVATIONS

Call = Callable[[], object]
operators = torch.ops.fastp2p


@dataclass(frozen=True)
class Part:
    """Calls that do the same work: upstream's in float32 and NCHW, ours; and the bytes ours must move."""

    eager: Call
    ours: Call
    n_bytes: int = 0  # 0 where it is arithmetic that counts


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
    def window(self) -> tuple[int, int]:
        return self.module.stride[0], self.module.padding[0]


def parts(batch: int, dtype: torch.dtype) -> Iterator[tuple[str, Callable[[], Part]]]:
    """Each part's name, and what makes it; dtype is that of our activations and weights."""
    for direction in DIRECTIONS:
        yield f"convolutions, {direction}", partial(_convolutions, batch, dtype, direction)
    yield "norm_stats and norm_act, forward", lambda: _norms(batch, dtype, _eager_forward, _our_forward_norm, 3)
    yield "norm_act alone, forward", lambda: _norms(batch, dtype, _eager_forward, _our_norm_act, 2)
    yield "norm_act, backward", lambda: _norms(batch, dtype, _eager_backward, _our_backward, 5)
    yield "patch_loss, L1 of the image", lambda: _image_loss(batch, dtype)
    yield "patch_loss, BCE of the map", lambda: _map_loss(batch, dtype)
    yield "adam, both networks", lambda: _adam(dtype)
    yield "augment", lambda: _augment(batch, dtype)


def _modules(batch: int) -> list[tuple[nn.Module, torch.Size, torch.Size]]:
    """(module, shape of its input, shape of its output) of both networks, in the order in which they run."""
    found: list[tuple[nn.Module, torch.Size, torch.Size]] = []
    for net, channels in ((UnetGenerator(), 3), (PatchDiscriminator(), 6)):
        for module in net.modules():
            if isinstance(module, nn.Conv2d | nn.ConvTranspose2d | nn.BatchNorm2d):
                module.register_forward_hook(lambda m, x, y: found.append((m, x[0].shape, y.shape)))
        with torch.no_grad():
            net(torch.zeros(batch, channels, 256, 256))
    return found


def convolved_layers(batch: int, dtype: torch.dtype) -> list[Convolved]:
    """Every convolution of both networks; dtype is that of our operands."""
    layers = []
    for module, x_shape, y_shape in _modules(batch):
        if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
            plain = (torch.randn(x_shape), module.weight.detach(), torch.randn(y_shape))
            layers.append(Convolved(module, *plain, *(_ours(t, dtype) for t in plain)))
    return layers


def _convolutions(batch: int, dtype: torch.dtype, direction: str) -> Part:
    eager, ours = DIRECTIONS[direction]
    layers = convolved_layers(batch, dtype)
    return Part(_all([partial(eager, layer) for layer in layers]), _all([partial(ours, layer) for layer in layers]))


def _ours(t: Tensor, dtype: torch.dtype) -> Tensor:
    return t.to(dtype).contiguous(memory_format=torch.channels_last)


def _forward(layer: Convolved) -> Tensor:
    convolve = F.conv_transpose2d if layer.transposed else F.conv2d
    return convolve(layer.x, layer.weight, None, *layer.window)


def _our_forward(layer: Convolved) -> object:
    x, weight, size = layer.our_x, layer.our_weight, layer.dy.shape[2:]
    if layer.transposed:
        return operators.up(x, None, weight, None, None, *layer.window, *size, 0, 0.0, 0)
    return operators.down(x, weight, None, None, *layer.window, 0, 0.0, 0)


def _data_gradient(layer: Convolved) -> object:
    return _convolution_backward(layer, [True, False, False])


def _our_data_gradient(layer: Convolved) -> object:
    dy, weight, size = layer.our_dy, layer.our_weight, layer.x.shape[2:]
    if layer.transposed:
        return operators.down(dy, weight, None, None, *layer.window, 0, 0.0, 0)
    return operators.up(dy, None, weight, None, None, *layer.window, *size, 0, 0.0, 0)


def _weight_gradient(layer: Convolved) -> object:
    return _convolution_backward(layer, [False, True, False])


def _our_weight_gradient(layer: Convolved) -> object:
    outer, inner = (layer.our_x, layer.our_dy) if layer.transposed else (layer.our_dy, layer.our_x)
    return operators.wgrad(outer, None, inner, 4, 4, *layer.window, torch.float32)


def _convolution_backward(layer: Convolved, wanted: list[bool]) -> object:
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
MakeNorm = Callable[[Tensor, Tensor, Tensor, Tensor], Call]


def _norms(batch: int, dtype: torch.dtype, eager: MakeNorm, ours: MakeNorm, passes: int) -> Part:
    """Batch norm and LeakyReLU wherever the networks have a norm; passes: over its map, to read or to write."""
    eager_calls: list[Call] = []
    our_calls: list[Call] = []
    elements = 0
    for module, shape, _ in _modules(batch):
        if isinstance(module, nn.BatchNorm2d):
            x, weight, bias, dy = torch.randn(shape), torch.rand(shape[1]), torch.randn(shape[1]), torch.randn(shape)
            our_calls.append(ours(_ours(x, dtype), weight.clone(), bias.clone(), _ours(dy, dtype)))
            eager_calls.append(eager(x, weight, bias, dy))
            elements += shape.numel()
    return Part(_all(eager_calls), _all(our_calls), elements * dtype.itemsize * passes)


def _eager_forward(x: Tensor, weight: Tensor, bias: Tensor, _: Tensor) -> Call:
    return lambda: F.leaky_relu(F.batch_norm(x, None, None, weight, bias, training=True), 0.2)


def _eager_backward(x: Tensor, weight: Tensor, bias: Tensor, dy: Tensor) -> Call:
    inputs = [t.requires_grad_() for t in (x, weight, bias)]
    y = _eager_forward(x, weight, bias, dy)()
    return lambda: torch.autograd.grad(y, inputs, dy, retain_graph=True)


def _our_forward_norm(x: Tensor, weight: Tensor, bias: Tensor, _: Tensor) -> Call:
    return lambda: norm_act(x, *norm_stats(x, stat_groups=1), weight, bias, activation="leaky_relu")


def _our_norm_act(x: Tensor, weight: Tensor, bias: Tensor, _: Tensor) -> Call:
    statistics = norm_stats(x, stat_groups=1)
    return lambda: norm_act(x, *statistics, weight, bias, activation="leaky_relu")


def _our_backward(x: Tensor, weight: Tensor, bias: Tensor, dy: Tensor) -> Call:
    statistics = norm_stats(x, stat_groups=1)
    settings = (1e-5, ACTIVATIONS.index("leaky_relu"), 0.2, -1, 0.0, 0, False)
    return lambda: operators.norm_act_backward(dy, None, x, *statistics, weight, bias, None, *settings)


def _image_loss(batch: int, dtype: torch.dtype) -> Part:
    fake_B, real_B = (torch.rand(batch, 3, 256, 256).requires_grad_() for _ in range(2))
    ours, target = (_ours(t.detach(), dtype) for t in (fake_B, real_B))
    return Part(
        lambda: torch.autograd.grad(100 * F.l1_loss(fake_B, real_B.detach()), fake_B),
        lambda: patch_loss(ours, "l1", target=target, weight=100.0),
        fake_B.numel() * 3 * dtype.itemsize,  # both images read, dx written
    )


def _map_loss(batch: int, dtype: torch.dtype) -> Part:
    logits = torch.randn(batch, 1, 30, 30).requires_grad_()
    ours = _ours(logits.detach(), dtype)
    return Part(
        lambda: torch.autograd.grad(F.binary_cross_entropy_with_logits(logits, torch.ones_like(logits)), logits),
        lambda: patch_loss(ours, "bce", target=1.0),
        logits.numel() * 2 * dtype.itemsize,
    )


def _adam(dtype: torch.dtype) -> Part:
    parameters = list(itertools.chain(UnetGenerator().parameters(), PatchDiscriminator().parameters()))
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter)
    eager = torch.optim.Adam(parameters, lr=2e-4, betas=(0.5, 0.999), foreach=False)
    n = sum(parameter.numel() for parameter in parameters)
    param, grad, exp_avg, exp_avg_sq = (torch.rand(n) for _ in range(4))
    low = torch.empty(n, dtype=dtype) if dtype != torch.float32 else None
    lr, powers = torch.tensor(2e-4), torch.tensor([0.5, 0.999], dtype=torch.float64)
    return Part(
        eager.step,
        lambda: adam(param, grad, exp_avg, exp_avg_sq, lr=lr, powers=powers, low_precision=low),
        n * (28 + (0 if low is None else dtype.itemsize)),  # 16 read, 12 written
    )


def _augment(batch: int, dtype: torch.dtype) -> Part:
    pairs = torch.randint(0, 256, (32, 286, 286, 6), dtype=torch.uint8)
    index, offset = torch.arange(batch), torch.randint(0, 31, (batch, 2))
    flip = index % 2 == 0
    return Part(
        lambda: augment_ref(pairs, index, offset, flip, 256, 3),
        lambda: augment(pairs, index, offset, flip, crop_size=256, input_nc=3, dtype=dtype),
        batch * 256 * 256 * 6 * (1 + dtype.itemsize),
    )


def _all(calls: Iterable[Call]) -> Call:
    """All of them, each result dropped at once: what the system takes to hand out fresh pages is not to be timed."""

    def run() -> None:
        for call in calls:
            call()

    return run
