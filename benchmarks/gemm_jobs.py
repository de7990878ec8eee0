"""down, up and wgrad on every layer of pix2pix, in both directions, against cuDNN (on a CPU, whatever PyTorch has)."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
import triton
from fastp2p.kernels import gemm, wgrad_adam
from fastp2p.kernels.down import down as launch_down
from fastp2p.kernels.layer_shapes import LAYERS, Layer, may_split
from fastp2p.kernels.up import up as launch_up
from fastp2p.kernels.wgrad import wgrad as launch_wgrad
from jobs import BEST, EAGER, OURS, Config, Job, Runner, comparison, image, size
from torch import Tensor

from fastp2p.ops.adam import adam_ref

BATCHES = (1, 16)
operators = torch.ops.fastp2p
REHEARSED = [  # one of each kind: down, up of two inputs, stride 1
    Layer("e4", False, 8, 0, 12, 4, 2, "stats"),
    Layer("d4", True, 8, 8, 4, 2, 2, "stats"),
    Layer("D4", False, 4, 0, 8, 4, 1, "stats"),
]


@dataclass(frozen=True)
class Operands:
    """A layer's tensors: its inputs, its weight, and the gradient of its output."""

    x: Tensor
    x2: Tensor | None
    weight: Tensor
    dy: Tensor

    @property
    def both(self) -> Tensor:
        return self.x if self.x2 is None else torch.cat([self.x, self.x2], 1)


@dataclass(frozen=True)
class Product:
    """One of the GEMMs of a layer: the operator that computes it, and the GEMM's own measures."""

    operator: str
    m: int
    n: int
    k: int
    whole: bool
    products: int = 1


def gemm_jobs(device: torch.device, rehearse: bool) -> Iterator[Job]:
    """Forward pass, data gradient and weight gradient, of each layer and batch size: ours, PyTorch's, ours searched."""
    dtype = torch.float32 if rehearse else torch.bfloat16
    for layer in REHEARSED if rehearse else LAYERS:
        for batch in (1,) if rehearse else BATCHES:
            for direction in ("forward", "data gradient", "weight gradient"):
                yield from _layer_jobs(layer, batch, direction, dtype, device, 2 if rehearse else 1000)


def _layer_jobs(
    layer: Layer, batch: int, direction: str, dtype: torch.dtype, device: torch.device, most_configs: int
) -> Iterator[Job]:
    make = partial(_operands, layer, batch, dtype)
    product = _product(layer, batch, direction)
    n_in, taps = layer.n_in + layer.n_in2, 16
    small = (layer.side if layer.transposed else layer.out_side) ** 2  # pixels that meet every tap
    inputs, outputs = (batch, n_in, layer.side, layer.side), (batch, layer.n_out, layer.out_side, layer.out_side)
    weight_itemsize = 4 if direction == "weight gradient" else dtype.itemsize  # where it is the result, float32
    bytes_of = {
        "weight": size(((n_in, taps, layer.n_out), weight_itemsize)),
        "x": size((inputs, dtype.itemsize)),
        "dy": size((outputs, dtype.itemsize)),
    }
    result = {"forward": "dy", "data gradient": "x", "weight gradient": "weight"}[direction]  # or of its size
    n_bytes = sum(bytes_of.values())  # each once
    case = f"{product.operator} {layer.name} {direction} batch {batch}"
    facts = {"layer": layer.name, "direction": direction, "batch": batch, "dtype": str(dtype).removeprefix("torch.")}
    shared = {
        "n_bytes": n_bytes,
        "input_bytes": n_bytes - bytes_of[result],
        "flop": 2 * batch * small * taps * n_in * layer.n_out,
        "facts": facts,
    }
    ours = partial(_ours, layer, direction)
    yield Job(case, product.operator, OURS, lambda: ours(make()), **shared)
    yield Job(case, product.operator, EAGER, lambda: _theirs(layer, direction, make()), **shared)
    configs = candidates(product, dtype, device)[:most_configs]
    yield Job(case, product.operator, BEST, lambda: ours(make()), configs=configs, **shared)


