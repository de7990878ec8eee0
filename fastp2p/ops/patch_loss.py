"""patch_loss: the mean of a pointwise loss over a patch map or an image, and its gradient, in one pass."""

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from fastp2p.errors import InputError
from fastp2p.ops import library
from fastp2p.ops.operands import Work

Kind = Literal["bce", "square", "hinge", "linear", "l1"]
KINDS: tuple[Kind, ...] = ("bce", "square", "hinge", "linear", "l1")  # the operator takes the index


def patch_loss_ref(
    x: Tensor, target: Tensor | None, kind: int, target_value: float, weight: float, through_tanh: bool
) -> tuple[Tensor, Tensor]:
    """The specification of `patch_loss`: (loss, dx)."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    t = torch.full_like(wide, target_value) if target is None else target.to(wide.dtype)
    match KINDS[kind]:
        case "bce":
            pointwise, slope = F.binary_cross_entropy_with_logits(wide, t, reduction="none"), wide.sigmoid() - t
        case "square":
            pointwise, slope = (wide - t) ** 2, 2 * (wide - t)
        case "hinge":
            pointwise, slope = F.relu(1 - t * wide), torch.where(t * wide >= 1, 0, -t)
        case "linear":
            pointwise, slope = -t * wide, -t
        case "l1":
            pointwise, slope = (wide - t).abs(), (wide - t).sign()
    dx = slope * (weight / x.numel())
    dx = dx * (1 - wide**2) if through_tanh else dx
    return weight * pointwise.mean(), torch.empty_like(x).copy_(dx)


def _fake(
    x: Tensor, target: Tensor | None, kind: int, target_value: float, weight: float, through_tanh: bool
) -> tuple[Tensor, Tensor]:
    return x.new_empty((), dtype=torch.promote_types(x.dtype, torch.float32)), torch.empty_like(x)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    _, dx = output
    ctx.through_tanh = inputs[5]
    ctx.save_for_backward(dx)
    ctx.mark_non_differentiable(dx)


@library.first_derivative_only  # dx is a constant to autograd: there is no second derivative
def _backward(ctx: Any, grad_loss: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    if ctx.through_tanh:
        raise InputError("patch_loss: through_tanh changes dx alone; take dx instead of the loss's gradient")
    (dx,) = ctx.saved_tensors
    return (dx * grad_loss).to(dx.dtype), None, None, None, None, None


library.define(
    "patch_loss",
    "(Tensor x, Tensor? target, int kind, float target_value, float weight, bool through_tanh) -> (Tensor, Tensor)",
    reference=patch_loss_ref,
    fake=_fake,
    work=Work(maps=("x", "target"), results=("vectors", "maps")),
    backward=_backward,
    setup_context=_setup_context,
)
library.serve_by_triton("patch_loss")


def patch_loss(
    x: Tensor,
    kind: Kind,
    *,
    target: Tensor | float,
    weight: float = 1.0,
    through_tanh: bool = False,
) -> tuple[Tensor, Tensor]:
    """weight * mean of a pointwise loss, and its gradient with respect to x, from one reading of x.

        bce      -t log s(x) - (1 - t) log(1 - s(x)), s the sigmoid     t = 1 real, 0 fake: the vanilla GAN loss
        square   (x - t)²                                               t = 1 real, 0 fake: LSGAN
        hinge    max(0, 1 - t x)                                        t = 1 real, -1 fake: hinge, for D
        linear   -t x                                                   t = 1: hinge, for G
        l1       |x - t|                                                t = real_B, weight = lambda_L1

    Differentiable in x through autograd, once; a schedule written by hand takes dx instead. In float16 a gradient below
    6e-8 is lost before a loss scale can reach it: put the scale into `weight`.

    Args:
        x: logits (N, 1, H, W) or an image (N, C, H, W), any shape; floating. Arithmetic is in float32 (float64 for
            float64).
        kind: the pointwise loss.
        target: a number, or a tensor of x's shape and any floating dtype; detached.
        weight: of the mean.
        through_tanh: multiply dx by 1 - x², for an x that came out of tanh: the gradient before the tanh. For schedules
            written by hand; autograd refuses it.

    Returns:
        loss: () float32 (float64 for float64).
        dx: like x, d loss / dx, rounded to x's dtype, not differentiable; where x = t the gradient of l1 is 0.

    Raises:
        InputError: on an unknown kind, an empty x, or a target of another shape or device.
    """
    if kind not in KINDS:
        raise InputError(f"patch_loss: got kind {kind!r}, expected one of {', '.join(KINDS)}")
    if x.numel() == 0 or not x.is_floating_point():
        raise InputError(f"patch_loss: got x {tuple(x.shape)} {x.dtype}, expected a floating tensor with elements")
    if isinstance(target, Tensor):
        if target.shape != x.shape or target.device != x.device:
            raise InputError(
                f"patch_loss: got target {tuple(target.shape)} on {target.device}, "
                f"expected {tuple(x.shape)} on {x.device}"
            )
        target_tensor, target_value = target.detach(), 0.0
    else:
        target_tensor, target_value = None, float(target)
    loss, dx = torch.ops.fastp2p.patch_loss(x, target_tensor, KINDS.index(kind), target_value, weight, through_tanh)
    return loss, dx
