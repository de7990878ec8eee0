"""Small sets of pairs made on the spot, tiny training runs, and the real data beside the checkout when it is there."""

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import on_device
from PIL import Image

from fastp2p.ops import kernel_choices
from fastp2p.ops.extension import WHY_ABSENT

TESTS = Path(__file__).resolve().parent
SHARED = Path(__file__).resolve().parents[2] / "shared"

# The smallest run that does everything: 6 pairs of 32 px, a 3-level U-Net, 3 steps an epoch.
TINY = ["--netG", "unet_8", "--ngf", "4", "--netD", "pixel", "--ndf", "4", "--load-size", "36", "--crop-size", "32"]
TINY += ["--batch-size", "2", "--n-epochs", "3", "--n-epochs-decay", "3", "--device", "cpu"]


def pytest_addoption(parser: pytest.Parser) -> None:
    on_device.add_option(parser)


def pytest_configure(config: pytest.Config) -> None:
    """No test, and no process that one starts, reads or writes the user's measured choices of kernels."""
    on_device.check_options(config)
    cache = tempfile.TemporaryDirectory(prefix="fastp2p-tests-")
    config.add_cleanup(cache.cleanup)
    os.environ["FASTP2P_CACHE"] = cache.name


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    on_device.select(config, items)


@pytest.fixture(autouse=True)
def _device(request: pytest.FixtureRequest) -> Iterator[None]:
    """The device of --device, for the folders of tests that run on either."""
    if request.config.getoption("device") == "cuda" and on_device.runs_on_gpu(request.path):
        yield from on_device.run_on_gpu()
    else:
        yield


@pytest.fixture
def cpp_serves(_device: None) -> None:
    """For what holds of the C++ kernels alone: the test's tensors must be on the CPU, and C++ must serve it."""
    if WHY_ABSENT is not None or torch.get_default_device().type != "cpu":
        pytest.skip("C++ does not serve the tests' device here")


@pytest.fixture(autouse=True, scope="module")
def _one_thread(request: pytest.FixtureRequest) -> Iterator[None]:
    """Folders of small tensors: threads would only wait for each other."""
    n_threads = torch.get_num_threads()
    if request.path.relative_to(TESTS).parts[0] in ("nn", "engine"):
        torch.set_num_threads(1)
    yield
    torch.set_num_threads(n_threads)


@pytest.fixture
def own_cache(tmp_path: Path) -> Iterator[None]:
    """Measured choices of kernels of the test's own: none at first."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FASTP2P_CACHE", str(tmp_path / "cache"))
        kernel_choices.forget()
        yield
    kernel_choices.forget()


def _shared(*parts: str) -> Path:
    path = SHARED.joinpath(*parts)
    if not path.exists():
        pytest.skip(f"needs ../shared/{'/'.join(parts)}, which is not part of the repository")
    return path


@pytest.fixture
def facades() -> Path:
    return _shared("data", "facades")


@pytest.fixture
def camvid() -> Path:
    return _shared("data", "camvid")


@pytest.fixture
def golden() -> Path:
    return _shared("golden", "upstream_unet256_batch2_float64.npz")


def random_image(width: int, height: int, seed: int = 0) -> Image.Image:
    """Coloured noise, smooth enough that lossy formats keep it recognisable."""
    small = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


@pytest.fixture
def aligned(tmp_path: Path) -> Path:
    """A folder with 6 + 2 aligned pairs of 40 px in train/ and val/."""
    root = tmp_path / "aligned"
    for split, count in (("train", 6), ("val", 2)):
        (root / split).mkdir(parents=True)
        for i in range(count):
            random_image(80, 40, seed=i).save(root / split / f"{i}.png")
    return root


@pytest.fixture
def two_folders(tmp_path: Path) -> Path:
    """A folder with 4 pairs in train/A (JPEG) and train/B (PNG)."""
    root = tmp_path / "two_folders"
    for side in "AB":
        (root / "train" / side).mkdir(parents=True)
    for i in range(4):
        random_image(40, 40, seed=i).save(root / "train" / "A" / f"{i}.jpg")
        random_image(40, 40, seed=10 + i).save(root / "train" / "B" / f"{i}.png")
    return root


@pytest.fixture
def fastp2p(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run the command line in a process of its own, in an empty folder, as a user does."""

    def run(*args: object, timeout: float = 120) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "fastp2p", *map(str, args)]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=timeout)

    return run
