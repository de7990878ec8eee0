"""What a run says of its data before it trains."""

from pathlib import Path

import numpy as np
import torch
from conftest import TINY, random_image
from PIL import Image

from fastp2p.cli import parse
from fastp2p.data.splits import TrainData, load_train_data


def load(data: Path, *options: str) -> tuple[TrainData, list[str]]:
    config = parse(["train", *TINY, "--data", str(data), *options]).config
    said: list[str] = []
    return load_train_data(config.resolve("cpu", "fp32"), torch.device("cpu"), said.append), said


def test_an_empty_val_is_as_good_as_none(two_folders: Path):
    (two_folders / "val").mkdir()
    data, said = load(two_folders)
    assert data.val is None
    assert "val: the folder val/ is empty, so nothing is scored and the panel shows training pairs" in said
    (two_folders / "val").rmdir()
    assert (
        "val: there is no folder val/, so nothing is scored and the panel shows training pairs" in load(two_folders)[1]
    )


def test_what_is_odd_is_said(aligned: Path):
    for i in range(30):
        (aligned / "train" / f"empty {i}.png").touch()
    (aligned / "val" / "city").mkdir()
    for file in (aligned / "val").glob("*.png"):
        Image.fromarray(np.asarray(Image.open(file)) // 16).save(file)
    said = load(aligned, "--skip-bad")[1]
    assert sum(line.startswith("train: skipped empty") or "zero bytes" in line for line in said) == 10
    assert "train: skipped and 20 more of the same kind" in said
    assert any(line.startswith("val: passed over 1 entry") and line.endswith("val/city/ (0 images)") for line in said)
    warnings = [line for line in said if "warning" in line]
    assert len(warnings) == 2
    assert all(f"val: warning: the pictures of {side}" in line for side, line in zip("AB", warnings, strict=True))


def test_a_pair_that_vanishes_while_streaming_is_said(aligned: Path):
    data, said = load(aligned, "--skip-bad", "--stream", "always")
    (aligned / "train" / "0.png").unlink()
    data.train.assemble([0, 1], data.train.read([0, 1]), replace=True)
    assert said[-1] == "train: skipped train/0.png: cannot be read: No such file or directory"


def test_the_panel_of_a_streamed_set_without_val(two_folders: Path):
    random_image(40, 40).save(two_folders / "train" / "A" / "9.png")
    data, _ = load(two_folders, "--skip-bad", "--stream", "always")
    assert len(data.panel) == 4