def _operands(layer: Layer, batch: int, dtype: torch.dtype) -> Operands:
    n_in = layer.n_in + layer.n_in2
    channels = (n_in, layer.n_out) if layer.transposed else (layer.n_out, n_in)
    x2 = image(batch, layer.n_in2, layer.side, layer.side, dtype=dtype) if layer.n_in2 else None
    return Operands(
        image(batch, layer.n_in, layer.side, layer.side, dtype=dtype),
        x2,
        image(*channels, 4, 4, dtype=dtype),
        image(batch, layer.n_out, layer.out_side, layer.out_side, dtype=dtype),
    )


def _ours(layer: Layer, direction: str, t: Operands) -> Runner:
    """The launcher, which takes a configuration; the operator's own call does nothing but call it."""
    window, plain = (layer.stride, 1), (0, 0.2, 0)  # stride, padding; no activation, no statistics
    if direction == "weight gradient":
        outer, outer2, inner = (t.x, t.x2, t.dy) if layer.transposed else (t.dy, None, t.x)
        return lambda config: launch_wgrad(outer, outer2, inner, 4, 4, *window, torch.float32, config=config)
    if (direction == "forward") == layer.transposed:
        x, x2, side = (t.x, t.x2, layer.out_side) if layer.transposed else (t.dy, None, layer.side)
        return lambda config: launch_up(x, x2, t.weight, None, None, *window, side, side, *plain, config=config)
    x = t.dy if layer.transposed else t.x  # the gradient of both inputs at once
    return lambda config: launch_down(x, t.weight, None, None, *window, *plain, config=config)


def _theirs(layer: Layer, direction: str, t: Operands) -> Runner:
    """PyTorch on the concatenated inputs. The forward pass makes them; the gradients find them made."""
    if direction == "forward":
        if layer.transposed:
            return lambda _: F.conv_transpose2d(t.both, t.weight, None, layer.stride, 1)
        return lambda _: F.conv2d(t.x, t.weight, None, layer.stride, 1)
    wanted = [direction == "data gradient", direction == "weight gradient", False]
    both, stride = t.both, [layer.stride] * 2
    return lambda _: torch.ops.aten.convolution_backward(
        t.dy, both, t.weight, None, stride, [1, 1], [1, 1], layer.transposed, [0, 0], 1, wanted
    )


def _product(layer: Layer, batch: int, direction: str) -> Product:
    n_in = layer.n_in + layer.n_in2
    pixels_in, pixels_out = batch * layer.side**2, batch * layer.out_side**2
    if direction == "weight gradient":
        m, n_inner, k = (n_in, layer.n_out, pixels_in) if layer.transposed else (layer.n_out, n_in, pixels_out)
        return Product("wgrad", m, 16 * n_inner, k, n_inner % 64 == 0)
    if (direction == "forward") == layer.transposed:
        parts = (layer.n_in, layer.n_in2) if layer.transposed else (layer.n_out, 0)
        n, side = (layer.n_out, layer.out_side) if layer.transposed else (n_in, layer.side)
        phases = layer.stride**2
        m = batch * triton.cdiv(side, layer.stride) ** 2
        whole = parts[0] % 64 == parts[1] % 64 == 0
        return Product("up", m, n, triton.cdiv(4, layer.stride) ** 2 * sum(parts), whole, phases)
    m, n, channels = (pixels_in, n_in, layer.n_out) if layer.transposed else (pixels_out, layer.n_out, n_in)
    return Product("down", m, n, 16 * channels, channels % 64 == 0)


