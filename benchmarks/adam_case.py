"""Adam by torch.optim over many tensors and by ours over one flat buffer, from the same state: for two benchmarks."""

from collections.abc import Iterable

import torch
from harness.parity import assert_adam
from torch import Tensor, nn

from fastp2p.ops import adam

UNET_256_PARAMETERS = 54_413_955
LR, BETAS = 2e-4, (0.5, 0.999)


class AdamCase:
    """Both ways, and what ours must move.

    Args:
        parameters: float32, with gradients; upstream's are in many tensors and have no copy in half precision.
        dtype: of the copy that ours writes; float32 for none.
    """

    def __init__(self, parameters: list[nn.Parameter], dtype: torch.dtype):
        self.parameters = parameters
        self.optimizer = torch.optim.Adam(parameters, lr=LR, betas=BETAS)
        self.param, self.grad = _flat(parameters), _flat(p.grad for p in parameters if p.grad is not None)
        self.exp_avg, self.exp_avg_sq = torch.zeros_like(self.param), torch.zeros_like(self.param)
        self.low = None if dtype == torch.float32 else torch.empty_like(self.param, dtype=dtype)
        device = self.param.device
        self.lr, self.powers = torch.tensor(LR, device=device), torch.ones(2, dtype=torch.float64, device=device)

    @property
    def n_bytes(self) -> int:
        """16 read and 12 written for each parameter, and the copy."""
        return self.param.numel() * (28 + (0 if self.low is None else self.low.itemsize))

    def eager(self) -> None:
        self.optimizer.step()

    def ours(self) -> None:
        state = (self.param, self.grad, self.exp_avg, self.exp_avg_sq)
        adam(*state, lr=self.lr, powers=self.powers, low_precision=self.low)

    def check(self) -> None:
        """Of the buffers themselves, which have the same values still: copies would take 900 MB."""
        for _ in range(2):
            self.powers.mul_(self.powers.new_tensor(BETAS))
            self.ours()
            self.eager()
        names = "exp_avg", "exp_avg_sq"
        moments = (_flat(self.optimizer.state[p][name] for p in self.parameters) for name in names)
        ours = (self.param, self.exp_avg, self.exp_avg_sq)
        assert_adam(ours, (_flat(self.parameters), *moments), self.low, LR)


def _flat(tensors: Iterable[Tensor]) -> Tensor:
    return torch.cat([t.detach().flatten() for t in tensors])
