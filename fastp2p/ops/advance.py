"""advance: everything that counts training steps moves on by one, in one launch."""

import torch
from torch import Tensor

from fastp2p.errors import InputError
from fastp2p.ops import library
from fastp2p.ops.library import check_devices, describe
from fastp2p.ops.operands import Work


def advance_ref(
    steps: Tensor, powers: Tensor, betas: Tensor, firsts: Tensor, counters: Tensor, increments: Tensor, images: int
) -> None:
    """The specification of `advance`."""
    steps.add_(1)
    powers.copy_(betas ** steps[firsts].double()[:, None])
    counters.add_(increments[0] + images * increments[1])


def _fake(*args: object) -> None:
    return None


library.define(
    "advance",
    "(Tensor(a!) steps, Tensor(b!) powers, Tensor betas, Tensor firsts, Tensor(c!) counters, Tensor increments, "
    "SymInt images) -> ()",
    reference=advance_ref,
    fake=_fake,
    work=Work(overwritten=("powers",)),  # vectors alone
)
library.serve_by_triton("advance")


def advance(
    steps: Tensor,
    powers: Tensor,
    betas: Tensor,
    firsts: Tensor,
    counters: Tensor,
    increments: Tensor,
    *,
    images: int,
) -> None:
    """Count one more step, in place: of several Adams, and of whatever else counts in whole numbers.

        steps += 1        powers[a] = betas[a] ** steps[firsts[a]]
        counters += increments[0] + images * increments[1]

    The powers are made of the count alone, so training that goes on from a checkpoint has the same bits.

    Args:
        steps: (M,) float32, contiguous, as torch.optim.Adam counts, one for each parameter; below 2^24.
        powers: (A, 2) float64, contiguous; each Adam's (beta1^t, beta2^t), as `adam` takes them, overwritten.
        betas: (A, 2) float64, contiguous, from 0 to 1.
        firsts: (A,) int64, contiguous; a place among the steps for each Adam, all different.
        counters: (K,) int64, contiguous.
        increments: (2, K) int64, contiguous: what each counter gains in a step, and for each of its images.
        images: in this step.

    Raises:
        InputError: on shapes, dtypes or devices that do not fit.
    """
    a, k = powers.numel() // 2, counters.numel()
    expected = {
        "steps": (steps, (steps.numel(),), torch.float32),
        "powers": (powers, (a, 2), torch.float64),
        "betas": (betas, (a, 2), torch.float64),
        "firsts": (firsts, (a,), torch.int64),
        "counters": (counters, (k,), torch.int64),
        "increments": (increments, (2, k), torch.int64),
    }
    for name, (tensor, shape, dtype) in expected.items():
        if tensor.shape != shape or tensor.dtype != dtype or not tensor.is_contiguous():
            kind = str(dtype).removeprefix("torch.")
            raise InputError(f"advance: got {name} {describe(tensor)}, expected contiguous {shape} {kind}")
    check_devices("advance", *(tensor for tensor, _, _ in expected.values()))
    torch.ops.fastp2p.advance(steps, powers, betas, firsts, counters, increments, images)
