"""The convolutions of a training step as it calls them: their problems, and operands to time and check kernels with."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastp2p import ops
from fastp2p.conv_shape import CONVOLUTIONS, ConvShape
from fastp2p.engine.arena import ALIGNMENT
from fastp2p.engine.operation import NONE
from fastp2p.engine.record import Call, record
from fastp2p.engine.step import Step
from fastp2p.ops.kernel_choices import Problem

Args = tuple[Any, ...]  # an operator's

BETA1, BETA2 = 0.5, 0.999
LR, EPS = 2e-4, 1e-8
ROWS_CHECKED = 32  # rows of a weight after Adam, spread over all; its gradient's all are


@dataclass(frozen=True)
class Operation:
    """One call of conv, conv_transpose, conv_wgrad or conv_wgrad_adam."""

    name: str  # the network, the layer and what the call is for
    operator: str
    dtype: torch.dtype  # the maps'
    shape: ConvShape
    activation: int = NONE
    slope: float = 0.0
    bias: bool = False
    gate: bool = False
    stat_groups: int = 0
    strides: tuple[int, ...] = ()  # the updated weight's, which may be a slice of more taps
    offset: int = 0  # in elements, where that weight begins behind an aligned address

    @property
    def problem(self) -> Problem:
        """What its kernel is chosen by."""
        return Problem.of(self.operator, self.dtype, self.shape)

    @property
    def wide(self) -> torch.dtype:
        """The dtype of sums, and of what is kept in full."""
        return torch.promote_types(self.dtype, torch.float32)

    @property
    def terms(self) -> int:
        """How many products an element of the result sums up, at most."""
        shape = self.shape
        if self.operator == "conv":
            return shape.columns
        if self.operator == "conv_transpose":
            return shape.rows * math.prod(math.ceil(side / shape.stride) for side in shape.kernel)
        return shape.pixels

    @property
    def n_bytes(self) -> int:
        """What a call touches, about: the images in and out, and the weight or what Adam reads of it."""
        shape, itemsize = self.shape, self.dtype.itemsize
        maps = shape.pixels * shape.rows + shape.images * math.prod(shape.large) * shape.inner
        per_weight = {"conv_wgrad": 0, "conv_wgrad_adam": 3 * self.wide.itemsize}.get(self.operator, itemsize)
        return maps * itemsize + shape.rows * shape.columns * per_weight

    def operands(self, noise: "Noise") -> Args:
        """Arguments for the operator: normal values, in memory of their own, such that nothing saturates."""
        shape, dtype = self.shape, self.dtype
        small = noise.images(shape.images, shape.outer, *shape.small, dtype=dtype)
        small2 = noise.images(shape.images, shape.outer2, *shape.small, dtype=dtype) if shape.outer2 else None
        large = noise.images(shape.images, shape.inner, *shape.large, dtype=dtype)
        window = (shape.stride, shape.padding)
        if self.operator == "conv_wgrad":
            return small, small2, large, *shape.kernel, *window, self.wide
        if self.operator == "conv_wgrad_adam":
            whole = noise.values(self._adam_s_elements(), dtype=self.wide)
            buffers = (whole, torch.zeros_like(whole), torch.zeros_like(whole))
            param, *moments = (t.as_strided(shape.weight, self.strides, self.offset) for t in buffers)
            low = None
            if dtype != self.wide:
                low = param.to(dtype).contiguous(memory_format=torch.channels_last)
            lr = torch.tensor(LR, dtype=self.wide, device=param.device)
            powers = torch.tensor([BETA1, BETA2], dtype=torch.float64, device=param.device)  # the first step's
            return small, small2, large, param, *moments, lr, powers, BETA1, BETA2, EPS, *window, low
        weight = noise.images(*shape.weight, dtype=dtype).mul_(self.terms**-0.5)  # a result of deviation 1
        bias = noise.images(1, shape.outer if self.operator == "conv" else shape.inner, 1, 1, dtype=self.wide).flatten()
        epilogue = (self.activation, self.slope, self.stat_groups)
        if self.operator == "conv":
            return large, weight, bias if self.bias else None, small if self.gate else None, *window, *epilogue
        gate = large if self.gate else None
        return small, small2, weight, bias if self.bias else None, gate, *window, *shape.large, *epilogue

    def _adam_s_elements(self) -> int:
        """The elements from an aligned address to the end of a weight that Adam updates."""
        sides = zip(self.shape.weight, self.strides, strict=True)
        return self.offset + 1 + sum((n - 1) * stride for n, stride in sides)


class Noise:
    """Normal values without drawing each: a pool is repeated, from another place every time."""

    def __init__(self, device: torch.device, seed: int = 0):
        pool = torch.randn(2**20 + 7, generator=torch.Generator().manual_seed(seed), device="cpu")  # no whole rows
        self.pools = {torch.float32: pool.to(device)}
        self.first = 0

    def images(self, n: int, c: int, h: int, w: int, *, dtype: torch.dtype) -> Tensor:
        """(n, c, h, w), channels_last."""
        return self.values(n * c * h * w, dtype=dtype).view(n, h, w, c).permute(0, 3, 1, 2)

    def values(self, size: int, *, dtype: torch.dtype) -> Tensor:
        """(size,), in memory of its own."""
        pool = self.pools.setdefault(dtype, self.pools[torch.float32].to(dtype))
        self.first = (self.first + 1008) % 2**16  # a multiple of 16: other addresses take other programs
        times = -(-(self.first + size) // len(pool))
        return pool.repeat(times)[self.first : self.first + size] if times > 1 else pool[self.first :][:size].clone()


class Trial:
    """An operation's operands, and how far what a kernel makes of them is off."""

    def __init__(self, operation: Operation, noise: Noise):
        self.operation, self.args = operation, operation.operands(noise)
        self.expected: tuple[Tensor, ...] | None = None
        self.bound = self.largest = math.nan  # the first one's tolerance and largest value
        self.rows = slice(None, None, max(1, operation.shape.rows // ROWS_CHECKED))

    def error(self, run: Callable[[Args], Any]) -> float:
        """How far a kernel's result is off, in tolerances: more than 1, or NaN, is wrong.

        The reference computes in float32 (float64 for float64) from the same operands. A kernel may sum in another
        order, which at the worst seen moves a sum of n products by (4 + sqrt(n)) roundings of float32 of the sum of
        their absolute values; of normal values that is below n times their deviation. And it rounds to its dtype: ATen
        the product, the bias and their sum, `conv_transpose` by matrix product each tap's share, so four roundings of
        the largest value, before its activation, are allowed.
        """
        operator = self.operation.operator
        if self.expected is None:
            self.expected = self._reference()
            self.largest = _largest(self.expected[0])
            self.bound = self._bound(self.expected[0])
        if operator == "conv_wgrad_adam":
            return self._error_of_adam(run, *self.expected)
        result, (expected, *_) = run(self.args), self.expected
        if operator == "conv_wgrad":
            return _largest(expected - result) / self.bound
        errors = [_largest(expected - result[0]) / self.bound]
        if self.operation.stat_groups:
            # Those of the result as it is stored; sums of some thousand terms, in another order
            mean, var = ops.norm_stats_ref(result[0], self.operation.stat_groups)
            errors.append(_largest(mean - result[1]) / (1e-5 * self.largest))
            errors.append(_largest(var - result[2]) / (1e-4 * self.largest**2))
        return _worst(errors)

    def forget_expected(self) -> None:
        """Give its memory back."""
        self.expected = None

    def _reference(self) -> tuple[Tensor, ...]:
        """What is expected; for conv_wgrad_adam the gradient, and the rows of the weight that are looked at."""
        operator, dtype = self.operation.operator, self.operation.dtype
        shape, wide = self.operation.shape, self.operation.wide
        args = [t.to(wide) if isinstance(t, Tensor) and t.dtype == dtype else t for t in self.args]
        if operator == "conv_wgrad_adam":
            outer, outer2, inner = args[:3]
            grad = ops.conv_wgrad_ref(outer, outer2, inner, *shape.kernel, shape.stride, shape.padding, wide)
            return grad, self.args[3][self.rows].clone()
        result = getattr(ops, f"{operator}_ref")(*args)
        return (result,) if isinstance(result, Tensor) else result

    def _error_of_adam(self, run: Callable[[Args], Any], expected: Tensor, before: Tensor) -> float:
        """A first step leaves a known share of the gradient, and moves each weight by lr to the gradient's sign."""
        all_exp_avg, low = self.args[4], self.args[13]
        param, exp_avg, exp_avg_sq = (t[self.rows] for t in self.args[3:6])
        param.copy_(before)
        for moment in self.args[4:6]:
            moment.zero_()
        run(self.args)
        grad = exp_avg / (1 - BETA1)
        after = before - LR * grad / (grad.abs() + EPS)
        errors = [
            _largest(torch.sub(all_exp_avg, expected, alpha=1 - BETA1)) / ((1 - BETA1) * self.bound),
            _largest(exp_avg_sq - (1 - BETA2) * grad.square()) / (1e-5 * (1 - BETA2) * self.largest**2),
            _largest(param - after) / (1e-3 * LR + 1e-6),  # and the rounding of a weight of a few units
            0.0 if low is None or torch.equal(low[self.rows], param.to(low.dtype)) else math.inf,
        ]
        return _worst(errors)

    def _bound(self, expected: Tensor) -> float:
        dtype, terms = self.operation.dtype, self.operation.terms
        rounding = torch.finfo(dtype).eps / 2
        if dtype == torch.float32 and expected.is_cuda and torch.backends.cudnn.allow_tf32:
            rounding = 2.0**-11  # TF32's, of each factor
        summing = torch.finfo(expected.dtype).eps / 2
        gradient = self.operation.operator.startswith("conv_wgrad")
        absolute = terms if gradient else math.sqrt(terms)
        largest = max(self.largest, math.sqrt(terms) if gradient else 4.0)  # what tanh hides is that large
        return 4 * rounding * largest + (4 + math.sqrt(terms)) * summing * absolute


def _worst(errors: list[float]) -> float:
    return next((error for error in errors if math.isnan(error)), max(errors))


def _largest(t: Tensor) -> float:
    least, largest = torch.aminmax(t)
    return float(torch.maximum(-least, largest))


def operations(step: Step, images: int) -> list[Operation]:
    """The convolutions of a step of so many images, of each problem the first."""
    first: dict[Problem, Operation] = {}
    for call in record(step, images):
        if call.operator in CONVOLUTIONS:
            operation = operation_of(call)
            first.setdefault(operation.problem, operation)
    return list(first.values())


def operation_of(call: Call) -> Operation:
    """A convolution's call as one to time."""
    args = call.args
    shape = ConvShape.of(call.operator, tuple(args.values()))
    details: dict[str, Any] = {}
    if call.operator == "conv_wgrad_adam":
        param = args["param"]
        details = {"strides": param.strides, "offset": param.offset % ALIGNMENT}
    elif call.operator != "conv_wgrad":
        details = {name: args[name] for name in ("activation", "slope", "stat_groups")}
        details |= {name: args[name] is not None for name in ("bias", "gate")}
    dtype = next(iter(args.values())).dtype
    return Operation(call.name, call.operator, dtype, shape, **details)
