"""The commands as a user types them, with right and wrong input."""

import json
import re
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import TINY, random_image

from fastp2p import ops
from fastp2p.cli import main
from fastp2p.commands.info import version_of
from fastp2p.models.pix2pix.networks import UnetGenerator
from fastp2p.ops.extension import describe_extension


@pytest.fixture
def here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str]]:
    """Run the command line in this process, in an empty folder, for its status and stderr.

    What a command refuses takes no time, and a process of its own takes two seconds to start.
    """
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["fastp2p"])

    def run(*args: str) -> tuple[int, str]:
        return main(args), capsys.readouterr().err

    return run


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
    assert done.stdout == "netG.safetensors: unet_32, ngf 4, norm batch, dropout upstream, AtoB, 32 px\n", done.stderr
    assert fastp2p("convert", "netG.safetensors", "back.pth").returncode == 0


def test_info_names_the_kernel_of_each_operator(fastp2p):
    done = fastp2p("info")
    assert done.returncode == 0, done.stderr
    (device,) = re.findall(r"^operator +served on (\w+) by$", done.stdout, re.MULTILINE)
    for operator in ops.operators():
        assert f"\n{operator:<19}{ops.served_by(operator, device)}\n" in done.stdout
    assert f"\nC++ kernels  {describe_extension()}\n" in done.stdout
    assert f"\ntorch        {torch.__version__}\n" in done.stdout


def test_info_gives_the_build_of_pytorch(monkeypatch: pytest.MonkeyPatch):
    """PyPI's package is 2.11.0 by its metadata, and calls itself 2.11.0+cu130."""
    monkeypatch.setattr(torch, "__version__", "2.11.0+planted")
    assert version_of("torch") == "2.11.0+planted"


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["train", "--data", "nowhere"], "data: got 'nowhere', which is no folder"),
        (["train", "--resume", "nowhere"], "resume: nowhere is no run folder"),
        (["train", "--crop-size", "16"], "crop_size: got 16, expected at least 24 px"),
        (["train", "--lr", "-1"], "lr: got -1.0, expected more than 0"),
        (["train", "--netG", "resnet"], "netG: got 'resnet', expected unet_S"),
        (["translate", "nothing.safetensors", "x.png", "--out", "o"], "nothing.safetensors: there is no such file"),
        (["evaluate", "nothing.safetensors", "--data", "x"], "nothing.safetensors: there is no such file"),
        (["convert", "a.pth", "b.safetensors"], "a.pth: there is no such file"),
        (["train", "--resume", 300 * "x"], "x/config.json: cannot be read: File name too long"),
        (["train", "--data", 300 * "x"], "File name too long"),
        (["translate", "nothing.safetensors", 300 * "x", "--out", "o"], "nothing.safetensors: there is no such file"),
    ],
)
def test_wrong_input_is_told_in_words(here, tmp_path: Path, args: list[str], message: str):
    status, errors = here(*args)
    assert status == 1
    assert message in errors
    assert "Traceback" not in errors
    assert not (tmp_path / "runs").exists()


def test_a_process_tells_wrong_input_and_exits_with_1(fastp2p):
    done = fastp2p("train", "--lr", "-1")
    assert done.returncode == 1
    assert done.stderr.startswith("fastp2p: lr: got -1.0, expected more than 0")
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("args", [["train", "--nonsense", "1"], ["train", "--ngf", "many"], ["paint"], []])
def test_wrong_usage_exits_with_2(here, args: list[str]):
    status, errors = here(*args)
    assert status == 2
    assert "Traceback" not in errors


def test_a_process_of_wrong_usage_exits_with_2(fastp2p):
    done = fastp2p("train", "--nonsense", "1")
    assert done.returncode == 2
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("content", ["", "{", '{"colour": 3}', "[1]"])
def test_damaged_config_is_told(here, tmp_path: Path, content: str):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text(content)
    status, errors = here("train", "--resume", "run")
    assert status == 1
    assert "config.json: cannot be read as a configuration" in errors


@pytest.mark.slow
def test_facades_at_small_width(fastp2p, facades: Path, tmp_path: Path):
    """The recipe on the flagship set, labels to photo, with a quarter-width unet_256: every command in turn."""
    train = ("train", "--data", facades, "--direction", "BtoA", "--ngf", 16, "--ndf", 16, "--out", "run")
    from PIL import Image

    (tmp_path / "photos").mkdir()
    for size, file in (((301, 217), "140.png"), ((97, 400), "262.png")):
        labels = Image.open(next((facades / "val").glob(f"*{file}"), sorted((facades / "val").iterdir())[0]))
        labels.resize(size).save(tmp_path / "photos" / file)
    for command in (
        (*train, "--max-steps", 20),
        ("train", "--resume", "run", "--max-steps", 25),
        ("translate", "run/netG.safetensors", "photos", "--out", "out"),
        ("evaluate", "run/netG.safetensors", "--data", facades, "--split", "val"),
    ):
        done = fastp2p(*command, timeout=400)
        assert done.returncode == 0, done.stderr
    assert "68 images" in done.stdout
    assert Image.open(tmp_path / "out" / "140.png").size == (301, 217)


@pytest.mark.slow
def test_camvid_from_its_two_folders(fastp2p, camvid: Path, tmp_path: Path):
    done = fastp2p("train", "--data", camvid, "--ngf", 8, "--ndf", 8, "--max-steps", 10, "--out", "run", timeout=400)
    assert done.returncode == 0, done.stderr
    assert "train: 367 pairs converted: B palette" in done.stdout


def test_printed_commands_can_be_pasted(fastp2p, aligned: Path, tmp_path: Path):
    folder = tmp_path / "my photos' run"
    done = fastp2p("train", *TINY, "--data", aligned, "--out", folder, "--max-minutes", "1e-9")
    assert done.returncode == 0, done.stderr
    stopped, _, use, curves = (line.partition(": ")[2] for line in done.stdout.splitlines()[-4:])
    go_on, use, curves = map(shlex.split, (stopped, use, curves))
    assert go_on == ["fastp2p", "train", "--resume", str(folder)]
    assert use[:3] == ["fastp2p", "translate", str(folder / "netG.safetensors")]
    assert curves == ["tensorboard", "--logdir", str(folder)]
