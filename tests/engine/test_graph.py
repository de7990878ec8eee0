"""Link 4 on a GPU: a step replayed as a graph is the step, bit for bit, and waits for nobody."""

import pytest
import torch
from helpers.nets import Trained, small_nets
from helpers.on_device import generator

from fastp2p.data import Crops
from fastp2p.engine import GraphedStep
from fastp2p.engine.graph import WARM_UP

pytestmark = pytest.mark.gpu
LOAD_SIZE, CROP_SIZE = 36, 32


def crops(n: int, seed: int, resident: torch.Tensor | None) -> Crops:
    """A batch of n of 8 pairs, all on the GPU or all in the host's memory; None: streamed, so decoded into that."""
    g = generator(seed)
    index = torch.randperm(8, generator=g)[:n]
    offset = torch.randint(0, LOAD_SIZE - CROP_SIZE + 1, (n, 2), generator=g)
    flip = torch.randint(0, 2, (n,), generator=g).bool()
    if resident is not None:
        index, offset, flip = (t.to(resident.device) for t in (index, offset, flip))
        return Crops(resident, index, offset, flip, CROP_SIZE, 3)
    pairs = pair_images()[index].cpu()
    return Crops(pairs, torch.arange(n, device="cpu"), offset.cpu(), flip.cpu(), CROP_SIZE, 3)


def pair_images() -> torch.Tensor:
    return torch.randint(0, 256, (8, LOAD_SIZE, LOAD_SIZE, 6), dtype=torch.uint8, generator=generator(0))


def nets() -> Trained:
    return small_nets(levels=5, ngf=16, dropout="paper", dtype=torch.float32)


@pytest.mark.parametrize("kept", ["on the GPU", "in the host's memory", "streamed"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_replay_is_the_step_bit_for_bit(dtype: torch.dtype, kept: str):
    """Batches of 2 with a smaller last one in each epoch of 5, and a learning rate that changes."""
    one = nets()
    other = one.twin()
    ordinary = one.fused((CROP_SIZE, CROP_SIZE), dtype, seed=3)
    graphed = GraphedStep(other.fused((CROP_SIZE, CROP_SIZE), dtype, seed=3))
    resident = None if kept == "streamed" else pair_images().to("cuda" if kept == "on the GPU" else "cpu")
    for step in range(5 * (WARM_UP + 3)):
        for optimizer in (*one.optimizers, *other.optimizers):
            optimizer.param_groups[0]["lr"] = 2e-3 / (1 + step // 5)
        batch = crops(1 if step % 5 == 4 else 2, step, resident)
        expected, losses = ordinary.train(batch.cut("cuda")), graphed(batch)
        assert torch.equal(torch.stack([*losses.values()]), torch.stack([*expected.values()])), f"step {step}"
    assert [recorded.launch.graph is not None for recorded in graphed.recorded.values()] == [True, True]
    found = other.tensors()
    for name, value in one.tensors().items():
        assert torch.equal(value, found[name]), name


def test_nothing_waits_for_the_gpu():
    """Losses may be added up on the device; only reading them synchronises."""
    graphed = GraphedStep(nets().fused((CROP_SIZE, CROP_SIZE), torch.bfloat16))
    resident = pair_images()
    batches = [crops(2, step, resident) for step in range(WARM_UP + 6)]
    for batch in batches[: WARM_UP + 2]:
        graphed(batch)
    sums = torch.zeros(4)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for batch in batches[WARM_UP + 2 :]:
            sums += torch.stack(graphed(batch))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert sums.isfinite().all()
