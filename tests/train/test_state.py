"""What a checkpoint remembers of the pictures that it was trained on."""

from dataclasses import replace
from pathlib import Path

import pytest
from conftest import TINY, random_image

from fastp2p.cli import parse
from fastp2p.errors import InputError
from fastp2p.models.checkpoint import load_checkpoint, save_checkpoint
from fastp2p.train.loop import train
from fastp2p.train.run_folder import read_config


@pytest.fixture
def run(aligned: Path, tmp_path: Path) -> Path:
    """A run of one step."""
    args = ["train", *TINY, "--data", str(aligned), "--out", str(tmp_path / "run"), "--max-steps", "1"]
    return train(parse(args).config)


def resume(run: Path) -> list[str]:
    said: list[str] = []
    train(replace(read_config(run), max_steps=2), resume=True, say=said.append)
    return said


def test_a_changed_picture_is_warned_of(run: Path, aligned: Path):
    random_image(80, 40, seed=99).save(aligned / "train" / "3.png")
    assert any(line.startswith("warning: data: pictures changed since") for line in resume(run))


def test_the_same_pictures_are_not_warned_of(run: Path):
    assert not any("warning: data" in line for line in resume(run))


def test_a_checkpoint_of_an_older_version_resumes(run: Path, aligned: Path):
    """It has a fingerprint of the names alone."""
    saved = load_checkpoint(run / "checkpoint.pt")
    saved["fingerprint"] = saved["fingerprint"].partition(",")[0]
    save_checkpoint(run / "checkpoint.pt", saved)
    assert not any("warning: data" in line for line in resume(run))


def test_other_names_are_refused(run: Path, aligned: Path):
    (aligned / "train" / "3.png").rename(aligned / "train" / "7.png")
    with pytest.raises(InputError, match=r"data: got 6 pairs \w+, but .*\.pt was trained on 6 pairs \w+ \(count"):
        resume(run)
