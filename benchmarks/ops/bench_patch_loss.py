"""patch_loss: value and gradient of the L1 loss of an image batch, against eager PyTorch."""

import torch
import torch.nn.functional as F
from harness.parity import assert_loss
from layers import NOISE, each_batch_size, each_dtype

from fastp2p.ops import patch_loss, patch_loss_ref
from fastp2p.ops.patch_loss import KINDS

LAMBDA_L1 = 100.0


@each_batch_size
@each_dtype
def bench_patch_loss(compare, rehearse: bool, batch_size: int, dtype: torch.dtype):
    side = 16 if rehearse else 256
    fake_B, real_B = (NOISE.images(batch_size, 3, side, side, dtype=dtype).tanh() for _ in range(2))
    leaf = fake_B.clone().requires_grad_()

    def ours() -> tuple[torch.Tensor, torch.Tensor]:
        return patch_loss(fake_B, "l1", target=real_B, weight=LAMBDA_L1)

    def check() -> None:
        expected = patch_loss_ref(fake_B.double(), real_B.double(), KINDS.index("l1"), 0.0, LAMBDA_L1, False)[:2]
        assert_loss(ours(), expected)

    compare(
        f"patch_loss L1 of the image, batch {batch_size}",
        dtype=dtype,
        eager=lambda: torch.autograd.grad(LAMBDA_L1 * F.l1_loss(leaf, real_B), leaf),
        ours=ours,
        check=check,
        n_bytes=3 * fake_B.nbytes,  # two read, one written
    )
