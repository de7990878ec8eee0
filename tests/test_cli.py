"""The commands as a user types them, with right and wrong input."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from conftest import TINY, random_image

from fastp2p.config import TrainConfig
from fastp2p.networks import UnetGenerator


def test_train_resume_translate_evaluate(fastp2p, aligned: Path, tmp_path: Path):
    done = fastp2p("train", *TINY, "--data", aligned, "--max-steps", 4)
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "runs" / "aligned-001"
    assert f"Results in {folder.relative_to(tmp_path)}: panel.png" in done.stdout
    assert "netG unet_8, ngf 4: " in done.stdout
    assert " MiB: " in done.stdout

    done = fastp2p("train", "--resume", folder, "--max-steps", 8)
    assert done.returncode == 0, done.stderr
    assert json.loads((folder / "config.json").read_text())["max_steps"] == 8

    random_image(51, 33).save(tmp_path / "photo.jpg")
    done = fastp2p("translate", folder / "netG.safetensors", "photo.jpg", "--out", "translated")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "translated" / "photo.png").exists()

    done = fastp2p("evaluate", folder / "netG.safetensors", "--data", aligned, "--split", "val", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["images"] == 2
    assert "PSNR" in fastp2p("evaluate", folder / "netG.safetensors", "--data", aligned).stdout

    assert fastp2p("train", *TINY, "--data", aligned, "--max-steps", 1).returncode == 0
    assert (tmp_path / "runs" / "aligned-002").is_dir()


def test_builtin_set_trains(fastp2p, tmp_path: Path):
    done = fastp2p("train", "--max-steps", 2, "--device", "cpu", "--out", "run")
    assert done.returncode == 0, done.stderr
    assert "train: 600 pairs at 143x143 px" in done.stdout


def test_convert(fastp2p, tmp_path: Path):
    torch.save(UnetGenerator(levels=5, ngf=4).state_dict(), tmp_path / "latest_net_G.pth")
    done = fastp2p("convert", "latest_net_G.pth", "netG.safetensors")
    assert done.stdout == "netG.safetensors: unet_32, ngf 4, norm batch\n", done.stderr
    assert fastp2p("convert", "netG.safetensors", "back.pth").returncode == 0


def test_info_names_the_kernel_of_each_operator(fastp2p):
    done = fastp2p("info")
    assert done.returncode == 0, done.stderr
    assert "augment      reference (PyTorch)" in done.stdout
    assert torch.__version__ in done.stdout


def test_help_gives_every_option_with_its_text(fastp2p):
    done = fastp2p("train", "--help")
    assert done.returncode == 0
    text = " ".join(done.stdout.replace("│", " ").split())
    for field in dataclasses.fields(TrainConfig):
        assert f"--{field.name.replace('_', '-')}" in text, field.name
    assert text.count("Source: ") >= 20
    assert text.count(" px") >= 2


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["train", "--data", "nowhere"], "data: got 'nowhere', which is no folder"),
        (["train", "--resume", "nowhere"], "resume: nowhere is no run folder"),
        (["train", "--crop-size", "16"], "crop_size: got 16, but this discriminator needs at least 24 px"),
        (["train", "--lr", "-1"], "lr: got -1.0, expected more than 0"),
        (["train", "--netG", "resnet"], "netG: got 'resnet', expected unet_S"),
        (["translate", "nothing.safetensors", "x.png", "--out", "o"], "nothing.safetensors: there is no such file"),
        (["evaluate", "nothing.safetensors", "--data", "x"], "nothing.safetensors: there is no such file"),
        (["convert", "a.pth", "b.safetensors"], "a.pth: there is no such file"),
    ],
)
def test_wrong_input_is_told_in_words(fastp2p, tmp_path: Path, args: list[str], message: str):
    done = fastp2p(*args)
    assert done.returncode == 1
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("args", [["train", "--nonsense", "1"], ["train", "--ngf", "many"], ["paint"], []])
def test_wrong_usage_exits_with_2(fastp2p, args: list[str]):
    done = fastp2p(*args)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("content", ["", "{", '{"colour": 3}', "[1]"])
def test_damaged_config_is_told(fastp2p, tmp_path: Path, content: str):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text(content)
    done = fastp2p("train", "--resume", "run")
    assert done.returncode == 1
    assert "config.json: cannot be read as a configuration" in done.stderr


@pytest.mark.slow
def test_facades_at_small_width(fastp2p, facades: Path, tmp_path: Path):
    """The recipe on the flagship set: twenty steps of a quarter-width unet_256, labels to photo."""
    done = fastp2p("train", "--data", facades, "--direction", "BtoA", "--ngf", 16, "--ndf", 16, "--max-steps", 20,
                   "--out", "run", timeout=400)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run" / "panel.png").exists()
