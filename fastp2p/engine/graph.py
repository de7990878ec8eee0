"""The whole step as one CUDA graph: a replay costs the host a few microseconds, whatever the number of kernels."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from fastp2p.data import Crops
from fastp2p.engine.step import LossValues, Step
from fastp2p.errors import InputError

WARM_UP = 3  # ordinary steps of each batch size before its graph is captured: kernels compile, the allocator settles
MAIN_PRIORITY = -1  # the graph's main chain has it; streams have 0 by default, as the branch beside it has
STAGES = 2  # buffers for the host's pairs: one is filled while the GPU reads the other


class Key(NamedTuple):
    """What a graph is captured for."""

    batch_size: int
    pair_shape: torch.Size
    resident_at: int | None  # address of pairs on the device, which the graph holds; None for the host's


@dataclass
class Recorded:
    """A batch size: where its batches are read, and once it is captured the graph and where that leaves its losses."""

    inputs: "GraphInputs"
    calls: int = 0
    graph: torch.cuda.CUDAGraph | None = None
    losses: LossValues | None = None


class GraphedStep:
    """A step on a CUDA GPU, augment included, as one graph for each batch size: crops -> losses.

    The first calls of a batch size are ordinary steps, and then the step is captured and replayed; either way every
    call is one step of training. The losses are overwritten by the next call: add them up on the device, or read them.

    Args:
        step: on a CUDA device.
    """

    def __init__(self, step: Step):
        self.step = step
        self.device = step.device
        # A graph cannot be captured on the default stream. Its main chain comes first (a lower number is a higher
        # priority, and kernels keep it in the graph): or each small kernel would queue behind the branch's large grids
        self.stream = torch.cuda.Stream(self.device, priority=MAIN_PRIORITY)
        self.pool = torch.cuda.graph_pool_handle()  # graphs never run side by side, so they share memory
        self.recorded: dict[Key, Recorded] = {}

    def __call__(self, crops: Crops) -> LossValues:
        """One step of training. Raises InputError where the crops are of another size than the step's."""
        if crops.shapes != dict(self.step.shapes):
            got, made_for = (
                ", ".join(f"{name} {shape}" for name, shape in shapes.items())
                for shapes in (crops.shapes, self.step.shapes)
            )
            raise InputError(f"engine: got crops {got}, but this step was made for {made_for}")
        outside = torch.cuda.current_stream(self.device)
        self.stream.wait_stream(outside)
        with torch.cuda.stream(self.stream):
            key = Key(len(crops), crops.pairs.shape[1:], crops.pairs.data_ptr() if crops.pairs.is_cuda else None)
            if key not in self.recorded:
                self.recorded[key] = Recorded(GraphInputs(crops, self.device))
            recorded = self.recorded[key]
            self.step.prepare()
            recorded.inputs.fill(crops)
            losses = self._run(recorded)
            self.step.conclude()
        outside.wait_stream(self.stream)
        return losses

    def _run(self, recorded: Recorded) -> LossValues:
        recorded.calls += 1
        if recorded.calls <= WARM_UP:
            return self.step.launch(recorded.inputs.crops.cut(self.device))
        if recorded.graph is None:
            graph = torch.cuda.CUDAGraph()
            # Threads that decode images or write checkpoints need know nothing of it
            with torch.cuda.graph(graph, self.pool, self.stream, capture_error_mode="thread_local"):
                recorded.losses = self.step.launch(recorded.inputs.crops.cut(self.device))
            recorded.graph = graph
        recorded.graph.replay()
        assert recorded.losses is not None
        return recorded.losses


@dataclass
class Stage:
    """Where a batch of the host's pairs waits, and when each of its two places may be filled again."""

    pinned: Tensor  # (N, H, W, C) uint8, in the host's pinned memory, from which a copy does not block
    arrived: Tensor  # the same on the device
    sent: torch.cuda.Event  # recorded when `pinned` has been read
    read: torch.cuda.Event  # recorded when `arrived` has been read


class GraphInputs:
    """Fixed addresses on the device from which a graph reads a batch.

    Pairs on the device are read where they are, and a call copies only which ones and their jitter. Pairs in the host's
    memory, all of them or a decoded batch, are gathered there: the batch alone comes over, from pinned memory through
    two stages, on a stream of its own, so that the next one is on its way while this one is trained on.

    Args:
        like: crops of the batch size, sizes and place of what is to come.
    """

    def __init__(self, like: Crops, device: torch.device):
        self.gathers = not like.pairs.is_cuda
        index, offset, flip = (torch.empty_like(t, device=device) for t in (like.index, like.offset, like.flip))
        pairs = like.pairs
        self.stages: list[Stage] = []
        if self.gathers:
            shape = (len(like), *like.pairs.shape[1:])
            pairs = torch.empty(shape, dtype=like.pairs.dtype, device=device)
            index = torch.arange(len(like), device=device)
            self.stages = [self._stage(pairs) for _ in range(STAGES)]
            self.copies = torch.cuda.Stream(device)
            # The stages' memory may still be read by what was launched before
            self.copies.wait_stream(torch.cuda.current_stream(device))
        self.crops = Crops(pairs, index, offset, flip, like.crop_size, like.input_nc)
        self.next_stage = 0

    @staticmethod
    def _stage(pairs: Tensor) -> Stage:
        pinned = torch.empty(pairs.shape, dtype=pairs.dtype, device="cpu", pin_memory=True)
        return Stage(pinned, torch.empty_like(pairs), torch.cuda.Event(), torch.cuda.Event())

    def fill(self, crops: Crops) -> None:
        """Bring a batch in, on the current stream. Waits, where pairs are gathered, for the copy of two calls ago."""
        for name in ("offset", "flip") if self.gathers else ("index", "offset", "flip"):
            source: Tensor = getattr(crops, name)
            pinned = source if source.is_cuda else source.pin_memory()
            getattr(self.crops, name).copy_(pinned, non_blocking=True)
        if not self.gathers:
            return
        stage = self.stages[self.next_stage]
        stage.sent.synchronize()  # or this batch would overwrite one that is still to be sent
        crops.gather(stage.pinned)
        with torch.cuda.stream(self.copies):
            self.copies.wait_event(stage.read)
            stage.arrived.copy_(stage.pinned, non_blocking=True)
            stage.sent.record(self.copies)
        current = torch.cuda.current_stream(stage.arrived.device)
        current.wait_event(stage.sent)
        self.crops.pairs.copy_(stage.arrived)
        stage.read.record(current)
        self.next_stage = (self.next_stage + 1) % STAGES
