"""Graphed: when it calls, captures and replays, by streams that only note; and on a GPU, what a replay computes."""

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from fastp2p.engine.graph import MAIN_PRIORITY, WARM_UP, Graphed, joined

Notes = list[str]


@pytest.fixture
def notes(monkeypatch: pytest.MonkeyPatch) -> Notes:
    """What CUDA is asked for, in order; streams and graphs need no GPU."""
    found: Notes = []
    current: list[Any] = []

    class Stream:
        device = torch.device("cuda", 0)

        def __init__(self, device: Any = None, priority: int = 0) -> None:
            self.priority, self.name = priority, "side"

        def wait_stream(self, other: Any) -> None:
            found.append(f"{self.name} waits for {other.name}")

    class Graph:
        def replay(self) -> None:
            found.append(f"replay on {current[-1].name}")

    @contextlib.contextmanager
    def stream(entered: Any) -> Iterator[None]:
        current.append(entered)
        yield
        current.pop()

    @contextlib.contextmanager
    def graph(_: Any, pool: Any, stream: Any, capture_error_mode: str) -> Iterator[None]:
        found.append(f"capture on {stream.name}, pool {pool}, {capture_error_mode}")
        yield

    current.append(Stream())
    current[0].name = "main"
    for name, fake in (("Stream", Stream), ("CUDAGraph", Graph), ("stream", stream), ("graph", graph)):
        monkeypatch.setattr(torch.cuda, name, fake)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: current[-1])
    return found


def test_ordinary_calls_then_one_capture_then_replays(notes: Notes):
    results = iter(range(10))

    def function() -> int:
        notes.append("call")
        return next(results)

    graphed = Graphed(function, pool="shared")
    assert graphed.stream.priority == MAIN_PRIORITY
    assert [graphed() for _ in range(WARM_UP + 3)] == [*range(WARM_UP), WARM_UP, WARM_UP, WARM_UP]
    begin, end = "side waits for main", "main waits for side"
    assert notes == [
        *[begin, "call", end] * WARM_UP,
        *[begin, "capture on side, pool shared, thread_local", "call", "replay on side", end],
        *[begin, "replay on side", end] * 2,
    ]


def test_on_its_own_stream_nothing_waits(notes: Notes):
    graphed = Graphed(lambda: None, stream=torch.cuda.Stream(), warm_up=0)
    with joined(graphed.stream):
        graphed()
    assert notes == [
        "side waits for main",
        "capture on side, pool None, thread_local",
        "replay on side",
        "main waits for side",
    ]


def test_a_capture_that_fails_leaves_no_graph(notes: Notes):
    faults = iter([ValueError("planted"), None])

    def function() -> str:
        if (fault := next(faults)) is not None:
            raise fault
        return "result"

    graphed = Graphed(function, warm_up=0)
    with pytest.raises(ValueError, match="planted"):
        graphed()
    assert graphed.graph is None
    assert graphed() == "result"


@pytest.mark.gpu
def test_a_replay_reads_what_its_tensors_hold_now():
    """Two graphs in one pool; each overwrites its result."""
    x, count = torch.zeros(3), torch.zeros(())
    pool = torch.cuda.graph_pool_handle()

    def function() -> torch.Tensor:
        count.add_(1)
        return (x + 1) * 2

    graphs = [Graphed(function, pool=pool) for _ in range(2)]
    for value in range(WARM_UP + 3):
        x.fill_(value)
        for graphed in graphs:
            assert graphed().tolist() == [2.0 * (value + 1)] * 3
    assert count == 2 * (WARM_UP + 3)
    assert graphs[0]() is graphs[0]()
