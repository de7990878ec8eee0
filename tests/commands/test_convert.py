"""Upstream's checkpoint files, both ways."""

from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from fastp2p.commands.convert import convert
from fastp2p.commands.evaluate import evaluate
from fastp2p.commands.translate import translate
from fastp2p.errors import InputError, WriteError
from fastp2p.models.checkpoint import load_generator
from fastp2p.models.generate import generate
from fastp2p.models.pix2pix.networks import PatchDiscriminator, UnetGenerator


@pytest.mark.parametrize("norm", ["batch", "instance", "none"])
@pytest.mark.parametrize("levels", [5, 8])
def test_there_and_back(tmp_path: Path, norm: str, levels: int):
    netG = UnetGenerator(1, 2, levels=levels, ngf=4, norm=norm)
    torch.save(netG.state_dict(), tmp_path / "latest_net_G.pth")
    spec = convert(tmp_path / "latest_net_G.pth", tmp_path / "g.safetensors", direction="BtoA")
    assert (spec.levels, spec.ngf, spec.input_nc, spec.output_nc, spec.norm) == (levels, 4, 1, 2, norm)
    loaded, read = load_generator(tmp_path / "g.safetensors")
    assert read.direction == "BtoA"
    x = torch.randn(1, 1, 32, 32)
    assert torch.equal(generate(loaded, x), generate(netG, x))

    convert(tmp_path / "g.safetensors", tmp_path / "back.pth")
    back = torch.load(tmp_path / "back.pth", weights_only=True)
    assert list(back) == list(netG.state_dict())
    assert all(torch.equal(back[name], value) for name, value in netG.state_dict().items())


def test_official_weights(golden: Path, tmp_path: Path):
    """The official implementation's own state_dict, under its own names."""
    trace = np.load(golden)
    keys = [key for key in trace.files if key.startswith("final/G/")]
    torch.save({key.removeprefix("final/G/"): torch.from_numpy(trace[key]).float() for key in keys}, tmp_path / "u.pth")
    spec = convert(tmp_path / "u.pth", tmp_path / "g.safetensors")
    assert (spec.levels, spec.ngf, spec.norm) == (8, 8, "batch")


def test_data_parallel_compiled_and_old_files(tmp_path: Path):
    netG = UnetGenerator(levels=5, ngf=4)
    old = {name: value for name, value in netG.state_dict().items() if "num_batches_tracked" not in name}
    for prefix in ("module.", "_orig_mod.", "module._orig_mod."):
        path = tmp_path / f"{prefix}pth.pth"
        torch.save(OrderedDict((prefix + name, value) for name, value in old.items()), path)
        convert(path, tmp_path / f"{prefix}safetensors")
        loaded, _ = load_generator(tmp_path / f"{prefix}safetensors")
        assert all(torch.equal(loaded.state_dict()[name], value) for name, value in old.items())


def test_instance_norm_of_before_pytorch_0_4(tmp_path: Path):
    """Its files hold averages that nobody reads; the convolutions' biases tell it from batch norm."""
    netG = UnetGenerator(levels=5, ngf=4, norm="instance")
    old = dict(netG.state_dict())
    for name, module in netG.named_modules():
        if isinstance(module, nn.InstanceNorm2d):
            old |= {f"{name}.running_mean": torch.randn(module.num_features)}
            old |= {f"{name}.running_var": torch.rand(module.num_features)}
    torch.save(old, tmp_path / "old.pth")
    assert convert(tmp_path / "old.pth", tmp_path / "g.safetensors").norm == "instance"
    x = torch.randn(1, 3, 32, 32)
    assert torch.equal(generate(load_generator(tmp_path / "g.safetensors")[0], x), generate(netG, x))


def test_channels_that_no_image_has(tmp_path: Path, aligned: Path):
    """They are converted, for use in Python; as images they would be written as transparency, or not at all."""
    for number, (input_nc, output_nc, name) in enumerate([(3, 2, "output"), (3, 4, "output"), (4, 3, "input")]):
        model = tmp_path / f"{number}.safetensors"
        torch.save(UnetGenerator(input_nc, output_nc, levels=5, ngf=4).state_dict(), tmp_path / f"{number}.pth")
        convert(tmp_path / f"{number}.pth", model)
        why = f"its {name} has [24] channels, which no image file means; expected 3"
        with pytest.raises(InputError, match=why):
            translate(model, [aligned / "val" / "0.png"], tmp_path / "out")
        with pytest.raises(InputError, match=why):
            evaluate(model, str(aligned))
        assert not (tmp_path / "out").exists()


def test_strict(tmp_path: Path):
    state_dict = UnetGenerator(levels=5, ngf=4).state_dict()
    torch.save({**state_dict, "model.extra": torch.zeros(1)}, tmp_path / "extra.pth")
    with pytest.raises(InputError, match=r"(?s)do not fit.*model\.extra"):
        convert(tmp_path / "extra.pth", tmp_path / "g.safetensors")
    del state_dict["model.model.1.model.1.weight"]
    torch.save(state_dict, tmp_path / "missing.pth")
    with pytest.raises(InputError, match="do not fit"):
        convert(tmp_path / "missing.pth", tmp_path / "g.safetensors")
    assert not (tmp_path / "g.safetensors").exists()


def test_other_things_are_told_apart(tmp_path: Path):
    target = tmp_path / "g.safetensors"
    torch.save(PatchDiscriminator(ndf=4).state_dict(), tmp_path / "latest_net_D.pth")
    with pytest.raises(InputError, match="looks like a PatchGAN discriminator"):
        convert(tmp_path / "latest_net_D.pth", target)
    torch.save({"model.1.weight": torch.zeros(1)}, tmp_path / "resnet.pth")
    with pytest.raises(InputError, match="looks like a ResNet generator"):
        convert(tmp_path / "resnet.pth", target)
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(InputError, match="got list, expected a bare state_dict"):
        convert(tmp_path / "list.pth", target)
    with pytest.raises(InputError, match="no such file"):
        convert(tmp_path / "nothing.pth", target)
    with pytest.raises(InputError, match=r"got '\.pth' -> '\.onnx'"):
        convert(tmp_path / "list.pth", tmp_path / "x.onnx")


def test_weights_that_are_no_numbers_are_refused(tmp_path: Path):
    state_dict = UnetGenerator(levels=5, ngf=4).state_dict()
    state_dict["model.model.0.weight"][0, 0, 0, 0] = torch.nan
    torch.save(state_dict, tmp_path / "nan.pth")
    with pytest.raises(InputError, match=r"model\.model\.0\.weight holds NaN or infinity"):
        convert(tmp_path / "nan.pth", tmp_path / "g.safetensors")
    torch.save(UnetGenerator(levels=5, ngf=4).state_dict(), tmp_path / "u.pth")
    with pytest.raises(WriteError, match=r"g\.safetensors cannot be written: No such file or directory"):
        convert(tmp_path / "u.pth", tmp_path / "nowhere" / "g.safetensors")


def test_nothing_is_overwritten(tmp_path: Path):
    torch.save(UnetGenerator(levels=5, ngf=4).state_dict(), tmp_path / "u.pth")
    (tmp_path / "g.safetensors").write_text("precious")
    with pytest.raises(InputError, match="exists"):
        convert(tmp_path / "u.pth", tmp_path / "g.safetensors")
    assert (tmp_path / "g.safetensors").read_text() == "precious"
