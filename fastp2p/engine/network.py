"""Forward and backward of one network over its plan, by hand: no autograd."""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

import fastp2p.ops  # noqa: F401 (defines torch.ops.fastp2p)
from fastp2p.engine.arena import Arena
from fastp2p.engine.branch import Branch
from fastp2p.engine.plan import NONE, Layer, Normalisation, Plan
from fastp2p.engine.record import about
from fastp2p.nn.norm import SampleNorm2d

operators = torch.ops.fastp2p


class Kept(NamedTuple):
    """What the forward pass of a layer keeps for its backward pass."""

    x: Tensor  # the input; where there is a skip connection, the encoder's half of it
    x2: Tensor | None  # and the half from the layer before
    raw: Tensor | None  # the convolution's result, where a pass of its own normalises or activates it
    mean: Tensor | None
    var: Tensor | None
    y: Tensor  # the result for the next layer
    y2: Tensor | None  # the result for the decoder's layer across the skip connection


class FusedNetwork:
    """A network in training, on fused operators.

    Args:
        plan, arena: the network's layers, and its parameters.
        rng: (2,) int64, (seed, step) of the dropouts.
    """

    def __init__(self, plan: Plan, arena: Arena, rng: Tensor):
        self.plan, self.arena, self.rng = plan, arena, rng
        self.batch_norms = [layer.norm for layer in plan.layers if isinstance(layer.norm, nn.BatchNorm2d)]
        channels = {layer.out_channels for layer in plan.layers}
        # Statistics that change nothing, for layers that have a pass of their own and no norm
        self.no_stats = {c: (arena.param.new_zeros(1, c), arena.param.new_ones(1, c)) for c in channels}
        self.branch = Branch(arena.param.device)

    def forward(self, x: Tensor, *, batches: int = 1) -> list[Kept]:
        """All layers in training mode; running averages move once for each batch, as upstream's do in each pass.

        Args:
            x: (N, C, H, W) of the dtype of computing, channels_last.
            batches: N images are so many batches of equal size, each with statistics of its own.
        """
        kept: list[Kept] = []
        for number, layer in enumerate(self.plan.layers):
            kept.append(self._forward(number, layer, x, kept, batches))
            x = kept[-1].y
        if self.batch_norms:
            counters = [norm.num_batches_tracked for norm in self.batch_norms if norm.num_batches_tracked is not None]
            torch._foreach_add_(counters, [statistics_groups(norm, len(x), batches) for norm in self.batch_norms])
        return kept

    def _forward(self, number: int, layer: Layer, x: Tensor, kept: list[Kept], batches: int) -> Kept:
        x2 = None
        if layer.skip is not None:
            x, x2 = kept[layer.skip].y2, x  # type: ignore[assignment]
        groups = 0 if layer.norm is None else statistics_groups(layer.norm, len(x), batches)
        activation = layer.activation if layer.activation_in_conv else NONE
        args = (self.arena.weight(number), layer.conv.bias, None, layer.stride, layer.taps.padding)
        settings = (activation, layer.slope, groups)
        about(self.arena, layer.name, "forward", len(x))
        if layer.transposed:
            out, mean, var = operators.conv_transpose(x, x2, *args, *layer.out_size, *settings)
        else:
            out, mean, var = operators.conv(x, *args, *settings)
        if layer.activation_in_conv:
            return Kept(x, x2, None, None, None, out, None)

        if layer.norm is None:
            mean, var = self.no_stats[layer.out_channels]
        elif isinstance(layer.norm, nn.BatchNorm2d):
            n_values = len(x) // groups * layer.out_size[0] * layer.out_size[1]
            averages = (layer.norm.running_mean, layer.norm.running_var)
            about(self.arena, layer.name, "running averages", len(x))
            operators.running_stats(*averages, mean, var, n_values, layer.norm.momentum)
        about(self.arena, layer.name, "norm and activation", len(x))
        y, y2 = operators.norm_act(out, mean, var, *self._norm_act_settings(number, layer))
        return Kept(x, x2, out, mean, var, y, None if layer.skip_activation is None else y2)

    def backward_and_adam(self, kept: list[Kept], dz: Tensor) -> None:
        """The gradients of all parameters, and Adam: of each weight as soon as nothing needs the old one any more.

        Args:
            kept: of `forward`.
            dz: the gradient of the last convolution's result before its activation, like kept[-1].y.
        """
        self.arena.set_bias_corrections()
        gradients: dict[int, Tensor] = {}
        for number, layer, dz_here in self._gradients(kept, dz, of_parameters=gradients):
            outer, outer2, inner = dz_here, None, kept[number].x
            if layer.transposed:
                outer, outer2, inner = kept[number].x, kept[number].x2, dz_here
            with self.branch.beside(outer, outer2, inner):
                self.arena.update_weight(number, outer, outer2, inner, layer.stride, layer.taps.padding)
        self.branch.join()
        self.arena.update_the_rest(gradients)

    def input_gradient(
        self, kept: list[Kept], dz: Tensor, *, first_channel: int, gate: Tensor, activation: int
    ) -> Tensor:
        """The gradient of the input's channels from first_channel on, parameters held fixed.

        Args:
            kept, dz: as for `backward_and_adam`.
            gate: these channels of the input, which an activation gave: the gradient is the one before it.
            activation: its index in ACTIVATIONS.

        Returns:
            (N, C - first_channel, H, W), channels_last.
        """
        for _, layer, dz_here in self._gradients(kept, dz):  # noqa: B007 (the last ones are of the first layer)
            pass
        weight = self.arena.weight(0)[:, first_channel:].contiguous(memory_format=torch.channels_last)
        args = (gate, layer.stride, layer.taps.padding, *layer.in_size, activation, 0.0, 0)
        about(self.arena, layer.name, "data gradient", len(gate))
        dx: Tensor = operators.conv_transpose(dz_here, None, weight, None, *args)[0]
        return dx

    def _gradients(
        self, kept: list[Kept], dz_last: Tensor, *, of_parameters: dict[int, Tensor] | None = None
    ) -> Iterator[tuple[int, Layer, Tensor]]:
        """Each layer with its dz, the gradient before its norm and activation, from the last layer to the first.

        A layer is given out once its own data gradient is computed, so its weight may be changed then.

        Args:
            of_parameters: to be filled with the gradients of biases and norms' parameters, by id(parameter); None
                where they are not wanted.
        """
        layers = self.plan.layers
        dy, dy_mean = dz_last, None
        across: dict[int, Tensor] = {}  # gradients that come over the skip connections
        for number in reversed(range(len(layers))):
            layer, k, dz = layers[number], kept[number], dy
            if not layer.activation_in_conv:
                norm_act = (k.raw, k.mean, k.var, *self._norm_act_settings(number, layer))
                about(self.arena, layer.name, "norm and activation, backward", len(dy))
                dz, dweight, dbias = operators.norm_act_backward(dy, across.pop(number, None), *norm_act)
                if of_parameters is not None and layer.norm is not None and layer.norm.weight is not None:
                    of_parameters |= {id(layer.norm.weight): dweight, id(layer.norm.bias): dbias}
                elif of_parameters is not None and layer.trains_bias:
                    of_parameters[id(layer.conv.bias)] = dbias
            elif of_parameters is not None and layer.trains_bias:
                if dy_mean is None:
                    about(self.arena, layer.name, "bias gradient", len(dz))
                    dy_mean = operators.norm_stats(dz, 1)[0]
                of_parameters[id(layer.conv.bias)] = dy_mean[0] * (dz.numel() // dz.shape[1])
            if number > 0:
                dy, dy_mean = self._data_gradient(number, layer, dz, kept, of_parameters is not None)
                if layer.skip is not None:
                    encoder_channels = layers[layer.skip].out_channels
                    across[layer.skip], dy = dy[:, :encoder_channels], dy[:, encoder_channels:]
            yield number, layer, dz

    def _data_gradient(
        self, number: int, layer: Layer, dz: Tensor, kept: list[Kept], wants_mean: bool
    ) -> tuple[Tensor, Tensor | None]:
        """The gradient of the layer's input, both halves of it beside a skip connection; and its mean over the pixels.

        A layer before that has its activation in the convolution leaves the derivative to this operator; the mean is
        taken where that layer has a bias, whose gradient it is but for a factor.
        """
        before = self.plan.layers[number - 1]
        gated = before.activation_in_conv and before.activation != NONE
        gate, activation = (kept[number - 1].y, before.activation) if gated else (None, NONE)
        groups = int(wants_mean and before.activation_in_conv and before.trains_bias)
        args = (self.arena.weight(number), None, gate, layer.stride, layer.taps.padding)
        settings = (activation, before.slope, groups)
        about(self.arena, layer.name, "data gradient", len(dz))
        if layer.transposed:
            dx, mean, _ = operators.conv(dz, *args, *settings)
        else:
            dx, mean, _ = operators.conv_transpose(dz, None, *args, *layer.in_size, *settings)
        return dx, mean if groups else None

    def _norm_act_settings(self, number: int, layer: Layer) -> tuple[object, ...]:
        """What norm_act and its backward take after the statistics."""
        norm = layer.norm
        weight, bias, eps = (None, None, 0.0) if norm is None else (norm.weight, norm.bias, norm.eps)
        rng = self.rng if layer.dropout else None
        second = -1 if layer.skip_activation is None else layer.skip_activation
        return weight, bias, rng, eps, layer.activation, layer.slope, second, layer.dropout, number, norm is None


def statistics_groups(norm: Normalisation, images: int, batches: int) -> int:
    """The number of groups of images that each have statistics of their own."""
    return images if isinstance(norm, nn.InstanceNorm2d | SampleNorm2d) else batches
