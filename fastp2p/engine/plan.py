"""The plan: a network as a list of nodes, derived from its forward; what the engine's forward and backward walk.

A network's modules stay the one description of it. A plan holds them, not copies, and adds what is known before the
first step: who reads whom, every map's size, and which taps of a kernel ever meet a pixel.
"""

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import nn

from fastp2p.conv_shape import Size
from fastp2p.engine.forward import Forward, follow
from fastp2p.engine.links import Link
from fastp2p.engine.operation import LEAKY_RELU, NONE, RELU, TANH, Operation
from fastp2p.engine.supported import HINT, Supported, refuse
from fastp2p.engine.taps import Taps, all_taps, live_taps
from fastp2p.errors import InputError
from fastp2p.nn.block import Convolution, Normalisation


class Source(NamedTuple):
    """What a node reads: a node's result, by the node's number; -1 is the network's input."""

    node: int
    slot: int = 0  # 1 for a layer's second result


INPUT = Source(-1)
Activation = tuple[int, float]  # index in ACTIVATIONS, leaky_relu's slope


@dataclass(frozen=True, eq=False)
class Layer:
    """A convolution with what follows it, up to the inputs of its readers.

    Its result is drop(act(norm(conv(x)))): with `activation`, and for readers that want another one a second time with
    `second`. So in a U-Net each encoder layer serves the next one, and the decoder's across the skip connection.
    """

    name: str
    number: int  # among the network's layers
    sources: tuple[Source, ...]  # two are read one after the other, without a concatenation
    conv: Convolution
    norm: Normalisation | None
    activation: int  # index in ACTIVATIONS
    slope: float  # leaky_relu's
    second: int | None  # index in ACTIVATIONS
    dropout: float
    activation_in_conv: bool  # no pass of its own: the convolution applies it, the next layer's gradient its derivative
    read_once: bool  # so that its gradient is one other layer's data gradient
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


Node = Layer | Link


@dataclass(frozen=True)
class Plan:
    """A network at one image size."""

    nodes: list[Node]  # in the order in which they run
    outputs: list[Source]
    in_channels: int
    out_channels: list[int]  # each output's
    follows_layers: list[bool]  # whether what a node reads depends on parameters

    @property
    def layers(self) -> list[Layer]:
        return [node for node in self.nodes if isinstance(node, Layer)]

    def macs(self, images: int = 1) -> int:
        """Multiply-accumulates of the forward pass."""
        return sum(layer.macs(images) for layer in self.layers)

    def unreached(self, seeded: tuple[bool, ...]) -> Layer | None:
        """The last layer to which no gradient comes from those outputs that have one; None where all are reached."""
        reached = {source.node for source, has_one in zip(self.outputs, seeded, strict=True) if has_one}
        for place in reversed(range(len(self.nodes))):
            if place in reached:
                reached |= {source.node for source in self.nodes[place].sources}
            elif isinstance(node := self.nodes[place], Layer):
                return node
        return None

    def completes(self) -> dict[int, Source]:
        """By a layer's place, its last source, where this layer's data gradient completes what comes to a layer before.

        That one normalises or activates in a pass of its own, so dz follows from it. Its result is read there alone,
        and its other result, if it has one, later in the forward pass, so that gradient has come before.
        """
        readers: dict[int, list[Source]] = {}  # by the node that is read: (place of the reader, slot)
        reading = [(place, source) for place, node in enumerate(self.nodes) for source in node.sources]
        for place, source in [*reading, *((len(self.nodes), source) for source in self.outputs)]:
            readers.setdefault(source.node, []).append(Source(place, source.slot))
        found = {}
        for place, node in enumerate(self.nodes):
            source = node.sources[-1]
            before = self.nodes[source.node] if source != INPUT else None
            if not (isinstance(node, Layer) and isinstance(before, Layer)) or before.activation_in_conv:
                continue
            others = [reader for reader in readers[source.node] if reader != Source(place, source.slot)]
            alone = len(others) == len(readers[source.node]) - 1
            if alone and all(reader.node > place and reader.slot != source.slot for reader in others):
                found[place] = source
        return found

    def output_layer(self, number: int = 0) -> Layer | None:
        """The layer that makes an output of the network; None where a link or the input is the output."""
        source = self.outputs[number]
        node = None if source.node < 0 else self.nodes[source.node]
        return node if isinstance(node, Layer) else None


