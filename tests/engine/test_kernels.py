"""The whole step on Triton's kernels, interpreted or on a GPU, against autograd."""

import pytest
import torch
from helpers.nets import batches, small_nets

from fastp2p.ops import served_by

pytestmark = pytest.mark.kernels


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 0.05)])
def test_step_on_kernels(dtype: torch.dtype, tolerance: float):
    """Two steps, so that the second one sees what the first one's Adam wrote. A map of 2², and one of 1².

    float32: sums of some hundred terms in another order. bfloat16: 2^-8 a rounding, and a dozen of them one after the
    other on the way to a loss.
    """
    nets = small_nets(levels=3, dtype=torch.float32)
    twin = nets.twin()
    assert served_by("conv", torch.get_default_device().type).startswith("Triton")
    step = twin.fused((8, 16), dtype)
    for batch in batches(1, (8, 16), torch.float32, steps=2):
        losses, expected = torch.stack(step(*batch)), torch.stack(nets.reference(*batch))
        torch.testing.assert_close(losses, expected, rtol=tolerance, atol=tolerance)
