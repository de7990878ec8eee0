"""Forward and backward of one network over its plan, by hand: no autograd."""

import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

import fastp2p.ops  # noqa: F401 (defines torch.ops.fastp2p)
from fastp2p.engine.arena import Arena
from fastp2p.engine.branch import Branch
from fastp2p.engine.counts import Counts
from fastp2p.engine.operation import NONE, TANH
from fastp2p.engine.plan import INPUT, Layer, Plan, Source
from fastp2p.engine.record import about
from fastp2p.errors import InputError
from fastp2p.nn.norm import statistics_groups
from fastp2p.norm_gate import NO_NORM, NormGate

operators = torch.ops.fastp2p


class Kept(NamedTuple):
    """What the forward pass of a node keeps for its backward pass."""

    operands: tuple[Tensor, ...]  # what it read
    y: Tensor  # its result
    y2: Tensor | None = None  # a layer's second result
    raw: Tensor | None = None  # the convolution's result, where a pass of its own normalises or activates it
    mean: Tensor | None = None
    var: Tensor | None = None


class BeforeNorm(NamedTuple):
    """The gradient before a layer's activation and norm's affine map, and its sums over the pixels."""

    dz: Tensor
    sum_dz: Tensor  # (G, C)
    sum_dz_xhat: Tensor  # (G, C)


Gradients = dict[Source, Tensor]