def candidates(product: Product, dtype: torch.dtype, device: torch.device) -> list[Config]:
    """Every tile that may serve, its sum whole, split until each processor has a program, and split twice as often."""
    limit, processors = gemm.SHARED_BYTES_WHEN_INTERPRETED, gemm.PROCESSORS_WHEN_INTERPRETED
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        limit, processors = properties.shared_memory_per_block_optin, properties.multi_processor_count
    m, n, k = product.m, product.n, product.k
    configs = []
    for tile in gemm.candidates(m, n, dtype.itemsize, whole=product.whole, shared_limit=limit):
        programs = product.products * triton.cdiv(m, tile["BLOCK_M"]) * triton.cdiv(n, tile["BLOCK_N"])
        most = max(1, triton.cdiv(k, tile["BLOCK_K"]) // 2) if may_split(tile) else 1
        full = triton.cdiv(processors, programs)
        configs += [tile | {"SPLIT": split} for split in sorted({min(most, split) for split in (1, full, 2 * full)})]
    return configs


def wgrad_adam_jobs(rehearse: bool) -> Iterator[Job]:
    """The deep layers, at batch 1: the weight gradient and its Adam step, against cuDNN's and then Adam's formula."""
    layers = [layer for layer in LAYERS if layer.name in wgrad_adam.DEEP]
    dtype = torch.float32 if rehearse else torch.bfloat16
    for layer in REHEARSED[:2] if rehearse else layers:
        size_ = (layer.n_in + layer.n_in2, layer.n_out) if layer.transposed else (layer.n_out, layer.n_in)
        activations = size(
            ((layer.n_in + layer.n_in2, layer.side, layer.side), dtype.itemsize),
            ((layer.n_out, layer.out_side, layer.out_side), dtype.itemsize),
        )
        weights = 16 * size_[0] * size_[1]
        yield from comparison(
            f"wgrad_adam {layer.name} batch 1",
            "wgrad_adam",
            partial(_fused_step, layer),
            partial(_plain_step, layer),
            partial(_step_tensors, layer, size_, dtype),
            n_bytes=activations + weights * (24 + 2),  # 12 read, 12 written, and 2 for the bfloat16 copy
            input_bytes=activations + weights * 12,
            compiled=rehearse or layer.name in ("e5", "d6"),
            layer=layer.name,
            batch=1,
        )


def _step_tensors(layer: Layer, size_: tuple[int, int], dtype: torch.dtype) -> tuple[Tensor, ...]:
    t = _operands(layer, 1, dtype)
    param, exp_avg, exp_avg_sq = (image(*size_, 4, 4, dtype=torch.float32) for _ in range(3))
    low_precision = param.to(torch.bfloat16)
    powers = torch.tensor([0.5, 0.999], dtype=torch.float64)
    x2 = () if t.x2 is None else (t.x2,)
    return param, exp_avg, exp_avg_sq.square_(), low_precision, torch.tensor(2e-4), powers, t.dy, t.x, *x2


def _fused_step(layer: Layer, param, exp_avg, exp_avg_sq, low_precision, lr, powers, dy, x, x2=None) -> None:
    outer, outer2, inner = (x, x2, dy) if layer.transposed else (dy, None, x)
    state = (param, exp_avg, exp_avg_sq, lr, powers, 0.5, 0.999, 1e-8, layer.stride, 1, low_precision)
    operators.wgrad_adam(outer, outer2, inner, *state)


def _plain_step(layer: Layer, param, exp_avg, exp_avg_sq, low_precision, lr, powers, dy, x, x2=None) -> None:
    both = x if x2 is None else torch.cat([x, x2], 1)
    weight = low_precision.to(dy.dtype)
    stride = [layer.stride] * 2
    _, grad, _ = torch.ops.aten.convolution_backward(
        dy, both, weight, None, stride, [1, 1], [1, 1], layer.transposed, [0, 0], 1, [False, True, False]
    )
    adam_ref(param, grad.float(), exp_avg, exp_avg_sq, lr, powers, 0.5, 0.999, 1e-8, low_precision)
