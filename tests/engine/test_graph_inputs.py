"""What a graph reads, with copies that are late: each batch arrives whole, alone, and is not overwritten on its way."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from helpers.on_device import generator
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fastp2p.data import Crops
from fastp2p.engine.graph import GraphInputs

PAIRS, SIDE, N = 50, 6, 3
BATCH_BYTES = N * SIDE * SIDE * 6


class LateCopies(TorchDispatchMode):
    """A GPU's queue: each copy is kept, and made when the host waits for an event that was recorded after it."""

    def __init__(self) -> None:
        super().__init__()
        self.waiting: list[Callable[[], object]] = []
        self.done = 0
        self.running = False
        self.n_bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        if func is not torch.ops.aten.copy_.default or self.running:
            return func(*args, **(kwargs or {}))
        self.waiting.append(lambda: func(*args))
        self.n_bytes += args[1].nbytes
        return args[0]

    def run(self, until: int) -> None:
        self.running = True
        for copy in self.waiting[self.done : until]:
            copy()
        self.running = False
        self.done = max(self.done, until)


@pytest.fixture
def queue(monkeypatch: pytest.MonkeyPatch) -> LateCopies:
    """Streams and events of CUDA as ones of LateCopies: one queue, in the order in which the host fills it."""
    found = LateCopies()

    class Event:
        recorded_at = 0

        def record(self, stream: Any) -> None:
            self.recorded_at = len(found.waiting)

        def synchronize(self) -> None:
            found.run(self.recorded_at)

    class Stream:
        def __init__(self, device: Any = None) -> None: ...
        def wait_stream(self, stream: Any) -> None: ...
        def wait_event(self, event: Event) -> None: ...

    @contextlib.contextmanager
    def stream(_: Any) -> Iterator[None]:
        yield

    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *args, pin_memory=False, **options: empty(*args, **options))
    monkeypatch.setattr(Tensor, "pin_memory", Tensor.clone)
    for name, fake in (("Event", Event), ("Stream", Stream), ("stream", stream), ("current_stream", Stream)):
        monkeypatch.setattr(torch.cuda, name, fake)
    return found


def batch(pairs: Tensor, seed: int, streamed: bool) -> Crops:
    draws = torch.Generator("cpu").manual_seed(seed)
    index = torch.randint(PAIRS, (N,), generator=draws, device="cpu")
    offset = torch.randint(2, (N, 2), generator=draws, device="cpu")
    flip = torch.randint(2, (N,), generator=draws, device="cpu") > 0
    if streamed:
        pairs, index = pairs[index], torch.arange(N, device="cpu")
    return Crops(pairs, index, offset, flip, SIDE - 1, 3)


@pytest.mark.parametrize("streamed", [False, True])
def test_only_the_batch_comes_over_and_none_is_overwritten(queue: LateCopies, streamed: bool):
    """The GPU lags behind as far as it may; what it would train on are the batches as they were given."""
    pairs = torch.randint(0, 256, (PAIRS, SIDE, SIDE, 6), dtype=torch.uint8, generator=generator(0)).cpu()
    batches = [batch(pairs, seed, streamed) for seed in range(7)]
    inputs = GraphInputs(batches[0], torch.device("cpu"))
    trained: list[tuple[Tensor, ...]] = []

    def train() -> None:
        trained.append(tuple(x.clone() for x in inputs.crops.cut("cpu").values()))

    for crops in batches:
        before = queue.n_bytes
        with queue:
            inputs.fill(crops)
        # To the device and into the graph's own place; and the jitter, two numbers and a flag for each
        assert queue.n_bytes - before == 2 * BATCH_BYTES + N * (2 * 8 + 1)
        queue.waiting.append(train)
    assert queue.done < len(queue.waiting) - 4, "nothing was late"
    queue.run(len(queue.waiting))
    for ours, crops in zip(trained, batches, strict=True):
        assert all(map(torch.equal, ours, crops.cut("cpu").values()))


def test_pairs_on_the_device_stay_where_they_are(queue: LateCopies, monkeypatch: pytest.MonkeyPatch):
    pairs = torch.randint(0, 256, (PAIRS, SIDE, SIDE, 6), dtype=torch.uint8, generator=generator(0)).cpu()
    monkeypatch.setattr(Tensor, "is_cuda", True)
    crops = batch(pairs, 1, streamed=False)
    inputs = GraphInputs(crops, torch.device("cpu"))
    with queue:
        inputs.fill(crops)
    assert inputs.crops.pairs is pairs
    assert queue.n_bytes == N * (8 + 2 * 8 + 1)