def plan_network(
    net: nn.Module, channels: int, size: Size, *, names: Sequence[str] = (), skip_dead_taps: bool = True
) -> Plan:
    """The plan of a network for images of so many channels and this (height, width).

    Args:
        net: convolutions, each with the norm, dropout and activation that follow it, and links between them: additions,
            concatenations of channels, padding by reflection, average pooling, upsampling by nearest neighbour.
        channels, size: of the network's input.
        names: of the convolutions in the order in which they run; by default conv1, conv2, ...
        skip_dead_taps: leave out taps that only ever meet padding: they change no result and have no gradient.

    Raises:
        InputError: naming the first module or function that the engine does not compute in its place. Also where a
            norm would see a single value per channel.
    """
    Supported(net)
    planner = _Planner(follow(net, channels, size), names)
    used = {id(module) for draft in planner.layers for module in (draft.conv, draft.norm)}
    for path, module in net.named_modules():
        if id(module) not in used and any(p is not None for p in module._parameters.values()):
            refuse(f"{path or 'the network'}: {module!r}", "has parameters that no layer uses")
    if not planner.layers:
        refuse("the network", "has no convolution")
    return planner.plan(channels, skip_dead_taps)


@dataclass(eq=False)
class _Draft:
    """A layer as far as it is known."""

    name: str
    number: int
    place: int  # among the nodes
    operation: Operation
    sources: tuple[Source, ...]
    norm: Any = None
    dropout: float = 0.0
    drops_first: bool = False  # before the activation
    activations: tuple[Activation, ...] = ()  # that readers ask for

    @property
    def conv(self) -> Any:
        return self.operation.module

    def slot(self, activation: Activation, reader: Operation) -> int:
        """Which of the layer's results has this activation."""
        if activation[0] == TANH and self.drops_first:
            reader.refuse("comes after dropout; expected it before")
        if activation not in self.activations:
            self.activations += (activation,)
        slopes = {slope for code, slope in self.activations if code == LEAKY_RELU}
        if len(self.activations) > 2 or len(slopes) > 1:
            reader.refuse(
                f"is a third activation of layer {self.name}'s result, or a second slope; expected two of one"
            )
        return self.activations.index(activation)


