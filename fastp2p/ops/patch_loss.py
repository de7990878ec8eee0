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


SCHEMA = (
    "(Tensor x, Tensor? target, int kind, float target_value, float weight, bool through_tanh, int second_kind=-1, "
    "float second_value=0.0, float dx_weight=1.0, Tensor? dx_scale=None, Tensor? addend=None, bool sums=False)"
    " -> (Tensor, Tensor, Tensor)"
)


def patch_loss_ref(
    x: Tensor,
    target: Tensor | None,
    kind: int,
    target_value: float,
    weight: float,
    through_tanh: bool,
    second_kind: int = -1,
    second_value: float = 0.0,
    dx_weight: float = 1.0,
    dx_scale: Tensor | None = None,
    addend: Tensor | None = None,
    sums: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """The specification of `patch_loss`, and what schedules written by hand ask of the operator beyond it.

    Args:
        second_kind, second_value: a loss of the second half of x's images; the first half's is the other. Each is a
            mean over its own half. -1: there is none, and one loss is of all of x.
        dx_weight: multiplies dx, and not the loss.
        dx_scale: () float32 (or float64 for float64), likewise, on the device.
        addend: like x; dx is added to it, and the sum is rounded once.
        sums: whether the channels' sums of dx are wanted, of x (N, C, H, W).

    Returns:
        loss: () float32 (float64 for float64); with a second kind (2,).
        dx: like x.
        sums: (C,) of loss's dtype, of dx as it is returned; (0,) where they are not wanted.
    """
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    targets = [(kind, target_value)] + ([(second_kind, second_value)] if second_kind >= 0 else [])
    images = len(x) // len(targets) if len(targets) > 1 else 0
    parts = wide.split(images) if images else [wide]
    pairs = [_pointwise(part, target, *one) for part, one in zip(parts, targets, strict=True)]
    losses = [weight * pointwise.mean() for pointwise, _ in pairs]
    dx = torch.cat([slope.view(-1) for _, slope in pairs]).view(x.shape)
    dx = dx * (weight * dx_weight / (x.numel() // len(targets)))
    dx = dx * (1 - wide**2) if through_tanh else dx
    dx = dx if dx_scale is None else dx * dx_scale
    dx = torch.empty_like(x).copy_(dx if addend is None else dx + addend)
    channels = dx.sum((0, 2, 3), dtype=wide.dtype) if sums else wide.new_empty(0)
    return torch.stack(losses) if images else losses[0], dx, channels


def _pointwise(x: Tensor, target: Tensor | None, kind: int, value: float) -> tuple[Tensor, Tensor]:
    """The loss of each value, and its slope there, both contiguous."""
    x = x.contiguous()
    t = torch.full_like(x, value) if target is None else target.to(x.dtype).contiguous()
    match KINDS[kind]:
        case "bce":
            return F.binary_cross_entropy_with_logits(x, t, reduction="none"), x.sigmoid() - t
        case "square":
            return (x - t) ** 2, 2 * (x - t)
        case "hinge":
            return F.relu(1 - t * x), torch.where(t * x >= 1, 0, -t)
        case "linear":
            return -t * x, -t
        case "l1":
            return (x - t).abs(), (x - t).sign()


def _fake(
    x: Tensor,
    target: Tensor | None,
    kind: int,
    target_value: float,
    weight: float,
    through_tanh: bool,
    second_kind: int = -1,
    second_value: float = 0.0,
    dx_weight: float = 1.0,
    dx_scale: Tensor | None = None,
    addend: Tensor | None = None,
    sums: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    wide = torch.promote_types(x.dtype, torch.float32)
    loss = x.new_empty(() if second_kind < 0 else (2,), dtype=wide)
    return loss, torch.empty_like(x), x.new_empty(x.shape[1] if sums else 0, dtype=wide)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, dx, sums = output
    _, _, _, _, _, through_tanh, second_kind, _, dx_weight, dx_scale, addend, _ = inputs
    ctx.is_gradient = not through_tanh and second_kind < 0 and dx_weight == 1 and dx_scale is None and addend is None
    ctx.save_for_backward(dx)
    ctx.mark_non_differentiable(dx, sums)


@library.first_derivative_only  # dx is a constant to autograd: there is no second derivative
def _backward(ctx: Any, grad_loss: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    if not ctx.is_gradient:
        raise InputError(
            "patch_loss: through_tanh, a second kind, dx_weight, dx_scale or addend changes dx alone; take dx instead "
            "of the loss's gradient"
        )
    (dx,) = ctx.saved_tensors
    return (dx * grad_loss).to(dx.dtype), *[None] * 11


library.define(
    "patch_loss",
    SCHEMA,
    reference=patch_loss_ref,
    fake=_fake,
    work=Work(maps=("x", "target", "addend"), results=("vectors", "maps", "vectors")),
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
    loss, dx, _ = torch.ops.fastp2p.patch_loss(x, target_tensor, KINDS.index(kind), target_value, weight, through_tanh)
    return loss, dx
