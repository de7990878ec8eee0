"""The whole step as one CUDA graph: a replay costs the host a few microseconds, whatever the number of kernels."""

from dataclasses import dataclass

import torch
from torch import Tensor

from fastp2p.data import Crops
from fastp2p.engine.step import FusedStep
from fastp2p.losses import Losses

WARM_UP = 3  # ordinary steps of each batch size before its graph is captured: kernels compile, the allocator settles
STAGES = 2  # of what is streamed: one is being filled while the other one is read


class GraphedStep:
    """A FusedStep on a CUDA GPU, augment included, as one graph for each batch size: crops -> losses.

    The first calls of a batch size are ordinary steps, and then the step is captured and replayed; either way every
    call is one step of training. The losses are overwritten by the next call: add them up on the device, or read them.

    Args:
        step: on a CUDA device.
    """

    def __init__(self, step: FusedStep):
        self.step = step
        self.device = step.rng.device
        self.stream = torch.cuda.Stream(self.device)  # a graph cannot be captured on the default stream
        self.pool = torch.cuda.graph_pool_handle()  # graphs never run side by side, so they share memory
        self.captured: dict[tuple[object, ...], Captured] = {}
        self.calls: dict[tuple[object, ...], int] = {}

    def __call__(self, crops: Crops) -> Losses[Tensor]:
        """One step of training. Raises InputError where the crops are of another size than the step's."""
        self.step.check_size((crops.crop_size, crops.crop_size))
        resident = crops.pairs.data_ptr() if crops.pairs.is_cuda else None  # a graph holds its address
        key = (len(crops), crops.pairs.shape[1:], resident)
        slots = self.captured[key].slots if key in self.captured else Slots(crops, self.device)
        outside = torch.cuda.current_stream(self.device)
        self.stream.wait_stream(outside)
        with torch.cuda.stream(self.stream):
            self.step.read_learning_rates()
            slots.fill(crops)
            losses = self._run(key, slots)
        outside.wait_stream(self.stream)
        return losses

    def _run(self, key: tuple[object, ...], slots: "Slots") -> Losses[Tensor]:
        if key not in self.captured:
            self.calls[key] = self.calls.get(key, 0) + 1
            if self.calls[key] <= WARM_UP:
                return self.step.run_below_autograd(*slots.crops.cut(self.device))
            graph = torch.cuda.CUDAGraph()
            # Threads that decode images or write checkpoints need know nothing of it
            with torch.cuda.graph(graph, self.pool, self.stream, capture_error_mode="thread_local"):
                losses = self.step.run_below_autograd(*slots.crops.cut(self.device))
            self.captured[key] = Captured(graph, slots, losses)
        self.captured[key].graph.replay()
        return self.captured[key].losses


@dataclass(frozen=True)
class Captured:
    """A graph, where it reads its batch, and where it leaves its losses."""

    graph: torch.cuda.CUDAGraph
    slots: "Slots"
    losses: Losses[Tensor]


class Slots:
    """Fixed addresses on the device from which a graph reads a batch.

    Resident pairs are read where they are, and a call copies only which ones and their jitter. Streamed pairs come from
    pinned memory through two stages, on a stream of their own, so that the next batch is on its way while this one is
    trained on.

    Args:
        like: crops of the batch size, sizes and place of what is to come.
    """

    def __init__(self, like: Crops, device: torch.device):
        streamed = not like.pairs.is_cuda
        index, offset, flip = (torch.empty_like(t, device=device) for t in (like.index, like.offset, like.flip))
        pairs = torch.empty_like(like.pairs, device=device) if streamed else like.pairs
        self.crops = Crops(pairs, index, offset, flip, like.crop_size, like.input_nc)
        self.stages = [torch.empty_like(pairs) for _ in range(STAGES)] if streamed else []
        self.read = [torch.cuda.Event() for _ in self.stages]  # when a stage may be filled again
        self.copies = torch.cuda.Stream(device) if streamed else None
        self.turn = 0

    def fill(self, crops: Crops) -> None:
        """Bring a batch in, on the current stream."""
        for name in ("index", "offset", "flip"):
            source: Tensor = getattr(crops, name)
            pinned = source if source.is_cuda else source.pin_memory()
            getattr(self.crops, name).copy_(pinned, non_blocking=True)
        if self.copies is None:
            return
        stage, read = self.stages[self.turn], self.read[self.turn]
        with torch.cuda.stream(self.copies):
            self.copies.wait_event(read)
            stage.copy_(crops.pairs.pin_memory(), non_blocking=True)
        current = torch.cuda.current_stream(stage.device)
        current.wait_stream(self.copies)
        self.crops.pairs.copy_(stage)
        read.record(current)
        self.turn = (self.turn + 1) % STAGES
