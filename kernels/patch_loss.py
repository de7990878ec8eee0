"""patch_loss in Triton.

Reads x (and the target, if it is a tensor) once and writes dx once: 4 or 6 bytes an element in bfloat16, where each
step of the chain loss, mean, backward, scale, cast would move about as much again. One program takes BLOCK elements and
leaves one partial sum; those are added in a fixed order, so that the same input gives the same bits. Arithmetic is
float32.
"""

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastp2p.kernels.compile_check import Case

CONFIGS = [{"BLOCK": 1024, "num_warps": 4}, {"BLOCK": 256, "num_warps": 2}, {"BLOCK": 4096, "num_warps": 8}]
BCE, SQUARE, HINGE, LINEAR = (tl.constexpr(kind) for kind in range(4))  # the order of ops.patch_loss.KINDS; then l1


@triton.jit
def _patch_loss_kernel(
    x_ptr,  # (M,)
    target_ptr,  # (M,), of its own dtype; x_ptr again when the target is a number
    dx_ptr,  # (M,)
    partial_ptr,  # (programs,) float32
    n_elements,
    target_value,
    scale,  # weight / M
    KIND: tl.constexpr,
    HAS_TARGET: tl.constexpr,
    THROUGH_TANH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = i < n_elements
    x = tl.load(x_ptr + i, mask=inside, other=0.0).to(tl.float32)
    t = tl.load(target_ptr + i, mask=inside, other=0.0).to(tl.float32) if HAS_TARGET else target_value

    if KIND == BCE:
        decay = tl.exp(-tl.abs(x))  # the larger side's: never overflows
        loss = tl.maximum(x, 0.0) - x * t + _log1p(decay)
        sigmoid = tl.div_rn(tl.where(x >= 0, 1.0, decay), 1.0 + decay)
        slope = sigmoid - t
    elif KIND == SQUARE:
        loss = (x - t) * (x - t)
        slope = 2.0 * (x - t)
    elif KIND == HINGE:
        margin = 1.0 - t * x
        loss = tl.where(margin <= 0.0, 0.0, margin)  # tl.maximum would swallow a NaN on a GPU
        slope = tl.where(margin <= 0.0, 0.0, -t)
    elif KIND == LINEAR:
        loss = -t * x
        slope = tl.zeros_like(x) - t
    else:
        loss = tl.abs(x - t)
        slope = tl.where(x > t, 1.0, tl.where(x < t, -1.0, 0.0))

    if THROUGH_TANH:
        slope *= 1.0 - x * x
    tl.store(dx_ptr + i, slope * scale, mask=inside)
    tl.store(partial_ptr + tl.program_id(0), tl.sum(tl.where(inside, loss, 0.0), axis=0) * scale)


@triton.jit
def _log1p(x):
    """log(1 + x) for 0 <= x <= 1 to float32's precision: the correction cancels the rounding of 1 + x (Kahan)."""
    y = 1.0 + x
    rest = x - (y - 1.0)
    return tl.log(y) + tl.div_rn(rest, y)


def compile_cases() -> Iterator[Case]:
    """Each loss in each precision, with a number for a target; L1 with a tensor, plain and through tanh."""
    for dtype in ("fp32", "bf16", "fp16"):
        types = dict.fromkeys(("x_ptr", "target_ptr", "dx_ptr"), f"*{dtype}")
        types |= {"partial_ptr": "*fp32", "n_elements": "i32", "target_value": "fp32", "scale": "fp32"}
        for kind in range(4):
            constants = {"KIND": kind, "HAS_TARGET": 0, "THROUGH_TANH": 0}
            yield Case(f"patch_loss {kind} {dtype}", _patch_loss_kernel, types, constants, CONFIGS)
        for through_tanh in (0, 1):
            constants = {"KIND": 4, "HAS_TARGET": 1, "THROUGH_TANH": through_tanh}
            yield Case(f"patch_loss l1 tanh={through_tanh} {dtype}", _patch_loss_kernel, types, constants, CONFIGS)
            if dtype != "fp32":
                mixed = types | {"target_ptr": "*fp32"}
                yield Case(
                    f"patch_loss l1 tanh={through_tanh} {dtype}/fp32", _patch_loss_kernel, mixed, constants, CONFIGS
                )


def patch_loss(
    x: Tensor,
    target: Tensor | None,
    kind: int,
    target_value: float,
    weight: float,
    through_tanh: bool,
    config: dict[str, Any] = CONFIGS[0],
) -> tuple[Tensor, Tensor]:
    """Launch; see `fastp2p.ops.patch_loss`."""
    dx = torch.empty_like(x)  # dense, in x's own order of dimensions; the kernel runs along the memory
    dense = x if x.stride() == dx.stride() else torch.empty_like(x).copy_(x)
    if target is not None and target.stride() != dx.stride():
        target = torch.empty_like(x, dtype=target.dtype).copy_(target)
    n = x.numel()
    programs = triton.cdiv(n, config["BLOCK"])
    partial = torch.empty(programs, dtype=torch.float32, device=x.device)
    _patch_loss_kernel[(programs,)](
        dense,
        dense if target is None else target,
        dx,
        partial,
        n,
        target_value,
        weight / n,
        KIND=kind,
        HAS_TARGET=target is not None,
        THROUGH_TANH=through_tanh,
        **config,
    )
    return partial.sum(), dx
