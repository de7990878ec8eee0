"""A convolution's sizes: one record, whichever of its operators is called and whoever counts, tunes or compiles it."""

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor

Size = tuple[int, int]  # height, width


class ConvShape(NamedTuple):
    """A convolution that makes small maps of `outer` channels out of large maps of `inner` channels.

    A transposed convolution makes large maps out of small ones, whose channels may lie in two tensors. The weight is
    (outer + outer2, inner, *kernel) for both.
    """

    images: int
    outer: int
    outer2: int  # channels of the small maps' second tensor; 0 for none
    small: Size
    inner: int
    large: Size
    kernel: Size
    stride: int
    padding: int

    @classmethod
    def between(
        cls, inner: int, large: Size, outer: int, *, k: int, stride: int, padding: int, images: int = 1, outer2: int = 0
    ) -> "ConvShape":
        """The shape of a convolution of k x k taps; the small maps' size follows from the large ones'."""
        height, width = (conv_size(side, k, stride, padding) for side in large)
        return cls(images, outer, outer2, (height, width), inner, large, (k, k), stride, padding)

    @classmethod
    def of(cls, operator: str, args: tuple[Any, ...]) -> "ConvShape":
        """The shape of an operator's call, by its arguments: tensors, or what has their shape."""
        return cls(*_SHAPES[operator](*args))

    @property
    def rows(self) -> int:
        """The weight's."""
        return self.outer + self.outer2

    @property
    def columns(self) -> int:
        """Weights in a row."""
        return self.inner * self.kernel[0] * self.kernel[1]

    @property
    def weight(self) -> tuple[int, int, int, int]:
        """The weight's shape."""
        return self.rows, self.inner, *self.kernel

    @property
    def pixels(self) -> int:
        """The small maps', over all images."""
        return self.images * self.small[0] * self.small[1]

    def __str__(self) -> str:
        (height, width), (kernel_height, kernel_width) = self.large, self.kernel
        outer = f"{self.outer}+{self.outer2}" if self.outer2 else f"{self.outer}"
        window = f"{kernel_height}x{kernel_width}s{self.stride}p{self.padding}"
        return f"{self.images}x{self.inner}x{height}x{width}-{outer}-{window}"


def conv_size(size: int, kernel_size: int, stride: int, padding: int) -> int:
    """Pixels that a convolution leaves of a side."""
    return (size + 2 * padding - kernel_size) // stride + 1


def conv_transpose_size(size: int, kernel_size: int, stride: int, padding: int) -> int:
    """The smallest side that a convolution of this window takes to `size` pixels."""
    return (size - 1) * stride - 2 * padding + kernel_size


def _conv(x: Tensor, weight: Tensor, bias: Any, gate: Any, stride: int, padding: int, *rest: Any) -> tuple[Any, ...]:
    (n, inner, height, width), (outer, _, kh, kw) = x.shape, weight.shape
    small = conv_size(height, kh, stride, padding), conv_size(width, kw, stride, padding)
    return n, outer, 0, small, inner, (height, width), (kh, kw), stride, padding


def _conv_transpose(
    x: Tensor,
    x2: Tensor | None,
    weight: Tensor,
    bias: Any,
    gate: Any,
    stride: int,
    padding: int,
    height: int,
    width: int,
    *rest: Any,
) -> tuple[Any, ...]:
    (n, outer, *small), (_, inner, kh, kw) = x.shape, weight.shape
    outer2 = 0 if x2 is None else x2.shape[1]
    return n, outer, outer2, tuple(small), inner, (height, width), (kh, kw), stride, padding


def _conv_wgrad(
    outer: Tensor, outer2: Tensor | None, inner: Tensor, kh: int, kw: int, stride: int, padding: int, *rest: Any
) -> tuple[Any, ...]:
    (n, channels, *small), (_, n_inner, *large) = outer.shape, inner.shape
    channels2 = 0 if outer2 is None else outer2.shape[1]
    return n, channels, channels2, tuple(small), n_inner, tuple(large), (kh, kw), stride, padding


def _conv_wgrad_adam(outer: Tensor, outer2: Tensor | None, inner: Tensor, param: Tensor, *rest: Any) -> tuple[Any, ...]:
    stride, padding = rest[7:9]  # after exp_avg, exp_avg_sq, lr, powers, beta1, beta2, eps
    return _conv_wgrad(outer, outer2, inner, param.shape[2], param.shape[3], stride, padding)


_SHAPES: dict[str, Callable[..., tuple[Any, ...]]] = {
    "conv": _conv,
    "conv_transpose": _conv_transpose,
    "conv_wgrad": _conv_wgrad,
    "conv_wgrad_adam": _conv_wgrad_adam,
}
CONVOLUTIONS = tuple(_SHAPES)  # the operators
