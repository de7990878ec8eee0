"""A model is a folder: one that nothing else names is trained, resumed and used through the command line."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import TINY

import fastp2p.models
from fastp2p.cli import main
from fastp2p.errors import InputError
from fastp2p.models import registry
from fastp2p.models.checkpoint import load_checkpoint, load_generator

FILES = {
    "__init__.py": '"""A model of one convolution, to show what a model takes."""\n',
    "networks.py": '''"""Its only network."""

from torch import nn


def build(channels: int) -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, channels, 3, padding=1), nn.ReLU(), nn.Conv2d(channels, 3, 1))
''',
    "options.py": '''"""What a run of it is told."""

from dataclasses import dataclass
from typing import Literal

from fastp2p.config import RunConfig, Settings


@dataclass(frozen=True, kw_only=True)
class DummyOptions(Settings):
    channels: int = 4
    """Channels between the two convolutions. [this test]"""

    def check(self) -> None:
        super().check()
        self.require("channels", lambda value: value >= 1, "1 or more")


@dataclass(frozen=True, kw_only=True)
class DummyConfig(DummyOptions, RunConfig):
    model: Literal["dummy"] = "dummy"
    """What to train. [this test]"""
''',
    "generator.py": '''"""How its network is rebuilt."""

from dataclasses import dataclass

from torch import nn

from fastp2p.models.dummy.networks import build
from fastp2p.models.generator_spec import GeneratorSpec


@dataclass(frozen=True, kw_only=True)
class DummySpec(GeneratorSpec):
    model = "dummy"
    channels: int

    def build(self) -> nn.Module:
        return build(self.channels)

    @property
    def channels_at_full_size(self) -> int:
        return 6 + self.channels
''',
    "model.py": '''"""What training asks of it."""

import torch
from torch.nn.functional import l1_loss

from fastp2p.models.base import Curves, Model
from fastp2p.models.dummy.generator import DummySpec
from fastp2p.models.dummy.networks import build
from fastp2p.models.dummy.options import DummyConfig, DummyOptions
from fastp2p.models.reading import Reading


class Dummy(Model):
    name = "dummy"
    options = DummyOptions
    config = DummyConfig
    generator_spec = DummySpec
    losses = ("loss",)
    scores = ("distance",)

    def nets(self, config):
        return {"net": build(config.channels)}

    def optimizers(self, config, nets):
        return {"optimizer": torch.optim.Adam(nets["net"].parameters(), lr=config.lr)}

    def reference_step(self, config, nets, optimizers, batch):
        optimizers["optimizer"].zero_grad()
        loss = l1_loss(nets["net"](batch["A"]), batch["B"])
        loss.backward()
        optimizers["optimizer"].step()
        return {"loss": loss.detach()}

    @torch.no_grad()
    def panel(self, nets, batch):
        return {"input": batch["A"], "output": nets["net"](batch["A"]).clamp(-1, 1)}

    @torch.no_grad()
    def score(self, nets, batches):
        values = [float(l1_loss(nets["net"](batch["A"]), batch["B"])) for batch in batches]
        return {"distance": sum(values) / len(values)}

    def read(self, losses, config):
        return Reading("the loss is a number", False)

    def status(self, losses):
        return "loss {loss:.2f}".format(**losses)

    def curves(self, config):
        return [Curves("loss", ("loss",))]

    def generators(self, config, nets, step):
        return {"net": (nets["net"], DummySpec(channels=config.channels, crop_size=config.crop_size, step=step))}

    def describe(self, config, nets):
        return [f"net, {config.channels} channels"]

    def summary(self, config):
        return f"{config.channels} channels"


MODEL = Dummy()
''',
}
SIZES = TINY[TINY.index("--load-size") :]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder of models with the dummy in it; afterwards the package knows nothing of it."""
    models = tmp_path / "models"
    (models / "dummy").mkdir(parents=True)
    for name, content in FILES.items():
        (models / "dummy" / name).write_text(content)
    monkeypatch.setenv(registry.VARIABLE, str(models))
    yield models
    fastp2p.models.__path__.remove(str(models))
    for name in [name for name in sys.modules if name.startswith("fastp2p.models.dummy")]:
        del sys.modules[name]
    delattr(fastp2p.models, "dummy")
    monkeypatch.undo()
    assert registry.names() == ["pix2pix"]


@pytest.mark.parametrize("engine", ["layers", "reference"])
def test_a_folder_is_a_model(
    folder: Path, aligned: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], engine: str
):
    """Trained, resumed, evaluated and used; the other commands' words are told, too."""
    assert registry.names() == ["dummy", "pix2pix"]
    run = tmp_path / "run"
    train = ["train", "--model", "dummy", "--data", str(aligned), *SIZES, "--engine", engine, "--out", str(run)]
    assert main([*train, "--max-steps", "3", "--channels", "5", "--log-steps", "1"]) == 0
    printed = capsys.readouterr()
    assert "net, 5 channels" in printed.out + printed.err
    lines = [json.loads(line) for line in (run / "stats.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3]
    assert all(0 < line["val_distance"] < 2 for line in lines if "val_distance" in line)
    for name in ("panel.png", "losses.png", "net_best.safetensors"):
        assert (run / name).is_file(), name

    checkpoint = load_checkpoint(run / "checkpoint.pt")
    assert (checkpoint["model"], checkpoint["options"], checkpoint["step"]) == ("dummy", {"channels": 5}, 3)
    assert main(["train", "--resume", str(run), "--max-steps", "4"]) == 0
    assert load_checkpoint(run / "checkpoint.pt")["step"] == 4
    assert load_generator(run / "net.safetensors")[1].step == 4
    assert main(["train", "--resume", str(run), "--model", "pix2pix"]) == 1
    assert f"model: got pix2pix, but {run} was trained as dummy" in capsys.readouterr().err

    assert main(["translate", str(run / "net.safetensors"), str(aligned / "val"), "--out", str(tmp_path / "out")]) == 0
    assert list((tmp_path / "out").glob("*.png"))
    assert main(["convert", str(run / "net.safetensors"), str(tmp_path / "x.pth")]) == 1
    assert "is a generator of dummy; expected one of pix2pix" in capsys.readouterr().err


def test_help_shows_the_model_s_options(folder: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["train", "--model", "dummy", "--help"]) == 0
    text = capsys.readouterr().out
    assert "Channels between the two convolutions" in " ".join(text.replace("│", " ").split())
    assert "--netG" not in text


def test_what_a_model_lacks_is_told(folder: Path, aligned: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    train = ["train", "--model", "dummy", "--data", str(aligned), *SIZES, "--out", str(tmp_path / "run")]
    assert main([*train, "--max-steps", "3"]) == 1
    assert "engine: dummy has no step on fused operators; use --engine layers" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
    assert main([*train, "--channels", "0"]) == 1
    assert "channels: got 0, expected 1 or more" in capsys.readouterr().err


def test_unknown_models(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(InputError, match="model: got 'cyclegan', expected one of pix2pix"):
        registry.find("cyclegan")
    assert main(["train", "--model", "nothing"]) == 1
    assert "model: got 'nothing', expected one of pix2pix" in capsys.readouterr().err
