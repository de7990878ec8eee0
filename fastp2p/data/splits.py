"""The splits that a training run needs, loaded, checked and reported."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from tqdm import tqdm

from fastp2p.config import ResolvedConfig
from fastp2p.data.feed import PairDataset, eval_batches, load_split
from fastp2p.data.format import PairFormat
from fastp2p.data.images import bad_file_lines
from fastp2p.data.sources.folders import is_folder, passed_over
from fastp2p.data.sources.pairs import has_split, open_root
from fastp2p.device import memory_bytes
from fastp2p.errors import InputError

PANEL_PAIRS = 8
RESIDENT_SHARE = 0.25  # share of a GPU's memory that the training pairs may take
SMALLEST_SHARE = 1 / 4  # share of crop_size: an image that must grow fourfold has nothing to teach at that size


@dataclass(frozen=True)
class TrainData:
    """The training pairs, the validation pairs (None without a folder val/), and the panel's pairs."""

    train: PairDataset
    val: PairDataset | None
    panel: list[dict[str, Tensor]]  # images A and B, each (1, C, crop_size, crop_size), on the device

    @property
    def fingerprint(self) -> str:
        """Count of the training pairs, a hash of their names, and one of their pictures."""
        names = "\n".join(pair.name for pair in self.train.pairs).encode(errors="surrogateescape")
        pictures = ",".join(map(str, self.train.checksums)).encode()
        of_names, of_pictures = (hashlib.sha256(text).hexdigest()[:16] for text in (names, pictures))
        return f"{len(self.train)} pairs {of_names}, pictures {of_pictures}"


def load_train_data(config: ResolvedConfig, device: torch.device, say: Callable[[str], None]) -> TrainData:
    """Load train/ and val/, and print what they hold.

    Raises:
        InputError: with the list of everything that is wrong.
    """
    min_side = max(1, int(config.crop_size * SMALLEST_SHARE))
    train_format = PairFormat(config.direction, config.load_size, config.input_nc, config.output_nc, min_side)
    val_format = replace(train_format, load_size=config.crop_size)

    room = memory_bytes(torch.device("cpu")) // 2
    loaded: dict[str, PairDataset] = {}
    problems = []
    for split, format in (("train", train_format), ("val", val_format)):
        root = open_root(config.data)
        if split == "train" or has_split(root, split):
            try:
                loaded[split] = _load(config, split, format, room - _resident_bytes(loaded), say)
            except InputError as error:
                problems.append(str(error))
    if problems:
        raise InputError("\n".join(problems))
    train, val = loaded["train"], loaded.get("val")
    if val is None:
        why = "the folder val/ is empty" if is_folder(root / "val") else "there is no folder val/"
        say(f"val: {why}, so nothing is scored and the panel shows training pairs")

    shown = val or replace(train, format=val_format, resident=None)
    indices = [i * len(shown) // PANEL_PAIRS for i in range(PANEL_PAIRS)] if len(shown) > PANEL_PAIRS else None
    panel = list(eval_batches(shown, indices=indices, batch_size=1, device=device))
    if train.resident is not None and device.type == "cuda":
        if train.resident.nbytes <= memory_bytes(device) * RESIDENT_SHARE:
            train.resident = train.resident.to(device)
        else:
            say("train: the pairs stay in the machine's memory, since they would take over a quarter of the GPU's")
    return TrainData(train, val, panel)


def _resident_bytes(datasets: dict[str, PairDataset]) -> int:
    return sum(dataset.resident.nbytes for dataset in datasets.values() if dataset.resident is not None)


def _load(config: ResolvedConfig, split: str, format: PairFormat, room: int, say: Callable[[str], None]) -> PairDataset:
    with tqdm(desc=f"reading {split}", unit=" pairs", leave=False, delay=1) as bar:

        def on_read(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        dataset = load_split(
            config.data,
            split,
            format,
            skip_bad=config.skip_bad,
            stream=config.stream,
            room=room,
            on_read=on_read,
            say=lambda line: say(f"{split}: {line}"),
        )

    place = "streamed: decoded anew in every epoch"
    if dataset.resident is not None:
        place = f"{dataset.resident.nbytes / 1e6:.0f} MB in memory"
    elif config.stream == "auto":
        place += ", since train and val would take more than half of this machine's memory"
    say(f"{split}: {len(dataset)} pairs at {format.load_size}x{format.load_size} px, {place}")
    for note, pairs in dataset.notes.items():
        say(f"{split}: {pairs} pairs {note}")
    if dataset.ignored:
        say(f"{split}: {passed_over(dataset.ignored)}")
    for warning in dataset.warnings:
        say(f"{split}: warning: {warning}")
    for line in bad_file_lines(dataset.skipped):
        say(f"{split}: skipped {line.strip()}")
    return dataset
