"""The epilogue of a data gradient that flows on into a normalised layer: dz, and the sums that norm_dx needs.

The gradient of the layer's result, which is still in registers, is multiplied by the derivative of its activation and
by its dropout mask, and what came for the layer's second result is added. So neither gradient is read again for the
sums over the pixels, and norm_dx needs no activation, no mask and no second gradient: beside the store of dz this moves
2 bytes an element of bfloat16 for the norm's input, and 2 for the second gradient where there is one.
"""

from typing import NamedTuple, Self

import triton
import triton.language as tl
from torch import Tensor

from fastp2p.kernels.activation import activate, derivative
from fastp2p.kernels.layout import pixel_rows, within
from fastp2p.kernels.norm_tile import drop_below, dropout_factor, rstd_of
from fastp2p.kernels.sums import store_sums, sums_of
from fastp2p.norm_gate import NormGate


@triton.jit
def norm_epilogue(
    acc,  # (BLOCK_M, BLOCK_N) float32, the gradient
    pixel,  # (BLOCK_M,) int64, rows of out
    row_inside,  # (BLOCK_M,)
    channel,  # (BLOCK_N,)
    n_out,
    out_ptr,  # (pixels, n_out)
    gate_ptr,  # (pixels, n_out - first), the norm's input
    slope,
    group,  # from here on as in store_sums
    tile,
    tiles,
    share,
    channel_block,
    channel_blocks,
    partial_ptr,
    sum_dz_ptr,
    sum_dz_xhat_ptr,
    counter_ptr,
    gate_mean_ptr,  # (G, n_out - first) float32
    gate_var_ptr,  # (G, n_out - first) float32
    gate_weight_ptr,  # (n_out - first,) float32
    gate_bias_ptr,  # (n_out - first,) float32
    rng_ptr,  # (2,) int64
    addend_ptr,  # (pixels, n_out - first), rows addend_stride apart
    first,
    addend_stride,
    eps,
    layer,
    keep_scale,
    ACTIVATION: tl.constexpr,
    HAS_STATS: tl.constexpr,
    HAS_AFFINE: tl.constexpr,
    SECOND: tl.constexpr,  # below 0 without an addend
    DROP_BELOW: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    column = channel - first  # among the norm's channels; those before are given on as they are
    columns = n_out - first
    there = within(column, columns)
    at = group.to(tl.int64) * columns + column
    mean = tl.load(gate_mean_ptr + at, mask=there, other=0.0)[None, :]
    rstd = rstd_of(tl.load(gate_var_ptr + at, mask=there, other=1.0), eps)[None, :]
    scale = rstd
    bias = tl.zeros_like(mean)
    if HAS_AFFINE:
        scale = rstd * tl.load(gate_weight_ptr + column, mask=there, other=0.0)[None, :]
        bias = tl.load(gate_bias_ptr + column, mask=there, other=0.0)[None, :]

    inside = row_inside[:, None] & there[None, :]
    element = pixel[:, None] * columns + column[None, :]
    centred = tl.load(gate_ptr + element, mask=inside, other=0.0).to(tl.float32) - mean
    z = centred * scale + bias
    dz = acc * derivative(activate(z, slope, ACTIVATION), slope, ACTIVATION)
    if SECOND >= 0:
        other = pixel[:, None] * addend_stride + column[None, :]
        addend = tl.load(addend_ptr + other, mask=inside, other=0.0).to(tl.float32)
        dz += addend * derivative(activate(z, slope, SECOND), slope, SECOND)
    if DROP_BELOW > 0:
        dz *= dropout_factor(rng_ptr, element, layer, keep_scale, DROP_BELOW)
    stored = tl.where(there[None, :], dz, acc).to(out_ptr.dtype.element_ty)
    tl.store(
        out_ptr + pixel[:, None] * n_out + channel[None, :],
        stored,
        mask=row_inside[:, None] & (channel < n_out)[None, :],
    )
    if HAS_STATS:
        dz = tl.where(inside, stored.to(tl.float32), 0.0)
        # Read again: it lies in the cache, and large tiles have no registers to keep it
        centred = tl.load(gate_ptr + element, mask=inside, other=0.0).to(tl.float32) - mean
        sum_dz, sum_dz_xhat = sums_of(dz, dz * centred * rstd)
        store_sums(
            sum_dz, sum_dz_xhat, group, 1, tile, tiles, share, column, channel_block, channel_blocks, columns,
            partial_ptr, sum_dz_ptr, sum_dz_xhat_ptr, sum_dz_ptr, sum_dz_xhat_ptr, counter_ptr, False, BLOCK_N,
        )  # fmt: skip


class GateArguments(NamedTuple):
    """What the kernels take of a norm, and the constants for the compiler."""

    tensors: tuple[Tensor, ...]
    numbers: tuple[float, ...]
    constants: dict[str, int]

    @classmethod
    def new(cls, norm: NormGate, like: Tensor) -> Self:
        """What a norm gives, or none.

        Args:
            like: stands in for tensors that there are not.
        """
        if norm.gate_mean is None:
            none = {"HAS_NORM": 0, "HAS_AFFINE": 0, "SECOND": -1, "DROP_BELOW": 0}
            return cls((like,) * 6, (0, 0, 0.0, 0, 1.0), none)
        assert (norm.gate_weight is None) == (norm.gate_bias is None), "a norm's weight without its bias"
        vectors = (norm.gate_mean, norm.gate_var, norm.gate_weight, norm.gate_bias, norm.rng)
        addend, stride = (like, 0) if norm.addend is None else pixel_rows(norm.addend)
        tensors = tuple((norm.gate_mean if v is None else v).contiguous() for v in vectors)
        constants = {
            "HAS_NORM": 1,
            "HAS_AFFINE": int(norm.gate_weight is not None),
            "SECOND": -1 if norm.addend is None else norm.second,
            "DROP_BELOW": 0 if norm.rng is None else drop_below(norm.dropout),
        }
        return cls((*tensors, addend), (norm.first, stride, norm.eps, norm.layer, 1 / (1 - norm.dropout)), constants)
