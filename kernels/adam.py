"""adam in Triton.

Reads 16 and writes 12 bytes per parameter, and 2 more for the low-precision copy: 30 in one pass over the flat buffer,
where multi-tensor Adam followed by autocast's casts moves 84. Gradients of half the bytes are widened on the way: 2
less. One program takes BLOCK elements. Arithmetic is float32; the bias corrections come from float64 powers of the
betas in device memory: 1 - 0.999 loses three digits in float32. A step that `unscale` leaves out masks every access.
"""

from collections.abc import Iterator
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from fastp2p.kernels.compile_check import Case
from fastp2p.kernels.dependent import begin, launched
from fastp2p.kernels.launch_facts import LaunchFacts

CONFIGS = [
    {"BLOCK": 1024, "num_warps": 4, "maxnreg": 128},  # unbounded, ptxas aims at 56 on sm_80, and spills
    {"BLOCK": 512, "num_warps": 4, "maxnreg": 128},
    {"BLOCK": 2048, "num_warps": 8, "maxnreg": 128},
]


@launched()
def _adam_kernel(
    param_ptr,  # (M,) float32
    grad_ptr,  # (M,) float32, bfloat16 or float16
    exp_avg_ptr,  # (M,) float32
    exp_avg_sq_ptr,  # (M,) float32
    low_precision_ptr,  # (M,) bfloat16 or float16; param_ptr again when there is none
    lr_ptr,  # () float32
    powers_ptr,  # (2,) float64
    unscale_ptr,  # () float32; lr_ptr again when there is none
    n_elements,
    beta1,
    beta2,
    one_minus_beta1,  # rounded once, from float64
    one_minus_beta2,
    eps,
    WRITE_LOW_PRECISION: tl.constexpr,
    HAS_UNSCALE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    begin()
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    if HAS_UNSCALE:
        unscale = tl.load(unscale_ptr)
        inside = i < tl.where(unscale != 0, n_elements, 0)
        grad = tl.load(grad_ptr + i, mask=inside).to(tl.float32) * unscale
    else:
        inside = i < n_elements
        grad = tl.load(grad_ptr + i, mask=inside).to(tl.float32)
    param, exp_avg, exp_avg_sq = load_state(i, inside, param_ptr, exp_avg_ptr, exp_avg_sq_ptr)
    adam_update(
        grad, param, exp_avg, exp_avg_sq, i, i, inside, param_ptr, exp_avg_ptr, exp_avg_sq_ptr, low_precision_ptr,
        lr_ptr, powers_ptr, beta1, beta2, one_minus_beta1, one_minus_beta2, eps, WRITE_LOW_PRECISION,
    )  # fmt: skip


@triton.jit
def load_state(offset, inside, param_ptr, exp_avg_ptr, exp_avg_sq_ptr):
    """A weight and its moments at these offsets, float32 of any shape."""
    exp_avg = tl.load(exp_avg_ptr + offset, mask=inside)
    exp_avg_sq = tl.load(exp_avg_sq_ptr + offset, mask=inside)
    return tl.load(param_ptr + offset, mask=inside), exp_avg, exp_avg_sq


@triton.jit
def adam_update(
    grad, param, exp_avg, exp_avg_sq, offset, low_offset, inside, param_ptr, exp_avg_ptr, exp_avg_sq_ptr,
    low_precision_ptr, lr_ptr, powers_ptr, beta1, beta2, one_minus_beta1, one_minus_beta2, eps,
    WRITE_LOW_PRECISION: tl.constexpr,
):  # fmt: skip
    """Update what `load_state` gave, with its gradient, and store it there, and in low_precision at other offsets.

    Root and division are the GPU's own, off by an ulp or two: less than the rounding of the weight, which a step moves
    by lr. Correctly rounded they are two thirds of 88 instructions a weight, which take longer than its bytes.
    """
    correction1 = (1.0 - tl.load(powers_ptr)).to(tl.float32)
    correction2 = (1.0 - tl.load(powers_ptr + 1)).to(tl.float32)
    step_size = tl.div_rn(tl.load(lr_ptr), correction1)
    root_scale = tl.div_rn(1.0, tl.sqrt_rn(correction2))

    exp_avg = beta1 * exp_avg + one_minus_beta1 * grad
    exp_avg_sq = beta2 * exp_avg_sq + one_minus_beta2 * grad * grad
    param -= exp_avg / (tl.sqrt(exp_avg_sq) * root_scale + eps) * step_size

    tl.store(exp_avg_ptr + offset, exp_avg, mask=inside)
    tl.store(exp_avg_sq_ptr + offset, exp_avg_sq, mask=inside)
    tl.store(param_ptr + offset, param, mask=inside)
    if WRITE_LOW_PRECISION:
        # No more than 4 in a row: a thread has 4 of each then, not 8 of one and 4 of the others
        tl.store(tl.max_contiguous(low_precision_ptr + low_offset, 4), param, mask=inside)


LAUNCH_FACTS = {"_adam_kernel": LaunchFacts(updates=("param_ptr", "exp_avg_ptr", "exp_avg_sq_ptr"))}


def compile_cases() -> Iterator[Case]:
    """Without and with each low precision, and gradients of each that are unscaled too."""
    types = dict.fromkeys(("param_ptr", "exp_avg_ptr", "exp_avg_sq_ptr", "lr_ptr", "unscale_ptr"), "*fp32")
    types |= {"powers_ptr": "*fp64", "n_elements": "i32"}
    types |= dict.fromkeys(("beta1", "beta2", "one_minus_beta1", "one_minus_beta2", "eps"), "fp32")
    for low_precision in ("fp32", "bf16", "fp16"):
        for grad in dict.fromkeys(("fp32", low_precision)):
            case_types = types | {"low_precision_ptr": f"*{low_precision}", "grad_ptr": f"*{grad}"}
            for unscaled in (0, 1) if grad == low_precision else (0,):
                constants = {"WRITE_LOW_PRECISION": int(low_precision != "fp32"), "HAS_UNSCALE": unscaled}
                name = f"adam {low_precision} of {grad}{' unscaled' * unscaled}"
                yield Case(name, _adam_kernel, case_types, constants, CONFIGS)


def adam(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    lr: Tensor,
    powers: Tensor,
    beta1: float,
    beta2: float,
    eps: float,
    low_precision: Tensor | None = None,
    unscale: Tensor | None = None,
    config: dict[str, Any] = CONFIGS[0],
) -> None:
    """Launch; see `fastp2p.ops.adam`."""
    if len(param) == 0:
        return
    _adam_kernel[(triton.cdiv(len(param), config["BLOCK"]),)](
        param,
        grad,
        exp_avg,
        exp_avg_sq,
        param if low_precision is None else low_precision,
        lr,
        powers.contiguous(),
        lr if unscale is None else unscale,
        len(param),
        beta1,
        beta2,
        1 - beta1,
        1 - beta2,
        eps,
        WRITE_LOW_PRECISION=low_precision is not None,
        HAS_UNSCALE=unscale is not None,
        **config,
    )
