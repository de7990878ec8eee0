"""What a training step calls: every operator, in its order, told from the plans without running it."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from torch import nn

from fastp2p.engine.network import FusedNetwork, statistics_groups
from fastp2p.engine.plan import NONE, TANH, Layer
from fastp2p.engine.ranges import Part
from fastp2p.models.pix2pix.step import FusedStep

CONVOLUTIONS = ("conv", "conv_transpose", "conv_wgrad", "conv_wgrad_adam")
Net = Literal["netG", "netD"]
Direction = Literal[
    "augment",
    "forward",
    "norm and activation",
    "running averages",
    "loss",
    "norm and activation, backward",
    "data gradient",
    "weight gradient",
    "weight gradient and Adam",
    "bias gradient",
    "Adam of the rest",  # biases and norms' parameters
    "Adam",  # of gathered gradients
]


@dataclass(frozen=True)
class Call:
    """One call of an operator."""

    part: Part
    direction: Direction
    operator: str
    images: int
    net: Net | None = None
    layer: Layer | None = None
    # Of a convolution
    skipped: int = 0  # channels that come over a skip connection, apart from the layer's own
    inner: int | None = None  # channels of the larger image, where it is not all of the weight's
    activation: int = NONE  # index in ACTIVATIONS
    slope: float = 0.0
    bias: bool = False
    gate: bool = False
    stat_groups: int = 0  # of the statistics that are made, or by norm_act and running_stats read
    # Of a pass over a map of losses, a batch of images or a flat buffer
    elements: int = 0
    target: bool = False  # patch_loss compares with a map
    rounds: bool = False  # adam writes compute weights
    unscales: bool = False  # adam reads a factor

    @property
    def name(self) -> str:
        """netG e4 data gradient."""
        layer = None if self.layer is None else self.layer.name
        return " ".join(filter(None, (self.net, layer, self.direction)))


def calls(step: FusedStep, images: int) -> Iterator[Call]:
    """In the order in which a step of so many images calls them, the augmentation before it included."""
    (height, width), n, (A, B) = step.size, images, step.channels
    yield Call("augment", "augment", "augment", n, elements=n * (A + B) * height * width)
    netG, netD = Walk("netG", step.netG), Walk("netD", step.netD)
    yield from netG.forward("netG forward", n)

    yield from netD.forward("netD forward", 2 * n, batches=2)
    for _ in ("fake", "real"):
        yield netD.loss("netD forward", n)
    yield from netD.backward_and_adam("netD backward and Adam", 2 * n)

    through_D: Part = "netD forward and backward for netG"
    yield from netD.forward(through_D, n)
    yield netD.loss(through_D, n)
    yield from netD.gradients(through_D, n, of_parameters=False)
    first = netD.layers[0]
    yield Call(
        through_D, "data gradient", "conv_transpose", n, "netD", first, inner=B, activation=TANH, gate=True
    )  # of fake_B, and on through its tanh
    yield Call(through_D, "loss", "patch_loss", n, "netG", elements=n * B * height * width, target=True)
    yield from netG.backward_and_adam("netG backward and Adam", n)


class Walk:
    """`FusedNetwork`'s forward and backward, as calls."""

    def __init__(self, name: Net, net: FusedNetwork):
        self.name, self.layers, self.arena = name, net.plan.layers, net.arena

    def forward(self, part: Part, images: int, *, batches: int = 1) -> Iterator[Call]:
        for layer in self.layers:
            groups = 0 if layer.norm is None else statistics_groups(layer.norm, images, batches)
            yield Call(
                *(part, "forward", "conv_transpose" if layer.transposed else "conv", images, self.name, layer),
                skipped=self._skipped(layer),
                activation=layer.activation if layer.activation_in_conv else NONE,
                slope=layer.slope,
                bias=layer.conv.bias is not None,
                stat_groups=groups,
            )
            if layer.activation_in_conv:
                continue
            about = (images, self.name, layer)
            if isinstance(layer.norm, nn.BatchNorm2d):
                yield Call(part, "running averages", "running_stats", *about, stat_groups=groups)
            yield Call(part, "norm and activation", "norm_act", *about, stat_groups=groups or 1)

    def loss(self, part: Part, images: int) -> Call:
        """Of so many maps of logits."""
        last = self.layers[-1]
        elements = images * last.out_channels * last.out_size[0] * last.out_size[1]
        return Call(part, "loss", "patch_loss", images, self.name, elements=elements)

    def gradients(self, part: Part, images: int, *, of_parameters: bool, batches: int = 1) -> Iterator[Call]:
        """Of all layers, from the last one on; of weights, with Adam where it is done on the spot."""
        for number, layer in reversed([*enumerate(self.layers)]):
            about = (images, self.name, layer)
            if not layer.activation_in_conv:
                groups = 1 if layer.norm is None else statistics_groups(layer.norm, images, batches)
                kind: Direction = "norm and activation, backward"
                yield Call(part, kind, "norm_act_backward", *about, stat_groups=groups)
            elif of_parameters and layer.trains_bias and layer is self.layers[-1]:
                yield Call(part, "bias gradient", "norm_stats", *about, stat_groups=1)  # others come with the data's
            if number > 0:
                before = self.layers[number - 1]
                gated = before.activation_in_conv and before.activation != NONE
                yield Call(
                    *(part, "data gradient", "conv" if layer.transposed else "conv_transpose", *about),
                    activation=before.activation if gated else NONE,
                    slope=before.slope,
                    gate=gated,
                    stat_groups=int(of_parameters and before.activation_in_conv and before.trains_bias),
                )
            if of_parameters and self.arena.grad is None:
                yield Call(part, "weight gradient and Adam", "conv_wgrad_adam", *about, skipped=self._skipped(layer))
            elif of_parameters:
                yield Call(part, "weight gradient", "conv_wgrad", *about, skipped=self._skipped(layer))

    def backward_and_adam(self, part: Part, images: int) -> Iterator[Call]:
        """netD's are of two batches at once."""
        batches = 2 if self.name == "netD" else 1
        yield from self.gradients(part, images, of_parameters=True, batches=batches)
        arena = self.arena
        rest = arena.param.numel() - arena.weights_end
        if arena.grad is None:
            if rest:
                yield Call(part, "Adam of the rest", "adam", images, self.name, elements=rest)
            return
        rounds, unscales = arena.compute is not None, arena.unscale is not None
        weights = arena.weights_end
        yield Call(part, "Adam", "adam", images, self.name, elements=weights, rounds=rounds, unscales=unscales)
        if rest:
            yield Call(part, "Adam of the rest", "adam", images, self.name, elements=rest, unscales=unscales)

    def _skipped(self, layer: Layer) -> int:
        return 0 if layer.skip is None else self.layers[layer.skip].out_channels
