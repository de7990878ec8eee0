"""norm_act with its statistics, and its backward, on the U-Net's first normalised maps, against eager PyTorch."""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from harness.parity import assert_norm_gradients, assert_normalised
from layers import NOISE, each_batch_size, each_dtype
from torch import Tensor

from fastp2p.ops import norm_act, norm_act_backward_ref, norm_act_ref, norm_stats, norm_stats_ref
from fastp2p.ops.activation import ACTIVATIONS

SETTINGS = (None, 1e-5, ACTIVATIONS.index("leaky_relu"), 0.2, -1, 0.0, 0, False)
Norm = Callable[[Tensor, Tensor, Tensor], Tensor]


@each_batch_size
@each_dtype
def bench_norm_act(compare, rehearse: bool, batch_size: int, dtype: torch.dtype):
    x, weight, bias, _ = operands(batch_size, dtype, rehearse)

    def check() -> None:
        expected, _ = norm_act_ref(*in_float64(x, weight, bias))
        assert_normalised(ours(x, weight, bias), expected, x, weight, bias)

    compare(
        f"norm_act, batch {batch_size}",
        dtype=dtype,
        eager=partial(eager, x, weight, bias),
        ours=partial(ours, x, weight, bias),
        check=check,
        n_bytes=3 * x.nbytes,  # read twice, written once
    )


@each_batch_size
@each_dtype
def bench_norm_act_backward(compare, rehearse: bool, batch_size: int, dtype: torch.dtype):
    *inputs, dy = operands(batch_size, dtype, rehearse)

    def backward_of(norm: Norm) -> Callable[[], tuple[Tensor, ...]]:
        leaves = [t.detach().requires_grad_() for t in inputs]
        return partial(torch.autograd.grad, norm(*leaves), leaves, dy, retain_graph=True)

    backward = backward_of(ours)

    def check() -> None:
        expected = norm_act_backward_ref(dy.double(), None, *in_float64(*inputs))
        assert_norm_gradients(backward(), expected, inputs[0], inputs[1], dy)

    compare(
        f"norm_act_backward, batch {batch_size}",
        dtype=dtype,
        eager=backward_of(eager),
        ours=backward,
        check=check,
        n_bytes=5 * dy.nbytes,  # x and dy read twice, dx written
    )


def operands(batch_size: int, dtype: torch.dtype, rehearse: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x, weight, bias, dy. dy is 0 where rounding may decide on which side of its kink the activation is."""
    shape = (batch_size, 16, 8, 8) if rehearse else (batch_size, 128, 64, 64)
    x, dy = (NOISE.images(*shape, dtype=dtype) for _ in range(2))
    weight, bias = (NOISE.images(1, shape[1], 1, 1, dtype=torch.float32).flatten() for _ in range(2))
    z = F.batch_norm(x.float(), None, None, weight, bias, training=True)
    return x, weight, bias, dy * (z.abs() > 1e-4)


def in_float64(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[object, ...]:
    """The reference's arguments."""
    x = x.double()
    return x, *norm_stats_ref(x, 1), weight.double(), bias.double(), *SETTINGS


def eager(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.leaky_relu(F.batch_norm(x, None, None, weight, bias, training=True), 0.2)


def ours(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return norm_act(x, *norm_stats(x, stat_groups=1), weight, bias, activation="leaky_relu")[0]
