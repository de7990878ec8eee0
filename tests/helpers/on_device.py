"""Tests of operators run on either device: pytest --device cpu (plain or interpreted kernels) or --device cuda."""

import fcntl
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from fastp2p import ops
from fastp2p.ops.library import INTERPRETED

TESTS = Path(__file__).resolve().parents[1]
FOLDERS = ("ops", "nn", "engine", "tuner/test_contest.py")  # and files, that --device moves to the GPU


def add_option(parser: pytest.Parser) -> None:
    """--device, and --shard, by which benchmarks/gpu_tests.py shares out the compiling of kernels."""
    group = parser.getgroup("fastp2p")
    folders = ", ".join(f"tests/{folder}" for folder in FOLDERS)
    group.addoption("--device", choices=["cpu", "cuda"], default="cpu", help=f"the default device of {folders}")
    group.addoption("--shard", default="1/1", metavar="I/N", help="run every N-th test, from the I-th")


def runs_on_gpu(path: Path) -> bool:
    """Whether --device moves the tests of this file to the GPU."""
    return any(path.is_relative_to(TESTS / folder) for folder in FOLDERS)


def check_options(config: pytest.Config) -> None:
    """Raise pytest.UsageError for a device that is not there: nobody who asks for a GPU wants a green run without."""
    if config.getoption("device") != "cuda":
        return
    if INTERPRETED:
        raise pytest.UsageError("--device cuda: TRITON_INTERPRET=1 takes the kernels to the CPU; unset it")
    if not torch.cuda.is_available():
        reason = "this PyTorch is a CPU build" if torch.version.cuda is None else "PyTorch finds no usable GPU"
        raise pytest.UsageError(f"--device cuda: {reason}")


def select(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Skip what cannot run here, with the reason, and deselect what is another shard's."""
    on_gpu = config.getoption("device") == "cuda"
    lacking = {} if on_gpu else {"gpu": "needs a CUDA GPU"}
    if torch.cuda.is_available() and not on_gpu:
        lacking["gpu"] = "needs --device cuda"
    if not _served_by_triton(config.getoption("device")):
        lacking["kernels"] = "needs TRITON_INTERPRET=1 or a GPU" + " of compute capability 8.0" * on_gpu
    for item in items:
        for marker, reason in lacking.items():
            if item.get_closest_marker(marker):
                item.add_marker(pytest.mark.skip(reason=reason))
    first, every = (int(number) for number in config.getoption("shard").split("/"))
    config.hook.pytest_deselected(items=[item for i, item in enumerate(items) if i % every != first - 1])
    items[:] = items[first - 1 :: every]


def run_on_gpu() -> Iterator[None]:
    """A fixture's body: tensors on the GPU by default, float32 in full and the same bits each time, until it ends."""
    switches = [(torch.backends.cudnn, "allow_tf32", False), (torch.backends.cuda.matmul, "allow_tf32", False)]
    switches.append((torch.backends.cudnn, "deterministic", True))
    before = [getattr(owner, name) for owner, name, _ in switches]
    torch.set_default_device("cuda")
    torch.ones(())  # PyTorch lists its factory functions at the first use: before a test replaces torch.empty
    for owner, name, value in switches:
        setattr(owner, name, value)
    try:
        yield
        torch.cuda.synchronize()  # a kernel's fault belongs to the test that launched it
    except torch.AcceleratorError as error:
        pytest.exit(f"the GPU is lost to this process after a kernel's fault: {error}", returncode=3)
    finally:
        torch.set_default_device(None)
        for (owner, name, _), value in zip(switches, before, strict=True):
            setattr(owner, name, value)


@contextmanager
def one_process_at_a_time() -> Iterator[None]:
    """Wait until no other process of this checkout's tests is in here, and keep the others out."""
    descriptor = os.open(Path(__file__).parent, os.O_RDONLY)  # locks the folder itself and leaves no file behind
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def kernels_serve() -> bool:
    """Whether operators reach Triton's kernels: on a GPU that has bfloat16, and interpreted on the CPU."""
    return _served_by_triton(torch.get_default_device().type)


def _served_by_triton(device_type: str) -> bool:
    return ops.served_by("conv", device_type).startswith("Triton")


def rng_state() -> torch.Tensor:
    """The state of the default device's own generator."""
    return torch.get_rng_state() if torch.get_default_device().type == "cpu" else torch.cuda.get_rng_state()


def with_threads(function: Callable[[], Any]) -> list[Any]:
    """What a function gives with 1, 2 and 3 threads."""
    n_threads, results = torch.get_num_threads(), []
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            results.append(function())
    finally:
        torch.set_num_threads(n_threads)
    return results


def generator(seed: int) -> torch.Generator:
    """A seeded generator on the default device."""
    return torch.Generator(torch.get_default_device()).manual_seed(seed)
