"""The plan: a network as a list of layer records, derived from its modules; what forward and backward walk.

networks.py stays the one description of the architecture. A plan holds its modules, not copies, and adds what is known
before the first step: who reads whom, every map's size, and which taps of a kernel ever meet a pixel.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fastp2p.errors import InputError
from fastp2p.networks import PatchDiscriminator, PixelDiscriminator, UnetBlock, UnetGenerator
from fastp2p.ops._activation import ACTIVATIONS

Convolution = nn.Conv2d | nn.ConvTranspose2d
Normalisation = nn.BatchNorm2d | nn.InstanceNorm2d
Size = tuple[int, int]  # height, width

NONE, RELU, LEAKY_RELU, TANH = range(len(ACTIVATIONS))
_CODES: dict[type[nn.Module], int] = {nn.ReLU: RELU, nn.LeakyReLU: LEAKY_RELU, nn.Tanh: TANH}


@dataclass(frozen=True)
class Taps:
    """The taps of a square kernel that meet a pixel, the same in both directions, and the padding left for them."""

    first: int
    count: int
    padding: int

    def of(self, weight: Tensor) -> Tensor:
        """These taps of a weight (O, C, KH, KW): a view, the weight itself where all are live."""
        if self.count == weight.shape[2]:
            return weight
        taps = slice(self.first, self.first + self.count)
        return weight[:, :, taps, taps]

    def are_all(self, weight: Tensor) -> bool:
        return self.count == weight.shape[2]


@dataclass(frozen=True)
class Layer:
    """A convolution with what follows it, up to the inputs of its readers.

    Its result is drop(act(norm(conv(x)))): with `activation` for the next layer and, in a U-Net's encoder, with
    `second` for the decoder's layer across the skip connection, which reads it without a concatenation.
    """

    name: str  # e1 ... e8, d8 ... d1 in a U-Net, c1 ... in a discriminator
    conv: Convolution
    norm: Normalisation | None
    activation: int  # index in ACTIVATIONS
    slope: float  # leaky_relu's
    second: int  # -1 for none
    dropout: float
    skip: int | None  # number of the layer whose second result comes before the own input's channels
    epilogue: bool  # the convolution's operator applies the activation, and the reader's gradient its derivative
    in_size: Size
    out_size: Size
    taps: Taps

    @property
    def weight(self) -> nn.Parameter:
        weight = self.conv.weight
        assert isinstance(weight, nn.Parameter)
        return weight

    @property
    def transposed(self) -> bool:
        return isinstance(self.conv, nn.ConvTranspose2d)

    @property
    def stride(self) -> int:
        return int(self.conv.stride[0])

    @property
    def in_channels(self) -> int:
        return int(self.conv.in_channels)

    @property
    def out_channels(self) -> int:
        return int(self.conv.out_channels)

    @property
    def trains_bias(self) -> bool:
        """Whether the bias has a gradient: a norm takes the mean away, so before one it is 0, and stays so."""
        return self.conv.bias is not None and self.norm is None

    def has_moments_on_dead_taps(self, optimizer: torch.optim.Adam) -> bool:
        """Whether Adam still moves taps that meet padding alone: it was trained at another size before."""
        if self.taps.are_all(self.conv.weight):
            return False
        state = optimizer.state.get(self.conv.weight, {})
        moments = [state[name].clone() for name in ("exp_avg", "exp_avg_sq") if name in state]
        for moment in moments:
            self.taps.of(moment).zero_()
        return any(bool(moment.any()) for moment in moments)

    def macs(self, images: int) -> int:
        """Multiplications of the forward pass, and of each gradient; padding counted as pixels are."""
        small = self.in_size if self.transposed else self.out_size
        return images * small[0] * small[1] * self.in_channels * self.out_channels * self.taps.count**2


@dataclass(frozen=True)
class Plan:
    """A network at one image size."""

    layers: list[Layer]
    size: Size  # of the input that the layers see
    in_channels: int

    def macs(self, images: int = 1) -> int:
        """Multiplications of the forward pass."""
        return sum(layer.macs(images) for layer in self.layers)

    def kept_elements(self, images: int) -> int:
        """Elements that the forward pass keeps for the backward one, the input not counted."""
        copies = [1 if layer.epilogue else 2 + (layer.second >= 0) for layer in self.layers]
        return sum(
            images * n * layer.out_channels * layer.out_size[0] * layer.out_size[1]
            for n, layer in zip(copies, self.layers, strict=True)
        )


def plan_network(net: nn.Module, size: Size, *, skip_dead_taps: bool = True) -> Plan:
    """The plan of a U-Net generator or a discriminator for images of this (height, width).

    Args:
        net: UnetGenerator, PatchDiscriminator or PixelDiscriminator, of any depth, width and norm.
        size: of the network's input, for a U-Net a multiple of 2**levels.
        skip_dead_taps: leave out taps that only ever meet padding: they change no result and have no gradient.

    Raises:
        InputError: on another network, or where a norm would see a single value per channel.
    """
    if isinstance(net, UnetGenerator):
        modules = list(_flatten_unet(net.model))
        names = [f"e{i}" for i in range(1, net.levels + 1)] + [f"d{i}" for i in range(net.levels, 0, -1)]
    elif isinstance(net, PatchDiscriminator | PixelDiscriminator):
        modules = list(net.model if isinstance(net, PatchDiscriminator) else net.net)
        names = [f"c{i}" for i in range(1, sum(isinstance(m, Convolution) for m in modules) + 1)]
    else:
        raise InputError(f"engine: got a {type(net).__name__}, expected a U-Net generator or a PatchGAN discriminator")
    levels = net.levels if isinstance(net, UnetGenerator) else 0

    starts = [i for i, module in enumerate(modules) if isinstance(module, Convolution)]
    chains = [modules[i:j] for i, j in zip(starts, [*starts[1:], len(modules)], strict=True)]
    skips = [_skip_of(number, levels) for number in range(len(chains))]
    layers: list[Layer] = []
    for number, (name, (conv, *rest)) in enumerate(zip(names, chains, strict=True)):
        assert isinstance(conv, Convolution)
        in_size = layers[-1].out_size if layers else size
        norm = next((module for module in rest if isinstance(module, Normalisation)), None)
        dropout = next((module.p for module in rest if isinstance(module, nn.Dropout)), 0.0)
        act = next((module for module in rest if type(module) in _CODES), None)
        second = next((RELU for reader, skip in enumerate(skips) if skip == number), -1)
        read_beside_a_skip = number + 1 < len(chains) and skips[number + 1] is not None
        layer = Layer(
            name=name,
            conv=conv,
            norm=norm,
            activation=NONE if act is None else _CODES[type(act)],
            slope=float(getattr(act, "negative_slope", 0.0)),
            second=second,
            dropout=dropout,
            skip=skips[number],
            epilogue=norm is None and second < 0 and not dropout and not read_beside_a_skip,
            in_size=in_size,
            out_size=_out_size(conv, in_size),
            taps=_live_taps(conv, in_size) if skip_dead_taps else _all_taps(conv),
        )
        if isinstance(norm, nn.BatchNorm2d) and (norm.momentum is None or norm.running_mean is None):
            raise InputError(
                f"engine: layer {name} has a BatchNorm2d without running averages, or with cumulative ones"
            )
        if min(layer.out_size) < 1 or (norm is not None and layer.out_size == (1, 1)):
            raise InputError(
                f"engine: layer {name} leaves {layer.out_size} of an image of {size}, and its norm needs two values "
                "per channel at least; enlarge the crop, or take fewer layers"
            )
        layers.append(layer)
    return Plan(layers, size, layers[0].in_channels)


def _flatten_unet(block: UnetBlock) -> Iterator[nn.Module]:
    """The modules of a U-Net in the order in which they run."""
    for module in block.model:
        if isinstance(module, UnetBlock):
            yield from _flatten_unet(module)
        else:
            yield module


def _skip_of(number: int, levels: int) -> int | None:
    """Of 2 * levels layers the decoder's, but for its innermost, read the encoder's layer of their own level."""
    return 2 * levels - 1 - number if 0 < levels < number else None


def _out_size(conv: Convolution, size: Size) -> Size:
    stride, padding, kernel = int(conv.stride[0]), int(conv.padding[0]), int(conv.kernel_size[0])
    if isinstance(conv, nn.ConvTranspose2d):
        height, width = ((side - 1) * stride - 2 * padding + kernel for side in size)
    else:
        height, width = ((side + 2 * padding - kernel) // stride + 1 for side in size)
    return height, width


def _all_taps(conv: Convolution) -> Taps:
    return Taps(0, int(conv.kernel_size[0]), int(conv.padding[0]))


def _live_taps(conv: Convolution, in_size: Size) -> Taps:
    """The square block of taps that meet a pixel somewhere; all, where that is no square or the sizes would change."""
    small, large = (in_size, _out_size(conv, in_size))
    if isinstance(conv, nn.Conv2d):
        small, large = large, small
    stride, padding, kernel = int(conv.stride[0]), int(conv.padding[0]), int(conv.kernel_size[0])

    def live(inner: int, outer: int) -> list[int]:
        return [k for k in range(kernel) if any(0 <= i * stride - padding + k < inner for i in range(outer))]

    rows, columns = (live(inner, outer) for inner, outer in zip(large, small, strict=True))
    if not rows or rows != columns or padding < rows[0]:
        return _all_taps(conv)
    taps = Taps(rows[0], len(rows), padding - rows[0])
    sizes = tuple((side + 2 * taps.padding - taps.count) // stride + 1 for side in large)
    return taps if sizes == small else _all_taps(conv)


def plan_table(plan: Plan, images: int, dtype: torch.dtype) -> str:
    """The plan to read: each layer's shape, what it computes, and what a step of so many images must at least do.

    FLOPs are of the forward pass; bytes are the weight and the activations read and written by it in `dtype`.
    """
    lines = [f"{'layer':<6}{'convolution':<26}{'map':<18}{'then':<34}{'GFLOP':>8}{'weight MB':>11}{'maps MB':>9}"]
    for layer in plan.layers:
        kernel, stride = layer.conv.kernel_size[0], layer.stride
        kind = f"{'T ' if layer.transposed else ''}{layer.in_channels}→{layer.out_channels} {kernel}x{kernel} s{stride}"
        if not layer.taps.are_all(layer.conv.weight):
            kind += f" ({layer.taps.count}x{layer.taps.count} live)"
        then = [type(layer.norm).__name__.removesuffix("2d")] if layer.norm is not None else []
        then += [ACTIVATIONS[layer.activation]] if layer.activation else []
        then += [f"+ {ACTIVATIONS[layer.second]}"] if layer.second >= 0 else []
        then += [f"dropout {layer.dropout:g}"] if layer.dropout else []
        pixels_in, pixels_out = (height * width for height, width in (layer.in_size, layer.out_size))
        maps = images * (pixels_in * layer.in_channels + pixels_out * layer.out_channels) * dtype.itemsize
        weight = layer.taps.count**2 * layer.in_channels * layer.out_channels * dtype.itemsize
        sizes = f"{layer.in_size[0]}x{layer.in_size[1]} → {layer.out_size[0]}x{layer.out_size[1]}"
        lines.append(
            f"{layer.name:<6}{kind:<26}{sizes:<18}{' '.join(then):<34}{2e-9 * layer.macs(images):8.3f}"
            f"{weight / 1e6:11.3f}{maps / 1e6:9.3f}"
        )
    lines.append(f"{'sum':<84}{2e-9 * plan.macs(images):8.3f}")
    return "\n".join(lines)
