"""docs/scaling.md says what is counted: every row of its tables, to the digits that it gives."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from fastp2p.count import H200, count_step, step_floor
from fastp2p.count.cost import StepFloor
from fastp2p.count.memory import estimate_memory
from fastp2p.models.pix2pix.options import Pix2PixConfig
from fastp2p.models.pix2pix.step import FusedStep
from fastp2p.nn.init import count_parameters
from fastp2p.train.state import TrainState

PAGE = Path(__file__).resolve().parents[2] / "docs" / "scaling.md"
NVLINK = 450e9  # bytes/s each way, of an H200, nominally
GPUS = 8


def rows(title: str) -> Iterator[list[float]]:
    """The numbers of each row of the table under a heading."""
    section = PAGE.read_text().split(f"\n## {title}\n")[1].split("\n## ")[0]
    for line in section.splitlines():
        if re.match(r"\| \d", line):
            yield [float(cell.strip(" *x")) for cell in line.strip("|").split("|")]


def prose() -> str:
    return " ".join(PAGE.read_text().split())


def step_of(netG: str = "unet_256", crop_size: int = 256, width: int = 64) -> FusedStep:
    config = Pix2PixConfig(data="pairs", netG=netG, crop_size=crop_size, load_size=crop_size, ngf=width, ndf=width)
    resolved = config.resolve("cuda", "bf16")
    with torch.device("meta"):
        return TrainState.new(resolved, torch.device("meta"), "").engine_step(resolved)


def floor_of(step: FusedStep, images: int) -> StepFloor:
    return step_floor(count_step(step, images), H200)


def gflop(step: FusedStep) -> float:
    return sum(cost.flop for cost in count_step(step, 1)) / 1e9


def mib(step: FusedStep, images: int) -> float:
    return estimate_memory(step, images).total / 2**20


def assert_row(given: list[float], counted: list[float]) -> None:
    """Equal to the digits that are given: half a unit of the last one, of numbers that are sums of rounded ones one."""
    assert len(given) == len(counted)
    for one, other in zip(given, counted, strict=True):
        digits = len(f"{one:g}".partition(".")[2])
        assert one == pytest.approx(other, abs=0.6 * 10**-digits)


def test_with_the_batch():
    step = step_of()
    table = [*rows("With the batch")]
    assert len(table) == 4
    for row in table:
        n = int(row[0])
        floor = floor_of(step, n)
        seconds = (floor.arithmetic, floor.maps, floor.weights, floor.adam, floor.overlapped, floor.in_turn)
        assert_row(row, [n, *(1e3 * s for s in seconds), n / floor.overlapped, mib(step, n)])


def test_with_the_image():
    table = [*rows("With the image")]
    assert len(table) == 4
    for row in table:
        side = int(row[0])
        step = step_of(netG="unet_128" if side == 128 else "unet_256", crop_size=side)
        one, sixteen = (floor_of(step, n).overlapped for n in (1, 16))
        assert_row(row, [side, gflop(step), 1e3 * one, 1e3 * sixteen, 16 / sixteen, mib(step, 16)])


def test_with_the_width():
    table = [*rows("With the width")]
    assert len(table) == 4
    for row in table:
        step = step_of(width=int(row[0]))
        parameters = sum(map(count_parameters, step.nets)) / 1e6
        one, sixteen = (1e3 * floor_of(step, n).overlapped for n in (1, 16))
        assert_row(row, [row[0], parameters, gflop(step), one, sixteen, mib(step, 16)])


def test_figures_in_the_text():
    """Those that no table has: calls, memory, the parts of other steps."""
    step, text = step_of(), prose()
    assert f"The step is {len(count_step(step, 1))} calls" in text
    assert f"{mib(step, 1) - (mib(step, 2) - mib(step, 1)):.0f} MiB for the parameters and Adam" in text
    assert f"{mib(step, 2) - mib(step, 1):.0f} for each image" in text
    large = floor_of(step_of(crop_size=512), 1)
    assert f"{1e3 * large.arithmetic:.3f} of {1e3 * large.overlapped:.3f} ms" in text
    n_bytes = 4 * sum(map(count_parameters, step.nets))
    assert f"{n_bytes / 4e6:.1f} million gradients are {n_bytes / 1e6:.0f} MB" in text


def test_on_eight_gpus():
    alone = step_of()
    config = Pix2PixConfig(data="pairs").resolve("cuda", "bf16")
    with torch.device("meta"):
        state = TrainState.new(config, torch.device("meta"), "")
        nets = (*state.nets.values(), *state.optimizers.values())
        shared = FusedStep(*nets, size=(256, 256), dtype=torch.bfloat16, reduce=lambda grad: None)
    n_bytes = 4 * sum(map(count_parameters, alone.nets))
    exchange = 2 * (GPUS - 1) / GPUS * n_bytes / NVLINK
    one, eight = floor_of(alone, 1), floor_of(shared, 1)
    passes = f"{1e3 * eight.adam:.3f} ms instead of {1e3 * one.adam:.3f}, and {1e3 * eight.weights:.3f} instead of"
    assert f"{passes} {1e3 * one.weights:.3f} for reading weights" in prose()
    table = [*rows("On eight GPUs")]
    assert len(table) == 5
    for row in table:
        n = int(row[0])
        one, eighth = floor_of(alone, n).in_turn, floor_of(shared, n // GPUS).in_turn
        both = eighth + exchange
        assert_row(row, [n, 1e3 * one, 1e3 * eighth, 1e3 * exchange, 1e3 * both, one / both])
