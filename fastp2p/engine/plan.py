"""The plan: a network as a list of layer records, derived from its modules; what forward and backward walk.

networks.py stays the one description of the architecture. A plan holds its modules, not copies, and adds what is known
before the first step: who reads whom, every map's size, and which taps of a kernel ever meet a pixel.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor, nn

from fastp2p.engine.supported import Supported, check_chain, check_input
from fastp2p.errors import InputError
from fastp2p.models.pix2pix.networks import PatchDiscriminator, PixelDiscriminator, UnetBlock, UnetGenerator
from fastp2p.ops.activation import ACTIVATIONS

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

    def select(self, weight: Tensor) -> Tensor:
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
    `skip_activation` for the decoder's layer across the skip connection, which reads it without a concatenation.
    """

    name: str  # e1 ... e8, d8 ... d1 in a U-Net, c1 ... in a discriminator
    conv: Convolution
    norm: Normalisation | None
    activation: int  # index in ACTIVATIONS
    slope: float  # leaky_relu's
    skip_activation: int | None  # index in ACTIVATIONS
    dropout: float
    skip: int | None  # number of the encoder layer whose result is concatenated before this layer's input
    activation_in_conv: bool  # no pass of its own: the convolution applies it, the next layer's gradient its derivative
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

    def macs(self, images: int) -> int:
        """Multiply-accumulates of the forward pass, and of each gradient; those with padding are counted too."""
        small = self.in_size if self.transposed else self.out_size
        return images * small[0] * small[1] * self.in_channels * self.out_channels * self.taps.count**2


@dataclass(frozen=True)
class Plan:
    """A network at one image size."""

    layers: list[Layer]
    in_channels: int

    def macs(self, images: int = 1) -> int:
        """Multiply-accumulates of the forward pass."""
        return sum(layer.macs(images) for layer in self.layers)


def plan_network(net: nn.Module, size: Size, *, skip_dead_taps: bool = True) -> Plan:
    """The plan of a U-Net generator or a discriminator for images of this (height, width).

    Args:
        net: UnetGenerator, PatchDiscriminator or PixelDiscriminator, of any depth, width and norm.
        size: of the network's input, for a U-Net a multiple of 2**levels.
        skip_dead_taps: leave out taps that only ever meet padding: they change no result and have no gradient.

    Raises:
        InputError: on another network, or where a norm would see a single value per channel.
    """
    names = {module: name for name, module in Supported(net).names.items()}
    levels = 0
    if isinstance(net, UnetGenerator):
        levels, modules = net.levels, list(_flatten_unet(net.model))
        titles = [f"e{i}" for i in range(1, net.levels + 1)] + [f"d{i}" for i in range(net.levels, 0, -1)]
    else:
        assert isinstance(net, PatchDiscriminator | PixelDiscriminator)
        modules = list(net.model if isinstance(net, PatchDiscriminator) else net.net)
        titles = [f"c{i}" for i in range(1, sum(isinstance(m, Convolution) for m in modules) + 1)]

    starts = [i for i, module in enumerate(modules) if isinstance(module, Convolution)]
    check_input(modules[: starts[0]] if starts else modules, names)
    chains = [modules[i:j] for i, j in zip(starts, [*starts[1:], len(modules)], strict=True)]
    skips = [_skip_of(number, levels) for number in range(len(chains))]
    layers: list[Layer] = []
    for number, (name, (conv, *rest)) in enumerate(zip(titles, chains, strict=True)):
        assert isinstance(conv, Convolution)
        in_size = layers[-1].out_size if layers else size
        norm = next((module for module in rest if isinstance(module, Normalisation)), None)
        dropout = next((module.p for module in rest if isinstance(module, nn.Dropout)), 0.0)
        act = next((module for module in rest if type(module) in _CODES), None)
        crosses = number in skips
        is_last = number + 1 == len(chains)
        read_beside_a_skip = not is_last and skips[number + 1] is not None
        if is_last:
            check_chain(name, rest, (nn.Tanh,) if levels else (), names)
        else:
            check_chain(name, rest, (nn.ReLU,) if read_beside_a_skip else (nn.ReLU, nn.LeakyReLU), names)
        layer = Layer(
            name=name,
            conv=conv,
            norm=norm,
            activation=NONE if act is None else _CODES[type(act)],
            slope=float(getattr(act, "negative_slope", 0.0)),
            skip_activation=RELU if crosses else None,
            dropout=dropout,
            skip=skips[number],
            activation_in_conv=norm is None and not crosses and not dropout and not read_beside_a_skip,
            in_size=in_size,
            out_size=_out_size(conv, in_size),
            taps=_live_taps(conv, in_size) if skip_dead_taps else _all_taps(conv),
        )
        if norm is not None and not _is_the_recipe_s(norm):
            raise InputError(
                f"engine: layer {name} has {norm}; expected BatchNorm2d with running averages of a momentum, or "
                "InstanceNorm2d without"
            )
        if min(layer.out_size) < 1 or (norm is not None and layer.out_size == (1, 1)):
            raise InputError(
                f"engine: layer {name} leaves {layer.out_size} of an image of {size}, and its norm needs two values "
                "per channel at least; enlarge the crop, or take fewer layers"
            )
        layers.append(layer)
    return Plan(layers, layers[0].in_channels)


def _is_the_recipe_s(norm: Normalisation) -> bool:
    if isinstance(norm, nn.InstanceNorm2d):
        return not norm.track_running_stats
    return norm.momentum is not None and norm.running_mean is not None and norm.num_batches_tracked is not None


def _flatten_unet(block: UnetBlock) -> Iterator[nn.Module]:
    """The modules of a U-Net in the order in which they run."""
    for module in block.model:
        if isinstance(module, UnetBlock):
            yield from _flatten_unet(module)
        else:
            yield module


def _skip_of(number: int, levels: int) -> int | None:
    """Decoder layer d_i reads encoder layer e_i; the innermost has no skip connection, nor has a discriminator."""
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
