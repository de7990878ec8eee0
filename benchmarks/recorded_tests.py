"""A pytest plugin: the GPU's tests on a CPU, for the Triton programs that they launch and not for their results.

    python -O -m pytest --assert plain -p recorded_tests --record FILE --device cuda tests/ops tests/nn tests/engine

Tensors stay on the CPU. Each operator notes the programs that it would take on an H100, and gives its reference's
values. Nothing is asserted (python -O), so most tests run on to their end; what comes of one that needs more of a GPU
is of no interest. The programs go to FILE, one a line in JSON.
"""

import contextlib
import functools
import importlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from fastp2p.files import write_atomically
from fastp2p.kernels import ahead
from fastp2p.ops import library

PROGRAMS = pytest.StashKey[dict[ahead.Program, None]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--record", type=Path, required=True, metavar="FILE", help="where to write the programs")


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    from helpers import on_device  # it lies in tests/, which pytest has put on the path by now

    on_device.check_options = lambda config: None
    on_device._served_by_triton = lambda device_type: True
    on_device.run_on_gpu = run_on_cpu
    for name in library.operators():
        reference = library._references[name]
        kernels = importlib.import_module(f"fastp2p.kernels.{library.file_of(name)}")
        setattr(kernels, name, with_values(getattr(kernels, name), reference))
        library.LIBRARY.impl(name, served(name, reference), "CPU", allow_override=True)
    torch.testing.assert_close = lambda *args, **kwargs: None
    stack = contextlib.ExitStack()
    programs = stack.enter_context(ahead.recording(ahead.H100))

    config.stash[PROGRAMS] = programs
    config.add_cleanup(stack.close)


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """Only what was recorded of all tests counts, whether they passed or failed."""
    if exitstatus in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):
        lines = (f"{json.dumps(program)}\n" for program in session.config.stash[PROGRAMS])
        write_atomically(session.config.getoption("record"), "".join(lines).encode())


def run_on_cpu() -> Iterator[None]:
    """Instead of on_device.run_on_gpu, with its switches as far as they choose programs."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before


def with_values(launcher: Callable[..., Any], reference: Callable[..., Any]) -> Callable[..., Any]:
    """A launcher, and then the values that it would have made."""

    @functools.wraps(launcher)
    def launch(*args: Any, **config: Any) -> Any:
        launcher(*args, **config)
        return reference(*args)

    return launch


def served(name: str, reference: Callable[..., Any]) -> Callable[..., Any]:
    """An operator's kernel, as `serve_by_triton` chooses it."""

    def serve(*args: Any) -> Any:
        return reference(*args) if args[0].dtype == torch.float64 else library.launch(name, None, args)

    return serve
