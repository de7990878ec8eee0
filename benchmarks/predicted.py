"""Predicted times of products beside those that a GPU took: how far `fastp2p launches --predict` is to be trusted.

    python benchmarks/predicted.py [FOLDER ...] [--fit]    # folders in benchmarks/results; needs no GPU

Of each problem without statistics that the tuner measured there it takes the tiles whose whole call is one launch. It
prints the quotients predicted by measured, 1 where both agree: their number, and quartiles, by kernel, by batch size
and for all.

`--fit` changes the fitted constants of fastp2p/count/predict.py, one at a time, as long as the mean distance of the
quotients' logarithms from 0 falls, and prints them. The files' kernels are older than today's. In a convolution their
loops over a sum are the same, and what else a launch did is the same where it has no statistics. Weight gradients have
another loop since 2026-11-28, so they are left out.
"""

import argparse
import json
import math
import re
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from fastp2p.config import RunConfig
from fastp2p.count import predict
from fastp2p.count.ceilings import Ceilings
from fastp2p.count.launches import MAIN, Launch, told_by
from fastp2p.kernels import ahead, launches
from fastp2p.models.pix2pix.options import Pix2PixConfig
from fastp2p.ops import library
from fastp2p.ops.kernel_choices import Problem
from fastp2p.train.state import TrainState
from fastp2p.tuner.operations import Noise, Operation, operations

RESULTS = Path(__file__).parent / "results"
FOLDERS = ("nvidia-h200-2026-11-27", "nvidia-h100-2026-11-26")
BATCH_SIZES = (1, 4, 16, 64)
FITTED = ("LATENCY", "LOADED_PER_SEC", "ADAM_PER_SEC", "ADAM_LATENCY", "GATHER_CYCLES")
FIT_ON = ("nvidia-h200-2026-11-27", (1, 16))  # the rest is for the check
TILE = re.compile(r"(\d+)x(\d+)x(\d+)-split1-warps(\d+)-stages(\d+)")
SIZES = ("BLOCK_M", "BLOCK_N", "BLOCK_K", "num_warps", "num_stages")


@dataclass(frozen=True)
class Sample:
    """One product that a GPU has computed by one tile."""

    folder: str
    batch_size: int
    ceilings: Ceilings
    launch: Launch
    seconds: float  # measured

    @property
    def quotient(self) -> float:
        """Predicted by measured."""
        return predict.predict(self.launch, self.ceilings).total / self.seconds


def paper_operations(batch_size: int) -> list[Operation]:
    """The paper's step's convolutions in bfloat16, of each problem the first."""
    config: RunConfig = Pix2PixConfig(netG="unet_256", ngf=64, ndf=64, crop_size=256, batch_size=batch_size)
    resolved = config.resolve("cuda", "bf16")
    meta = torch.device("meta")
    with meta:
        return operations(TrainState.new(resolved, meta, fingerprint="").engine_step(resolved), batch_size)


def noted(operation: Operation, config: dict[str, int], noise: Noise) -> list[Any]:
    """The kernel launches of an operation by a tile."""
    found: list[Any] = []
    args = operation.operands(noise)
    with launches.noting(ahead.H100, found.append):
        library.launch(operation.operator, config, args)
    return found


def samples(folders: list[str]) -> Iterator[Sample]:
    """What these folders measured of today's problems."""
    tables = {folder: json.loads((RESULTS / folder / "kernels.json").read_text())["measured"] for folder in folders}
    measured = {
        folder: {Problem.parse(key): one["ms"] for key, one in table["choices"].items()}
        for folder, table in tables.items()
    }
    cards = {folder: next(c for n, c in predict.GPUS.items() if n.lower() in folder) for folder in folders}
    noise = Noise(torch.device("meta"))
    for batch_size in BATCH_SIZES:
        for operation in paper_operations(batch_size):
            if operation.gate:  # the sums that it leaves today were a pass of their own
                operation = replace(operation, stat_groups=0)
            if operation.stat_groups or operation.operator == "conv_wgrad_adam":
                continue
            names = {name for table in measured.values() for name in table.get(operation.problem, {})}
            for name in sorted(names):
                tile = TILE.fullmatch(name)
                if tile is None:  # a split sum, or ATen's
                    continue
                config = dict(zip(SIZES, map(int, tile.groups()), strict=True)) | {"maxnreg": 255, "SPLIT": 1}
                found = noted(operation, config, noise)
                if len(found) != 1:
                    continue
                about = {"part": "", "name": operation.name, "operator": operation.operator, "flop": 0}
                launch = Launch(
                    kernel=found[0].name, chain=MAIN, depth=1, after=(), **about, **told_by(found[0])
                )  # fmt: skip
                for folder, table in measured.items():
                    ms = table.get(operation.problem, {}).get(name)
                    if ms is not None:
                        yield Sample(folder, batch_size, cards[folder], launch, ms / 1e3)


def line(label: str, found: list[Sample]) -> str:
    """The number and the quartiles of the quotients."""
    first, median, third = statistics.quantiles([sample.quotient for sample in found], n=4)
    return f"{label:<44}{len(found):6}{first:9.2f}{median:9.2f}{third:9.2f}"


def show(found: list[Sample]) -> None:
    """Print the table of each folder."""
    keys: list[Callable[[Sample], str]] = [
        lambda sample: f"{sample.launch.kernel}{', by elements' * sample.launch.gathers}",
        lambda sample: f"batch size {sample.batch_size}",
        lambda sample: "all",
    ]
    for folder in dict.fromkeys(sample.folder for sample in found):
        print(f"{folder + ': predicted by measured':<44}{'n':>6}{'quartile':>9}{'median':>9}{'quartile':>9}")
        for key in keys:
            groups: dict[str, list[Sample]] = {}
            for sample in found:
                if sample.folder == folder:
                    groups.setdefault(key(sample), []).append(sample)
            for label, some in groups.items():
                print(line(label, some))
        print()


def distance(found: list[Sample]) -> float:
    """Mean distance of the quotients' logarithms from 0."""
    return statistics.fmean(abs(math.log(sample.quotient)) for sample in found)


def fit(found: list[Sample]) -> None:
    """Set the constants to where no step up or down brings the prediction nearer."""
    step = 1.3
    least = distance(found)
    while step > 1.01:
        before = least
        for name in FITTED:
            for factor in (step, 1 / step):
                value = getattr(predict, name)
                setattr(predict, name, value * factor)
                if (now := distance(found)) < least:
                    least = now
                else:
                    setattr(predict, name, value)
        if least == before:
            step **= 0.5


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="*", default=FOLDERS, help="of benchmarks/results")
    parser.add_argument("--fit", action="store_true", help=f"fit to {FIT_ON[0]}, batch sizes {FIT_ON[1]}")
    options = parser.parse_args()
    all_samples = list(samples(list(options.folders)))
    if options.fit:
        fit([s for s in all_samples if s.folder == FIT_ON[0] and s.batch_size in FIT_ON[1]])
        print(*(f"{name} = {getattr(predict, name):.3g}" for name in FITTED), sep="\n")
        print()
    show(all_samples)
