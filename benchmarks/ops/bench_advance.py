"""advance: the counts of a pix2pix step, against seven launches of eager PyTorch: three an Adam, one for norms."""

import torch
from harness.parity import assert_within
from layers import DEVICE

from fastp2p.ops import advance, advance_ref

PARAMETERS, COUNTERS = (43, 13), 18  # unet_256's and its discriminator's; the rng's two and the norms'


def bench_advance(compare):
    steps = torch.zeros(sum(PARAMETERS), device=DEVICE)
    powers, betas = (torch.tensor([[0.5, 0.999]] * 2, dtype=torch.float64, device=DEVICE) for _ in range(2))
    firsts = torch.tensor([0, PARAMETERS[0]], device=DEVICE)
    counters = torch.zeros(COUNTERS, dtype=torch.int64, device=DEVICE)
    increments = torch.ones(2, COUNTERS, dtype=torch.int64, device=DEVICE)
    each, batches = list(zip(steps.split(PARAMETERS), powers, betas, strict=True)), list(counters.unbind())

    def eager() -> None:
        for own_steps, own_powers, own_betas in each:
            torch.pow(own_betas, own_steps[0] + 1, out=own_powers)
            own_steps.add_(1)
        torch._foreach_add_(batches, 2)

    def ours() -> None:
        advance(steps, powers, betas, firsts, counters, increments, images=1)

    def check() -> None:
        """Whole numbers are exact; squaring doubles a relative error, so a power's is as many roundings as steps."""
        expected = steps.clone(), powers.clone(), counters.clone()
        advance_ref(expected[0], expected[1], betas, firsts, expected[2], increments, 1)
        ours()
        assert torch.equal(steps, expected[0])
        assert torch.equal(counters, expected[2])
        assert_within("powers", powers, expected[1], float(steps[0]) * 2.0**-52 * expected[1])

    n_bytes = 8 * len(steps) + (2 * 16 + 8) * len(PARAMETERS) + 4 * 8 * COUNTERS
    compare("advance", dtype=torch.float32, eager=eager, ours=ours, check=check, n_bytes=n_bytes)
