"""Two ways to do the same, for benchmarks that time them in turn: Adam, and cutting a batch out of resident pairs."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fastp2p.ops import adam, augment, augment_ref
from harness.parity import assert_adam

UNET_256_PARAMETERS = 54_413_955
LR, BETAS = 2e-4, (0.5, 0.999)
Call = Callable[[], object]


@dataclass(frozen=True)
class Case:
    """Calls that do the same work, for `compare_calls`, and the bytes that ours must move."""

    eager: Call
    ours: Call
    check: Callable[[], None]  # raises AssertionError unless they have the same results
    n_bytes: int = 0  # 0 where it is arithmetic that counts


def adam_case(parameters: list[nn.Parameter], dtype: torch.dtype) -> Case:
    """torch.optim's over many tensors and ours over one flat buffer, from the same state.

    Args:
        parameters: float32, with gradients; upstream's are in many tensors and have no copy in half precision.
        dtype: of the copy that ours writes; float32 for none.
    """
    optimizer = torch.optim.Adam(parameters, lr=LR, betas=BETAS)
    param, grad = _flat(parameters), _flat(p.grad for p in parameters if p.grad is not None)
    exp_avg, exp_avg_sq = torch.zeros_like(param), torch.zeros_like(param)
    low = None if dtype == torch.float32 else torch.empty_like(param, dtype=dtype)
    lr, powers = torch.tensor(LR, device=param.device), torch.ones(2, dtype=torch.float64, device=param.device)

    def ours() -> None:
        adam(param, grad, exp_avg, exp_avg_sq, lr=lr, powers=powers, low_precision=low)

    def check() -> None:
        """The buffers themselves, which have the same values still: copies would take 900 MB."""
        for _ in range(2):
            powers.mul_(powers.new_tensor(BETAS))
            ours()
            optimizer.step()
        moments = (_flat(optimizer.state[p][name] for p in parameters) for name in ("exp_avg", "exp_avg_sq"))
        assert_adam((param, exp_avg, exp_avg_sq), (_flat(parameters), *moments), low, LR)

    n_bytes = param.numel() * (28 + (0 if low is None else low.itemsize))  # 16 read, 12 written, and the copy
    return Case(optimizer.step, ours, check, n_bytes)


def augment_case(
    batch: int, size: int, load_size: int, dtype: torch.dtype, *, eager_dtype: torch.dtype, device: torch.device
) -> Case:
    """A batch of crops of (6, size, size) from resident pairs, and the same by indexing and arithmetic in PyTorch."""
    pairs = torch.randint(0, 256, (32, load_size, load_size, 6), dtype=torch.uint8, device=device)
    index, offset = torch.arange(batch), torch.randint(0, load_size - size + 1, (batch, 2))
    index, offset, flip = (t.to(device) for t in (index, offset, index % 2 == 0))

    def eager() -> tuple[Tensor, Tensor]:
        return augment_ref(pairs, index, offset, flip, size, 3, eager_dtype)

    def ours() -> tuple[Tensor, Tensor]:
        return augment(pairs, index, offset, flip, crop_size=size, input_nc=3, A_dtype=dtype)

    def check() -> None:
        """Bit for bit: a function of 256 values, rounded once."""
        (real_A, real_B), (eager_A, eager_B) = ours(), eager()
        assert torch.equal(real_A, eager_A.to(dtype)), "augment differs from its reference, so it is not timed"
        assert torch.equal(real_B, eager_B), "augment differs from its reference, so it is not timed"

    return Case(eager, ours, check, batch * size**2 * 3 * (2 + dtype.itemsize + 4))  # uint8 read


def _flat(tensors: Iterable[Tensor]) -> Tensor:
    return torch.cat([t.detach().flatten() for t in tensors])
