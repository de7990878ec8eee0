"""Which stream the kernels of the main chain are on, and which the work beside it."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fastp2p.engine import GraphedStep
from fastp2p.engine.branch import Branch


def test_the_main_chain_comes_before_the_branch(monkeypatch: pytest.MonkeyPatch):
    """A lower number is a higher priority. A captured kernel keeps that of its stream."""

    class Stream:
        def __init__(self, device: Any, priority: int = 0) -> None:
            self.priority = priority

    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
    step: Any = SimpleNamespace(device=torch.device("cuda"))
    main, beside = GraphedStep(step).stream, Branch(torch.device("cuda")).stream
    assert beside is not None
    assert main.priority < beside.priority