class FusedNetwork:
    """A network in training, on fused operators.

    Args:
        plan, arena: the network's nodes, and its parameters.
        rng: (2,) int64, (seed, step) of the dropouts.
    """

    def __init__(self, plan: Plan, arena: Arena, rng: Tensor):
        self.plan, self.arena, self.rng = plan, arena, rng
        self.batch_norms = [layer.norm for layer in plan.layers if isinstance(layer.norm, nn.BatchNorm2d)]
        channels = {layer.out_channels for layer in plan.layers}
        # Statistics that change nothing, for layers that have a pass of their own and no norm
        self.no_stats = {c: (arena.param.new_zeros(1, c), arena.param.new_ones(1, c)) for c in channels}
        self.branch = Branch(arena.param.device)
        self.counts: Counts | None = None  # that the rng and the norms' numbers of batches are a part of
        self._unreached = functools.cache(plan.unreached)
        self._completes = plan.completes()

    def forward(self, x: Tensor, *, batches: int = 1) -> list[Kept]:
        """All nodes in training mode; running averages move once for each batch, as autograd's do in each pass.

        Args:
            x: (N, C, H, W) of the dtype of computing, channels_last.
            batches: N images are so many batches of equal size, each with statistics of its own.
        """
        kept: list[Kept] = []
        for node in self.plan.nodes:
            operands = tuple(x if source == INPUT else _result(kept, source) for source in node.sources)
            if isinstance(node, Layer):
                kept.append(self._forward(node, operands, batches))
            else:
                kept.append(Kept(operands, node.forward(*operands)))
        if self.batch_norms and self.counts is None:
            counters = [norm.num_batches_tracked for norm in self.batch_norms if norm.num_batches_tracked is not None]
            torch._foreach_add_(counters, [statistics_groups(norm, len(x), batches) for norm in self.batch_norms])
        return kept

    def outputs(self, kept: Sequence[Kept]) -> list[Tensor]:
        """What the network gives, of `forward`."""
        return [_result(kept, source) for source in self.plan.outputs]

    def _forward(self, layer: Layer, operands: tuple[Tensor, ...], batches: int) -> Kept:
        x, x2 = (*operands, None)[:2]
        assert x is not None
        if layer.dropout and self.counts is not None:
            self.counts.wait()
        groups = 0 if layer.norm is None else statistics_groups(layer.norm, len(x), batches)
        activation = layer.activation if layer.activation_in_conv else NONE
        args = (self.arena.weight(layer), layer.conv.bias, None, layer.stride, layer.taps.padding)
        settings = (activation, layer.slope, groups)
        about(self, layer.name, "forward", len(x))
        if layer.transposed:
            out, mean, var = operators.conv_transpose(x, x2, *args, *layer.out_size, *settings)
        else:
            out, mean, var = operators.conv(x, *args, *settings)
        if layer.activation_in_conv:
            return Kept(operands, out)

        if layer.norm is None:
            mean, var = self.no_stats[layer.out_channels]
        parameters, constants = self._norm_act_settings(layer)
        about(self, layer.name, "norm and activation", len(x))
        if isinstance(layer.norm, nn.BatchNorm2d):
            running = (layer.norm.running_mean, layer.norm.running_var, layer.norm.momentum)
            y, y2 = operators.batch_norm_act(out, mean, var, *parameters, *running, *constants)
        else:
            y, y2 = operators.norm_act(out, mean, var, *parameters, *constants, layer.norm is None)
        return Kept(operands, y, None if layer.second is None else y2, out, mean, var)

    def backward_and_adam(
        self, kept: Sequence[Kept], *seeds: Tensor | None, seed_sums: Sequence[Tensor] | None = None
    ) -> None:
        """The gradients of all parameters, and Adam: of each weight as soon as nothing needs the old one any more.

        Args:
            kept: of `forward`.
            seeds: for each output its gradient; of a layer whose convolution applies the activation, the one before
                it. None where an output has none.
            seed_sums: where they are known each seed's sums over its pixels, (C,) of the arena's dtype.
        """
        self.arena.begin()
        self._backward(kept, *seeds, seed_sums=seed_sums)
        if self.arena.gathers:  # Adam begins when the last gradient has come; else it goes on beside the branch
            self.branch.join()
        self.arena.finish()
        self.branch.join()

    def backward(
        self,
        kept: Sequence[Kept],
        *seeds: Tensor | None,
        seed_sums: Sequence[Tensor] | None = None,
        to_input: bool = False,
    ) -> Tensor | None:
        """Give the arena the gradients of all parameters, between its `begin` and its `finish`.

        An arena that accumulates adds those of several passes; any other has moved the weights when this returns.

        Args:
            kept, seeds, seed_sums: as for `backward_and_adam`.
            to_input: whether the gradient of the network's input is wanted.

        Returns:
            That gradient, (N, C, H, W) channels_last, or None.
        """
        dx = self._backward(kept, *seeds, seed_sums=seed_sums, to_input=to_input)
        self.branch.join()
        return dx

    def _backward(
        self,
        kept: Sequence[Kept],
        *seeds: Tensor | None,
        seed_sums: Sequence[Tensor] | None = None,
        to_input: bool = False,
    ) -> Tensor | None:
        """`backward`, which leaves the branch to be joined."""
        seeded = tuple(seed is not None for seed in seeds)
        if (layer := self._unreached(seeded)) is not None:
            raise InputError(f"engine: no gradient comes to layer {layer.name}; expected a seed that leads to it")
        gradients, of_parameters = self._seed(seeds), dict[int, Tensor]()
        sums = {} if seed_sums is None else dict(zip(map(id, seeds), seed_sums, strict=True))
        parts = self._gradients(kept, gradients, of_parameters=of_parameters, sums=sums, to_input=to_input)
        for layer, dz, operands in parts:
            outer, outer2, inner = dz, None, operands[0]
            if layer.transposed:
                (outer, outer2), inner = (*operands, None)[:2], dz  # type: ignore[assignment]
            with self.branch.beside(outer, outer2, inner):
                self.arena.take_weight_gradient(self, layer, outer, outer2, inner)
        self.arena.take_gradients(of_parameters)
        return gradients.get(INPUT) if to_input else None

    def input_gradient(
        self, kept: Sequence[Kept], *seeds: Tensor | None, first_channel: int, gate: Tensor, activation: int
    ) -> Tensor:
        """The gradient of the input's channels from first_channel on, parameters held fixed.

        The plan's first layer must be all that reads the input.

        Args:
            kept, seeds: as for `backward_and_adam`.
            gate: these channels of the input, which an activation gave: the gradient is the one before it.
            activation: its index in ACTIVATIONS.

        Returns:
            (N, C - first_channel, H, W), channels_last.
        """
        for layer, dz, _ in self._gradients(kept, self._seed(seeds)):  # noqa: B007 (the last are of the first layer)
            pass
        weight = self.arena.weight(layer)[:, first_channel:]
        args = (gate, layer.stride, layer.taps.padding, *layer.in_size, activation, 0.0, 0)
        about(self, layer.name, "data gradient", len(gate))
        dx: Tensor = operators.conv_transpose(dz, None, weight, None, *args)[0]
        return dx

    def _seed(self, seeds: Sequence[Tensor | None]) -> Gradients:
        gradients: Gradients = {}
        for source, seed in zip(self.plan.outputs, seeds, strict=True):
            if seed is not None:
                _add(gradients, source, seed)
        return gradients

    def _gradients(
        self,
        kept: Sequence[Kept],
        gradients: Gradients,
        *,
        of_parameters: dict[int, Tensor] | None = None,
        sums: Mapping[int, Tensor] | None = None,
        to_input: bool = False,
    ) -> Iterator[tuple[Layer, Tensor, tuple[Tensor, ...]]]:
        """Each layer with its dz, the gradient before its norm and activation, from the last to the first, and what it
        read. It is given out once its own data gradient is computed, so its weight may be changed then.

        Args:
            gradients: of the outputs; taken from, and at the end the input's is left if `to_input`.
            of_parameters: to be filled with the gradients of biases and norms' parameters, by id(parameter); None
                where they are not wanted.
            sums: over the pixels of gradients, by id(gradient).
        """
        totals: dict[int, Tensor] = {}  # over the pixels of a layer's dz, by its node
        before_norm: dict[int, BeforeNorm] = {}  # by a layer's node
        for place in reversed(range(len(self.plan.nodes))):
            node, operands = self.plan.nodes[place], kept[place].operands
            flows = to_input or self.plan.follows_layers[place]
            dy = gradients.pop(Source(place), None)
            if not isinstance(node, Layer):
                parts = node.backward(dy, *operands) if flows and dy is not None else ()
                for source, part in zip(node.sources, parts, strict=False):
                    _add(gradients, source, part)
                continue
            if place in before_norm:
                dz = self._before_conv(node, kept[place], before_norm.pop(place), of_parameters)
            else:
                dy2 = gradients.pop(Source(place, 1), None)
                total = totals.get(place) if sums is None else sums.get(id(dy), totals.get(place))
                dz = self._before_norm_act(node, kept[place], dy, dy2, total, of_parameters)
            if flows and place in self._completes:
                self._gradient_before_norm(place, node, dz, kept, gradients, before_norm, of_parameters is not None)
            elif flows:
                self._data_gradient(node, dz, kept, gradients, totals if of_parameters is not None else None)
            yield node, dz, operands

    def _before_norm_act(
        self,
        layer: Layer,
        kept: Kept,
        dy: Tensor | None,
        dy2: Tensor | None,
        dz_sum: Tensor | None,
        of_parameters: dict[int, Tensor] | None,
    ) -> Tensor:
        """dz from the gradients of a layer's results; fills in those of its bias or its norm's parameters."""
        if layer.activation_in_conv:
            assert dy is not None
            dy = dy.contiguous(memory_format=torch.channels_last)  # a part of a concatenation's is not
            if of_parameters is not None and layer.trains_bias:
                if dz_sum is None:
                    about(self, layer.name, "bias gradient", len(dy))
                    dz_sum = operators.norm_stats(dy, 1)[0][0] * (dy.numel() // dy.shape[1])
                of_parameters[id(layer.conv.bias)] = dz_sum
            return dy
        parameters, constants = self._norm_act_settings(layer)
        norm_act = (kept.raw, kept.mean, kept.var, *parameters, *constants, layer.norm is None)
        dy = torch.zeros_like(kept.y) if dy is None else dy
        about(self, layer.name, "norm and activation, backward", len(dy))
        dz: Tensor
        dz, dweight, dbias = operators.norm_act_backward(dy, dy2, *norm_act)
        if of_parameters is not None and layer.norm is not None and layer.norm.weight is not None:
            of_parameters |= {id(layer.norm.weight): dweight, id(layer.norm.bias): dbias}
        elif of_parameters is not None and layer.trains_bias:
            of_parameters[id(layer.conv.bias)] = dbias
        return dz

    def _before_conv(
        self, layer: Layer, kept: Kept, before: BeforeNorm, of_parameters: dict[int, Tensor] | None
    ) -> Tensor:
        """The gradient of the convolution's result; fills in those of its bias or its norm's parameters."""
        if layer.norm is None:
            if of_parameters is not None and layer.trains_bias:
                of_parameters[id(layer.conv.bias)] = before.sum_dz[0]
            return before.dz
        about(self, layer.name, "norm, backward", len(before.dz))
        dx: Tensor
        dx, dweight, dbias = operators.norm_dx(
            before.dz, kept.raw, kept.mean, kept.var, layer.norm.weight, *before[1:], layer.norm.eps
        )
        if of_parameters is not None and layer.norm.weight is not None:
            of_parameters |= {id(layer.norm.weight): dweight, id(layer.norm.bias): dbias}
        return dx

    def _gradient_before_norm(
        self,
        place: int,
        layer: Layer,
        dz: Tensor,
        kept: Sequence[Kept],
        gradients: Gradients,
        before_norm: dict[int, BeforeNorm],
        trains: bool,
    ) -> None:
        """The data gradient of a layer, and on through the activation of the layer that its last source comes from.

        Args:
            before_norm: to be filled in.
            trains: whether the parameters' gradients are wanted.
        """
        first, last = layer.sources[0], layer.sources[-1]
        before, read = self.plan.nodes[last.node], kept[last.node]
        assert isinstance(before, Layer)
        assert read.mean is not None
        (weight, bias, rng), (eps, activation, slope, second, dropout, number) = self._norm_act_settings(before)
        if last.slot:  # the second result's activation is what this gradient goes through
            activation, second = second, activation
        addend = gradients.pop(Source(last.node, 1 - last.slot), None)
        channels = 0  # the first source's, whose gradient is given on as it is
        if len(layer.sources) > 1:
            channels = self.plan.in_channels if first == INPUT else _result(kept, first).shape[1]
        norm = NormGate(
            *(read.mean, read.var, weight, bias, rng, addend),
            *(channels, eps, -1 if addend is None else int(second), dropout, int(number)),
        )
        groups = len(read.mean) if before.norm is not None else int(trains and before.trains_bias)
        args = (self.arena.weight(layer), None, read.raw, layer.stride, layer.taps.padding)
        about(self, layer.name, "data gradient", len(dz))
        if layer.transposed:
            dx, *sums = operators.conv(dz, *args, activation, slope, groups, *norm)
        else:
            dx, *sums = operators.conv_transpose(dz, None, *args, *layer.in_size, activation, slope, groups, *norm)
        before_norm[last.node] = BeforeNorm(dx[:, channels:], *sums)
        if channels:
            _add(gradients, first, dx[:, :channels])

    def _data_gradient(
        self,
        layer: Layer,
        dz: Tensor,
        kept: Sequence[Kept],
        gradients: Gradients,
        totals: dict[int, Tensor] | None,
    ) -> None:
        """The gradient of what a layer read; and its sum over the pixels.

        A layer before that has its activation in the convolution leaves the derivative to this operator; the sum is
        taken where that layer has a bias, whose gradient it is.
        """
        first, *others = layer.sources
        node = None if first == INPUT or others else self.plan.nodes[first.node]
        before = node if isinstance(node, Layer) and node.activation_in_conv and node.read_once else None
        gate, activation, slope, groups, norm = None, NONE, 0.0, 0, NO_NORM
        if before is not None:
            activation, slope = before.activation, before.slope
            gate = None if activation == NONE else kept[first.node].y
            # The operator takes a norm's gate before its activation. Of that ReLU and LeakyReLU ask for the sign, which
            # their result has too; Tanh asks for more
            if totals is not None and before.trains_bias and activation != TANH:
                gate, groups, norm = kept[first.node].y, 1, NormGate(*self.no_stats[before.out_channels])
        args = (self.arena.weight(layer), None, gate, layer.stride, layer.taps.padding)
        settings = (activation, slope, groups, *norm)
        about(self, layer.name, "data gradient", len(dz))
        if layer.transposed:
            dx, total, _ = operators.conv(dz, *args, *settings)
        else:
            dx, total, _ = operators.conv_transpose(dz, None, *args, *layer.in_size, *settings)
        if groups and totals is not None:
            totals[first.node] = total[0]
        if not others:
            _add(gradients, first, dx)
            return
        channels = _result(kept, first).shape[1] if first != INPUT else self.plan.in_channels
        _add(gradients, first, dx[:, :channels])
        _add(gradients, others[0], dx[:, channels:])

    def _norm_act_settings(self, layer: Layer) -> tuple[tuple[Tensor | None, ...], tuple[float, ...]]:
        """What norm_act and its like take after the statistics: weight, bias, rng; eps and what follows."""
        norm = layer.norm
        weight, bias, eps = (None, None, 0.0) if norm is None else (norm.weight, norm.bias, norm.eps)
        rng = self.rng if layer.dropout else None
        second = -1 if layer.second is None else layer.second
        return (weight, bias, rng), (eps, layer.activation, layer.slope, second, layer.dropout, layer.number)


def _result(kept: Sequence[Kept], source: Source) -> Tensor:
    result = kept[source.node].y2 if source.slot else kept[source.node].y
    assert result is not None
    return result


def _add(gradients: Gradients, source: Source, gradient: Tensor) -> None:
    """Add to what has come to a source so far, not in place: an addition gives one tensor to both its operands."""
    if source in gradients:
        gradient = (gradients[source] + gradient).contiguous(memory_format=torch.channels_last)
    gradients[source] = gradient
