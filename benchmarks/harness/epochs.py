"""Batches of real images as each provider reads them, epoch after epoch, without end; whole batches alone."""

import ctypes
import itertools
import os
import random
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from fastp2p.data import PairFormat, load_split, train_crops
from fastp2p.data.images import read_image
from fastp2p.data.sources.pairs import find_pairs, open_root
from fastp2p.device import best_precision
from fastp2p.models.pix2pix.losses import Losses
from fastp2p.models.pix2pix.options import Pix2PixConfig
from fastp2p.train.state import TrainState
from harness.providers import Provider, Scale

PAIRS = 400  # an epoch, as facades has
PR_SET_PDEATHSIG = 1  # see prctl(2)
WORKERS = 4  # upstream's --num_threads


class AlignedImages(Dataset[tuple[Tensor, Tensor]]):
    """Pairs side by side in a file, decoded, resized, cropped and mirrored at each reading, as upstream does."""

    def __init__(self, folder: Path, scale: Scale, direction: str):
        self.files = sorted(p for p in folder.iterdir() if p.is_file())
        self.size, self.load_size, self.direction = scale.size, scale.load_size, direction

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        image = Image.open(self.files[index]).convert("RGB")
        middle, height = image.width // 2, image.height
        left, top = (random.randint(0, self.load_size - self.size) for _ in range(2))
        mirrored, sides = random.random() < 0.5, []
        for box in ((0, 0, middle, height), (middle, 0, 2 * middle, height)):
            side = image.crop(box).resize((self.load_size, self.load_size), Image.Resampling.BICUBIC)
            side = side.crop((left, top, left + self.size, top + self.size))
            if mirrored:
                side = side.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
            sides.append(torch.from_numpy(np.array(side)).permute(2, 0, 1).float() / 127.5 - 1)
        return (sides[0], sides[1]) if self.direction == "AtoB" else (sides[1], sides[0])


def eager_batches(
    provider: Provider, scale: Scale, device: torch.device, batch: int, data: Path, direction: str
) -> Iterator[tuple[Tensor, Tensor]]:
    """As upstream's loader gives them; with every trick its processes live on and its memory is pinned."""
    tricks = provider.channels_last
    images = AlignedImages(data / "train", scale, direction)
    check_count(len(images), batch)
    loader = DataLoader(
        images, batch, shuffle=True, drop_last=True, persistent_workers=tricks,
        num_workers=os.cpu_count() or 1 if tricks else WORKERS, worker_init_fn=die_with_parent,
        pin_memory=tricks and device.type == "cuda",
    )  # fmt: skip
    layout = torch.channels_last if tricks else torch.contiguous_format
    for batch_of_pairs in itertools.chain.from_iterable(itertools.repeat(loader)):
        yield tuple(x.to(device, non_blocking=tricks, memory_format=layout) for x in batch_of_pairs)


def fused_steps(
    provider: Provider, scale: Scale, device: torch.device, batch: int, data: Path, direction: str
) -> Iterator[Losses[Tensor]]:
    """The trainer's own way: pairs in memory as uint8, cut on the device, one step for each batch."""
    config = Pix2PixConfig(
        data=str(data), direction=direction, batch_size=batch, precision=provider.precision, engine=provider.engine,
        **scale.options,
    ).resolve(device.type, best_precision(device))  # fmt: skip
    dataset = load_split(str(data), "train", PairFormat(config.direction, config.load_size), stream="never")
    check_count(len(dataset), batch)
    assert dataset.resident is not None
    dataset.resident = dataset.resident.to(device)
    step = TrainState.new(config, device, "").training_step(config)
    for epoch in itertools.count(1):
        for crops in train_crops(dataset, seed=0, epoch=epoch, batch_size=batch, crop_size=config.crop_size, flip=True):
            if len(crops) == batch:
                yield Losses(**step(crops))


def die_with_parent(_: object = None) -> None:
    """Where Linux can: a process that stands still between its turns would not see that who began it has ended."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def check_count(pairs: int, batch: int) -> None:
    """Raise where there is no whole batch."""
    if pairs < batch:
        raise ValueError(f"the data has {pairs} pairs, too few for a batch of {batch}")


def write_builtin_pairs(folder: Path, side: int = 256) -> None:
    """As many of the built-in set's training pairs as an epoch of facades has, JPEG files with A|B side by side."""
    folder.mkdir()
    pairs, _, _ = find_pairs(open_root("builtin:emoji"), "train")
    for pair in pairs[:PAIRS]:
        both = Image.new("RGB", (2 * side, side))
        for i, image in enumerate((pair.A, pair.B)):
            both.paste(read_image(image, 3)[0].resize((side, side), Image.Resampling.BICUBIC), (side * i, 0))
        both.save(folder / f"{Path(pair.name).stem}.jpg", quality=95)
