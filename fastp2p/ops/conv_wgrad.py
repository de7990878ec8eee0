"""conv_wgrad: the weight gradient of a convolution, and with the roles swapped of a transposed one."""

import torch
from torch import Tensor
from torch.nn.grad import conv2d_weight

from fastp2p.conv_shape import conv_size
from fastp2p.errors import InputError
from fastp2p.ops import library
from fastp2p.ops.conv import check_window
from fastp2p.ops.library import check_devices, describe
from fastp2p.ops.operands import Work


def conv_wgrad_ref(
    outer: Tensor,
    outer2: Tensor | None,
    inner: Tensor,
    kernel_height: int,
    kernel_width: int,
    stride: int,
    padding: int,
    dtype: torch.dtype,
) -> Tensor:
    """The specification of `conv_wgrad`."""
    wide = torch.promote_types(inner.dtype, torch.float32)
    both = outer if outer2 is None else torch.cat([outer, outer2], dim=1)
    size = (both.shape[1], inner.shape[1], kernel_height, kernel_width)
    dweight: Tensor = conv2d_weight(inner.to(wide), size, both.to(wide), stride, padding)
    return dweight.to(dtype).contiguous(memory_format=torch.channels_last)


def _fake(
    outer: Tensor,
    outer2: Tensor | None,
    inner: Tensor,
    kernel_height: int,
    kernel_width: int,
    stride: int,
    padding: int,
    dtype: torch.dtype,
) -> Tensor:
    rows = outer.shape[1] + (0 if outer2 is None else outer2.shape[1])
    shape = (rows, inner.shape[1], kernel_height, kernel_width)
    return torch.empty(shape, dtype=dtype, device=outer.device, memory_format=torch.channels_last)


library.define(
    "conv_wgrad",
    "(Tensor outer, Tensor? outer2, Tensor inner, SymInt kernel_height, SymInt kernel_width, int stride, int padding, "
    "ScalarType dtype) -> Tensor",
    reference=conv_wgrad_ref,
    fake=_fake,
    work=Work(
        maps=("outer", "outer2", "inner"),
        results=("adam",),
        flop=lambda args, results: 2 * args["outer"].pixels * results[0].elements,
    ),
)
library.serve_by_triton("conv_wgrad")


def conv_wgrad(
    outer: Tensor,
    inner: Tensor,
    *,
    kernel_size: tuple[int, int] = (4, 4),
    stride: int = 2,
    padding: int = 1,
    outer2: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """The gradient with respect to the weight of `conv` or `conv_transpose`.

        dweight[o, c, k] = sum over n, i of outer[n, o, i] * inner[n, c, i * stride - padding + k]

    where i, k are (row, column). For `conv` outer is the gradient of its result and inner its x; for
    `conv_transpose` outer is its x (and outer2 its x2) and inner the gradient of its result. Accumulates in float32
    (float64 for float64); float32 on a GPU as in `conv`. On a CPU bfloat16 inputs give values that were rounded to
    bfloat16, as PyTorch's own weight gradients are. No gradient of its own.

    Args:
        outer, outer2: (N, O, H', W') and (N, O2, H', W'), floating.
        inner: (N, C, H, W), outer's dtype, H' = (H + 2 padding - kernel) // stride + 1.
        kernel_size: (KH, KW).
        stride, padding: of both dimensions, in pixels.
        dtype: of the result.

    Returns:
        (O + O2, C, KH, KW) of that dtype, channels_last.

    Raises:
        InputError: on shapes or dtypes that do not fit.
    """
    check_outer_inner("conv_wgrad", outer, outer2, inner, kernel_size, stride, padding)
    dweight: Tensor = torch.ops.fastp2p.conv_wgrad(outer, outer2, inner, *kernel_size, stride, padding, dtype)
    return dweight


def check_outer_inner(
    operator: str,
    outer: Tensor,
    outer2: Tensor | None,
    inner: Tensor,
    kernel_size: tuple[int, int],
    stride: int,
    padding: int,
) -> None:
    """Raise InputError unless a convolution with this window leads from inner's size to outer's."""
    check_window(operator, stride, padding)
    tensors = [tensor for tensor in (outer, outer2, inner) if tensor is not None]
    fits = all(t.ndim == 4 and t.numel() and t.is_floating_point() and t.dtype == inner.dtype for t in tensors)
    fits = fits and outer.shape[0] == inner.shape[0] and min(kernel_size) >= 1
    fits = fits and (outer2 is None or (outer2.shape[::2], outer2.shape[3]) == (outer.shape[::2], outer.shape[3]))
    fits = fits and all(
        conv_size(inner.shape[d], kernel_size[d - 2], stride, padding) == outer.shape[d] for d in (2, 3)
    )
    if not fits:
        got = ", ".join(map(describe, tensors))
        raise InputError(
            f"{operator}: got {got}; expected outer (N, O, H', W'), inner (N, C, H, W) of one floating dtype, with "
            f"(H + 2 * {padding} - KH) // {stride} + 1 = H' for the kernel {tuple(kernel_size)}, and W likewise"
        )
    check_devices(operator, *tensors)
