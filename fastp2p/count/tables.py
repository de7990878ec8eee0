"""A plan to read."""

import torch

from fastp2p.count.ceilings import H200, Ceilings
from fastp2p.engine.plan import Plan
from fastp2p.ops.activation import ACTIVATIONS


def plan_table(plan: Plan, images: int, dtype: torch.dtype, ceilings: Ceilings = H200) -> str:
    """The plan to read: each layer's shape, its operator and what follows, and what a forward pass of so many images
    costs: FLOPs, bytes of the weight and of the maps that are read and written, in `dtype`, and the least time.
    """
    lines = [
        f"{'layer':<6}{'convolution':<34}{'map':<20}{'by':<6}{'then':<30}"
        f"{'GFLOP':>8}{'weight MB':>11}{'maps MB':>9}{'floor µs':>10}"
    ]
    floors = 0.0
    for layer in plan.layers:
        kernel, stride = layer.conv.kernel_size[0], layer.stride
        kind = f"{'T ' if layer.transposed else ''}{layer.in_channels}→{layer.out_channels} {kernel}x{kernel} s{stride}"
        if not layer.taps.are_all(layer.weight):
            kind += f" ({layer.taps.count}x{layer.taps.count} live)"
        then = [type(layer.norm).__name__.removesuffix("2d")] if layer.norm is not None else []
        then += [ACTIVATIONS[layer.activation]] if layer.activation else []
        then += [] if layer.second is None else [f"+ {ACTIVATIONS[layer.second]}"]
        then += [f"dropout {layer.dropout:g}"] if layer.dropout else []
        pixels_in, pixels_out = (height * width for height, width in (layer.in_size, layer.out_size))
        maps = images * (pixels_in * layer.in_channels + pixels_out * layer.out_channels) * dtype.itemsize
        weight = layer.taps.count**2 * layer.in_channels * layer.out_channels * dtype.itemsize
        floor = max(2 * layer.macs(images) / ceilings.flop_per_sec, (weight + maps) / ceilings.bytes_per_sec)
        floors += floor
        sizes = f"{layer.in_size[0]}x{layer.in_size[1]} → {layer.out_size[0]}x{layer.out_size[1]}"
        operator = "conv_transpose" if layer.transposed else "conv"
        lines.append(
            f"{layer.name:<6}{kind:<34}{sizes:<20}{operator:<6}{' '.join(then):<30}"
            f"{2e-9 * layer.macs(images):8.3f}{weight / 1e6:11.3f}{maps / 1e6:9.3f}{floor * 1e6:10.2f}"
        )
    lines.append(f"{'sum, floors for ' + ceilings.name:<96}{2e-9 * plan.macs(images):8.3f}{'':>20}{floors * 1e6:10.2f}")
    return "\n".join(lines)
