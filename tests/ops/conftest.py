"""Operators are tested as they are, with TRITON_INTERPRET=1, where Triton's kernels serve the CPU, and on a GPU."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from fastp2p import ops


def pytest_report_header(config: pytest.Config) -> list[str]:
    device = config.getoption("device")
    return [f"operator {name}: {ops.served_by(name, device)} on {device}" for name in ops.operators()]


@pytest.fixture(autouse=True)
def _poisoned_empty(_device: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Fresh memory holds NaN (or an integer's largest value): an element that a kernel forgets shows.

    Python's torch.empty is replaced; what C++ asks for, PyTorch fills by itself in its deterministic mode.
    """
    with torch.device("meta"):
        torch.empty(())  # PyTorch lists its factory functions at the first use: it must find its own
    for name in ("empty", "empty_like"):
        monkeypatch.setattr(torch, name, _poisoned(getattr(torch, name)))
    if torch.get_default_device().type != "cpu":
        yield
        return
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(False)


def _poisoned(make: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    @torch.no_grad()  # inductor makes leaves that require gradients
    def poisoned(*args: Any, **kwargs: Any) -> torch.Tensor:
        tensor = make(*args, **kwargs)
        if tensor.device.type == "meta":
            return tensor
        if tensor.dtype == torch.bool:
            return tensor.fill_(True)
        return tensor.fill_(torch.nan if tensor.is_floating_point() else torch.iinfo(tensor.dtype).max)

    return poisoned
