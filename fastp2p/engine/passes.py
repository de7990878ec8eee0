"""Forward and backward of one network over its plan, by hand: no autograd."""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

import fastp2p.ops  # noqa: F401 (defines torch.ops.fastp2p)
from fastp2p.engine.arena import Arena
from fastp2p.engine.branch import Branch
from fastp2p.engine.plan import NONE, Layer, Normalisation, Plan
from fastp2p.networks import SampleNorm2d

operators = torch.ops.fastp2p


class Kept(NamedTuple):
    """What a layer's backward reads of its forward."""

    x: Tensor  # what the convolution read; beside a skip connection, what came across it
    x2: Tensor | None  # and then what the layer before gave
    raw: Tensor | None  # the convolution's result, where a pass of its own follows it
    mean: Tensor | None
    var: Tensor | None
    y: Tensor  # for the next layer
    y2: Tensor | None  # for the reader across the skip connection


class Passes:
    """The forward and backward passes of one network.

    Args:
        plan, arena: the network's.
        rng: (2,) int64, (seed, step) of the dropouts.
    """

    def __init__(self, plan: Plan, arena: Arena, rng: Tensor):
        self.plan, self.arena, self.rng = plan, arena, rng
        self.batch_norms = [layer.norm for layer in plan.layers if isinstance(layer.norm, nn.BatchNorm2d)]
        channels = {layer.out_channels for layer in plan.layers}
        # Statistics that change nothing, for layers that have a pass of their own and no norm
        self.no_stats = {c: (arena.param.new_zeros(1, c), arena.param.new_ones(1, c)) for c in channels}
        self.branch = Branch(arena.param.device)
        self.gradients: dict[int, Tensor] = {}  # of biases and the norms' parameters, by id(parameter)

    def forward(self, x: Tensor, *, passes: int = 1) -> list[Kept]:
        """All layers in training mode; running statistics move once for each pass.

        Args:
            x: (N, C, H, W) of the dtype of computing, channels_last.
            passes: as how many passes of N / passes images the batch counts, each with statistics of its own.
        """
        kept: list[Kept] = []
        for number, layer in enumerate(self.plan.layers):
            kept.append(self._forward(number, layer, x, kept, passes))
            x = kept[-1].y
        if self.batch_norms:
            counters = [norm.num_batches_tracked for norm in self.batch_norms if norm.num_batches_tracked is not None]
            torch._foreach_add_(counters, groups_of(self.batch_norms[0], len(x), passes))
        return kept

    def _forward(self, number: int, layer: Layer, x: Tensor, kept: list[Kept], passes: int) -> Kept:
        x2 = None
        if layer.skip is not None:
            x, x2 = kept[layer.skip].y2, x  # type: ignore[assignment]
        groups = 0 if layer.norm is None else groups_of(layer.norm, len(x), passes)
        activation = layer.activation if layer.epilogue else NONE
        args = (self.arena.weight(number), layer.conv.bias, None, layer.stride, layer.taps.padding)
        settings = (activation, layer.slope, groups)
        if layer.transposed:
            out, mean, var = operators.up(x, x2, *args, *layer.out_size, *settings)
        else:
            out, mean, var = operators.down(x, *args, *settings)
        if layer.epilogue:
            return Kept(x, x2, None, None, None, out, None)

        if layer.norm is None:
            mean, var = self.no_stats[layer.out_channels]
        elif isinstance(layer.norm, nn.BatchNorm2d):
            n_values = len(x) // groups * layer.out_size[0] * layer.out_size[1]
            averages = (layer.norm.running_mean, layer.norm.running_var)
            operators.running_stats(*averages, mean, var, n_values, layer.norm.momentum)
        y, y2 = operators.norm_act(out, mean, var, *self._norm_act_settings(number, layer))
        return Kept(x, x2, out, mean, var, y, y2 if layer.second >= 0 else None)

    def backward(self, kept: list[Kept], dz: Tensor) -> None:
        """The gradients of all parameters, and each weight's Adam step as soon as nothing needs the old one any more.

        Args:
            kept: of `forward`.
            dz: the gradient of the last convolution's result before its activation, like kept[-1].y.
        """
        for number, layer, dz_here in self._dz_of_layers(kept, dz, wants_parameters=True):
            outer, outer2, inner = dz_here, None, kept[number].x
            if layer.transposed:
                outer, outer2, inner = kept[number].x, kept[number].x2, dz_here
            with self.branch.beside(outer, outer2, inner):
                self.arena.update_weight(number, outer, outer2, inner, layer.stride, layer.taps.padding)
        self.branch.join()

    def input_gradient(
        self, kept: list[Kept], dz: Tensor, *, first_channel: int, gate: Tensor, activation: int
    ) -> Tensor:
        """The gradient of the input's channels from first_channel on, parameters held fixed.

        Args:
            kept, dz: as for `backward`.
            gate: what these channels of the input were, the result of this activation: the gradient is the one before.
        """
        *_, (_, layer, dz) = self._dz_of_layers(kept, dz, wants_parameters=False)  # of the first layer
        weight = self.arena.weight(0)[:, first_channel:].contiguous(memory_format=torch.channels_last)
        args = (gate, layer.stride, layer.taps.padding, *layer.in_size, activation, 0.0, 0)
        dx: Tensor = operators.up(dz, None, weight, None, *args)[0]
        return dx

    def _dz_of_layers(
        self, kept: list[Kept], dz: Tensor, *, wants_parameters: bool
    ) -> Iterator[tuple[int, Layer, Tensor]]:
        """Each layer's gradient before its activation and norm, last to first, once its weight has been read."""
        layers = self.plan.layers
        dy, dy_mean = dz, None
        across: dict[int, Tensor] = {}  # gradients that come over the skip connections
        for number in reversed(range(len(layers))):
            layer, k = layers[number], kept[number]
            dz = dy
            if not layer.epilogue:
                norm_act = (k.raw, k.mean, k.var, *self._norm_act_settings(number, layer))
                dz, dweight, dbias = operators.norm_act_backward(dy, across.pop(number, None), *norm_act)
                if wants_parameters and layer.norm is not None and layer.norm.weight is not None:
                    self.gradients[id(layer.norm.weight)] = dweight
                    self.gradients[id(layer.norm.bias)] = dbias
                elif wants_parameters and layer.trains_bias:
                    self.gradients[id(layer.conv.bias)] = dbias
            elif wants_parameters and layer.trains_bias:
                mean = operators.norm_stats(dz, 1)[0] if dy_mean is None else dy_mean
                self.gradients[id(layer.conv.bias)] = mean[0] * (dz.numel() // dz.shape[1])
            if number > 0:
                dy, dy_mean = self._data_gradient(number, layer, dz, kept, wants_parameters)
                if layer.skip is not None:
                    skipped = layers[layer.skip].out_channels
                    across[layer.skip], dy = dy[:, :skipped], dy[:, skipped:]
            yield number, layer, dz

    def _data_gradient(
        self, number: int, layer: Layer, dz: Tensor, kept: list[Kept], wants_parameters: bool
    ) -> tuple[Tensor, Tensor | None]:
        """The gradient of the layer's inputs, beside a skip connection of both; and its mean where a bias asks for it.

        The layer before leaves the derivative of its activation to this operator where it has no pass of its own.
        """
        before = self.plan.layers[number - 1]
        gated = before.epilogue and before.activation != NONE
        gate, activation = (kept[number - 1].y, before.activation) if gated else (None, NONE)
        groups = int(before.epilogue and before.trains_bias and wants_parameters)
        args = (self.arena.weight(number), None, gate, layer.stride, layer.taps.padding)
        settings = (activation, before.slope, groups)
        if layer.transposed:
            dx, mean, _ = operators.down(dz, *args, *settings)
        else:
            dx, mean, _ = operators.up(dz, None, *args, *layer.in_size, *settings)
        return dx, mean if groups else None

    def _norm_act_settings(self, number: int, layer: Layer) -> tuple[object, ...]:
        """What norm_act and its backward take after the statistics."""
        weight, bias, eps = (
            (None, None, 0.0) if layer.norm is None else (layer.norm.weight, layer.norm.bias, layer.norm.eps)
        )
        rng = self.rng if layer.dropout else None
        settings = (layer.activation, layer.slope, layer.second, layer.dropout, number, layer.norm is None)
        return weight, bias, rng, eps, *settings


def groups_of(norm: Normalisation, images: int, passes: int) -> int:
    """Into how many groups of images the statistics of a batch of so many passes fall."""
    return images if isinstance(norm, nn.InstanceNorm2d | SampleNorm2d) else passes
