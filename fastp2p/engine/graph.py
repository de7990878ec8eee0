"""Work as one CUDA graph: a replay costs the host a few microseconds, whatever the number of kernels."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Generic, NamedTuple, TypeVar

import torch
from torch import Tensor

from fastp2p.data import Crops
from fastp2p.engine.step import LossValues, Step
from fastp2p.errors import InputError

WARM_UP = 3  # ordinary calls before the capture: kernels compile, the allocator settles
MAIN_PRIORITY = -1  # the graph's main chain has it; streams have 0 by default, as the branch beside it has
STAGES = 2  # buffers for the host's pairs: one is filled while the GPU reads the other
Result = TypeVar("Result")


@contextmanager
def joined(stream: torch.cuda.Stream) -> Iterator[None]:
    """Launch on a stream: it waits for what is on the caller's stream by now, which in the end waits for it."""
    outside = torch.cuda.current_stream(stream.device)
    if outside == stream:
        yield
        return
    stream.wait_stream(outside)
    with torch.cuda.stream(stream):
        yield
    outside.wait_stream(stream)


class Graphed(Generic[Result]):
    """A function of no arguments as one CUDA graph: each call does its work once, and returns what it returned.

    The first calls are ordinary ones; the next one captures the function, and from then on a call replays the graph.
    A replay uses the captured call's addresses. So the function reads tensors that stay where they are, and each call
    overwrites the result of the one before. Its stream is `joined` to the caller's.

    Args:
        function: launches work on the current stream, and never waits for the GPU.
        stream: to run and capture on; by default a new one of MAIN_PRIORITY on the current device.
        pool: of memory, `torch.cuda.graph_pool_handle()`, for graphs that never run side by side; by default its own.
        warm_up: ordinary calls before the capture.
    """

    def __init__(
        self,
        function: Callable[[], Result],
        *,
        stream: torch.cuda.Stream | None = None,
        pool: Any = None,
        warm_up: int = WARM_UP,
    ):
        self.function, self.pool, self.warm_up = function, pool, warm_up
        self.stream = torch.cuda.Stream(priority=MAIN_PRIORITY) if stream is None else stream
        self.calls = 0
        self.graph: torch.cuda.CUDAGraph | None = None

    def __call__(self) -> Result:
        self.calls += 1
        with joined(self.stream):
            if self.calls <= self.warm_up:
                return self.function()
            if self.graph is None:
                self.result, self.graph = self._capture()
            self.graph.replay()
            return self.result

    def _capture(self) -> tuple[Result, torch.cuda.CUDAGraph]:
        graph = torch.cuda.CUDAGraph()
        # Threads that decode images or write checkpoints need know nothing of it
        with torch.cuda.graph(graph, self.pool, self.stream, capture_error_mode="thread_local"):
            return self.function(), graph


class Key(NamedTuple):
    """What a graph is captured for."""

    batch_size: int
    pair_shape: torch.Size
    resident_at: int | None  # address of pairs on the device, which the graph holds; None for the host's


class Recorded(NamedTuple):
    """A batch size: where its batches are read, and the step that reads them there."""

    inputs: "GraphInputs"
    launch: Graphed[LossValues]


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
        key = Key(len(crops), crops.pairs.shape[1:], crops.pairs.data_ptr() if crops.pairs.is_cuda else None)
        with joined(self.stream):
            if key not in self.recorded:
                self.recorded[key] = self._record(crops)
            inputs, launch = self.recorded[key]
            self.step.prepare()
            inputs.fill(crops)
            losses = launch()
            self.step.conclude()
        return losses

    def _record(self, like: Crops) -> Recorded:
        inputs = GraphInputs(like, self.device)

        def launch() -> LossValues:
            return self.step.launch(inputs.crops.cut(self.device, self.step.image_dtypes))

        return Recorded(inputs, Graphed(launch, stream=self.stream, pool=self.pool))


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
