"""The activations that kernels fuse, on float32 values, numbered as in fastp2p.ops.activation.ACTIVATIONS."""

import triton
import triton.language as tl

RELU, LEAKY_RELU, TANH = (tl.constexpr(number) for number in (1, 2, 3))  # 0 is none


@triton.jit
def activate(x, slope, ACTIVATION: tl.constexpr):
    """act(x); a NaN stays one, which tl.maximum would not do on a GPU."""
    if ACTIVATION == RELU:
        x = tl.where(x <= 0.0, 0.0, x)
    elif ACTIVATION == LEAKY_RELU:
        x = tl.where(x > 0.0, x, x * slope)
    elif ACTIVATION == TANH:
        x = tanh(x)
    return x


@triton.jit
def derivative(y, slope, ACTIVATION: tl.constexpr):
    """act'(x), told from y = act(x); at 0 that of the negative side."""
    if ACTIVATION == RELU:
        y = tl.where(y > 0.0, 1.0, 0.0)
    elif ACTIVATION == LEAKY_RELU:
        y = tl.where(y > 0.0, 1.0, slope)
    elif ACTIVATION == TANH:
        y = 1.0 - y * y
    else:
        y = tl.full(y.shape, 1.0, tl.float32)
    return y


@triton.jit
def tanh(x):
    """tanh to float32's precision.

    A series below 0.3; above it (1 - e) / (1 + e) with e = exp(-2|x|), which cannot overflow.
    """
    square = x * x
    series = -1382.0 / 155925.0
    series = 62.0 / 2835.0 + square * series
    series = -17.0 / 315.0 + square * series
    series = 2.0 / 15.0 + square * series
    series = -1.0 / 3.0 + square * series
    decay = tl.exp(-2.0 * tl.abs(x))
    large = tl.div_rn(1.0 - decay, 1.0 + decay)  # a plain / is rounded to 2 ulp, beside those of exp
    return tl.where(square < 0.09, x + x * square * series, tl.where(x < 0.0, -large, large))