class _Planner:
    """Walks a forward's operations, and gives each reader what it reads: a layer's result, or a link's."""

    def __init__(self, forward: Forward, names: Sequence[str]):
        self.forward, self.names, self.read_at_the_end = forward, list(names), Counter(forward.outputs)
        self.nodes = list[_Draft | Link]()
        self.taken: dict[Operation, _Draft] = {}  # what a layer has taken in: its convolution, norm and dropout
        self.drops_after: dict[Operation, Operation] = {}  # a dropout that a layer has taken in -> activation before it
        self.links: dict[Operation, Source] = {}
        self.joined: dict[tuple[Source, ...], Source] = {}
        for operation in forward.operations:
            if operation.kind == "conv":
                self._add_layer(operation)
            elif operation.kind in ("add", "pad", "pool", "upsample"):
                sources = tuple(self._join(self._read(x, operation)) for x in operation.inputs)
                self.links[operation] = self._add_link(operation.kind, sources, operation.settings)
        self.outputs = [self._join(self._read(operation, operation)) for operation in forward.outputs]

    @property
    def layers(self) -> list[_Draft]:
        return [node for node in self.nodes if isinstance(node, _Draft)]

    def _add_layer(self, operation: Operation) -> None:
        """A convolution's layer, which takes in a norm and a dropout that read it alone."""
        conv, number = operation.module, len(self.layers)
        assert isinstance(conv, Convolution)
        if any(draft.conv is conv for draft in self.layers):
            operation.refuse("is called twice; expected each convolution once")
        sources = tuple(self._read(operation.inputs[0], operation))
        if len(sources) > (2 if isinstance(conv, nn.ConvTranspose2d) else 1):
            sources = (self._join(sources),)
        name = self.names[number] if number < len(self.names) else f"conv{number + 1}"
        draft = _Draft(name, number, len(self.nodes), operation, sources)
        self.nodes.append(draft)
        self.taken[operation] = draft
        last = operation
        if (norm := self._only_reader(last, "norm")) is not None:
            _check_norm(name, norm)
            if norm.module in [other.norm for other in self.layers]:
                norm.refuse("is called twice; expected each norm once")
            draft.norm, self.taken[norm], last = norm.module, draft, norm
        if (dropout := self._only_reader(last, "dropout")) is not None:
            draft.dropout, draft.drops_first, self.taken[dropout] = dropout.settings[0], True, draft
        elif (act := self._only_reader(last, "activation")) and (dropout := self._only_reader(act, "dropout")):
            draft.dropout, self.drops_after[dropout] = dropout.settings[0], act

    def _only_reader(self, operation: Operation, kind: str) -> Operation | None:
        """The operation of this kind that alone reads another, which is no output; None where there is no such."""
        readers = operation.readers
        alone = len(readers) == 1 and readers[0].kind == kind and not self.read_at_the_end[operation]
        return readers[0] if alone else None

    def _read(self, x: Operation, reader: Operation, activation: Activation | None = None) -> list[Source]:
        """What a reader reads when it reads x, after an activation: the parts of its channels, in their order."""
        x = self.drops_after.get(x, x)
        if x.kind == "activation":
            if activation is not None and (activation[0] != RELU or x.settings[0] == TANH):
                reader.refuse("comes after another activation")
            return self._read(x.inputs[0], x, activation or x.settings)  # relu(leaky_relu(x)) = relu(x)
        if x.kind == "cat":
            return [source for part in x.inputs for source in self._read(part, reader, activation)]
        if x in self.taken:
            return [Source(self.taken[x].place, self.taken[x].slot(activation or (NONE, 0.0), reader))]
        if activation is not None:
            reader.refuse("stands where no convolution is before it")
        if x.kind == "input":
            return [INPUT]
        if x not in self.links:
            x.refuse("stands where it is not computed; expected a convolution, then norm, dropout, activation, each "
                     "once at most")  # fmt: skip
        return [self.links[x]]

    def _join(self, sources: Sequence[Source]) -> Source:
        """The one source that holds the channels of several."""
        parts = tuple(sources)
        if len(parts) == 1:
            return parts[0]
        if parts not in self.joined:
            self.joined[parts] = self._add_link("cat", parts, ())
        return self.joined[parts]

    def _add_link(self, kind: str, sources: tuple[Source, ...], settings: Any) -> Source:
        number = sum(isinstance(node, Link) and node.kind == kind for node in self.nodes) + 1
        self.nodes.append(Link(f"{kind}{number}", kind, sources, settings))
        return Source(len(self.nodes) - 1)

    def plan(self, channels: int, skip_dead_taps: bool) -> Plan:
        """The plan, now that each node knows its readers."""
        readers: dict[Source, list[_Draft | Link | None]] = defaultdict(list)
        for node in self.nodes:
            for source in node.sources:
                readers[source].append(node)
        for source in self.outputs:
            readers[source].append(None)
        for draft in self.layers:
            if not any(readers[Source(draft.place, slot)] for slot in (0, 1)):
                draft.operation.refuse("has a result that nothing reads")
        nodes: list[Node] = [
            self._layer(node, readers, skip_dead_taps) if isinstance(node, _Draft) else node for node in self.nodes
        ]
        follows = list[bool]()
        for place in range(len(nodes)):
            before = [source.node for source in nodes[place].sources if source != INPUT]
            follows.append(any(isinstance(nodes[number], Layer) or follows[number] for number in before))
        out_channels = [operation.channels for operation in self.forward.outputs]
        return Plan(nodes, self.outputs, channels, out_channels, follows)

    def _layer(self, draft: _Draft, readers: dict[Source, list[Any]], skip_dead_taps: bool) -> Layer:
        conv, (first, *others) = draft.conv, draft.activations or ((NONE, 0.0),)
        reader = readers[Source(draft.place)]
        serves_a_layer = len(reader) == 1 and isinstance(reader[0], _Draft) and len(reader[0].sources) == 1
        ends = len(reader) == 1 and reader[0] is None
        in_size, out_size = draft.operation.inputs[0].size, draft.operation.size
        if min(out_size) < 1 or (draft.norm is not None and out_size == (1, 1)):
            raise InputError(
                f"engine: layer {draft.name} leaves {out_size} of an input of {in_size}; expected a pixel, or two "
                "before a norm; enlarge the crop, or take fewer layers"
            )
        return Layer(
            name=draft.name,
            number=draft.number,
            sources=draft.sources,
            conv=conv,
            norm=draft.norm,
            activation=first[0],
            slope=max(slope for _, slope in (first, *others)),
            second=others[0][0] if others else None,
            dropout=draft.dropout,
            activation_in_conv=draft.norm is None and not draft.dropout and not others
            and (first[0] == NONE or serves_a_layer or ends),
            read_once=serves_a_layer,
            in_size=in_size,
            out_size=out_size,
            taps=live_taps(conv, in_size, out_size) if skip_dead_taps else all_taps(conv),
        )  # fmt: skip


def _check_norm(layer: str, operation: Operation) -> None:
    """Raise InputError on a norm whose running averages the engine does not move."""
    norm = operation.module
    if isinstance(norm, nn.InstanceNorm2d):
        served = not norm.track_running_stats and norm.running_mean is None
    else:
        assert isinstance(norm, nn.BatchNorm2d)
        kept = (norm.momentum, norm.running_mean, norm.num_batches_tracked)
        served = norm.track_running_stats and all(value is not None for value in kept)
    if not served:
        raise InputError(
            f"engine: layer {layer} has {norm}; expected BatchNorm2d with running averages of a momentum, or "
            f"InstanceNorm2d without{HINT}"
        )
