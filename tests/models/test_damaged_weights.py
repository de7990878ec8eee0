"""Weights that no generator computes with are refused, from upstream's files and from ours."""

from pathlib import Path

import pytest
import safetensors.torch
import torch

from fastp2p.commands.convert import convert
from fastp2p.errors import InputError
from fastp2p.models.checkpoint import load_generator, save_generator
from fastp2p.models.pix2pix.generator import UnetGeneratorSpec
from fastp2p.models.pix2pix.networks import UnetGenerator


def read_as_pth(state_dict: dict[str, torch.Tensor], folder: Path) -> UnetGenerator:
    """The network that `convert` makes from upstream's file with these weights."""
    folder.mkdir(exist_ok=True)
    torch.save(state_dict, folder / "read.pth")
    (folder / "converted.safetensors").unlink(missing_ok=True)
    convert(folder / "read.pth", folder / "converted.safetensors")
    return load_generator(folder / "converted.safetensors")[0]


def read_as_safetensors(state_dict: dict[str, torch.Tensor], folder: Path) -> UnetGenerator:
    """The network of a file with these weights and without a checksum."""
    folder.mkdir(exist_ok=True)
    save_generator(
        folder / "own.safetensors", UnetGenerator(levels=4, ngf=4).state_dict(), UnetGeneratorSpec(levels=4, ngf=4)
    )
    with safetensors.safe_open(folder / "own.safetensors", "pt") as file:
        described = file.metadata()["fastp2p"]
    safetensors.torch.save_file(state_dict, folder / "read.safetensors", {"fastp2p": described})
    return load_generator(folder / "read.safetensors", say=lambda line: None)[0]


def test_a_generator_of_no_numbers_is_refused(tmp_path: Path):
    state_dict = {
        name: value.float() * torch.nan for name, value in UnetGenerator(levels=4, ngf=4).state_dict().items()
    }
    save_generator(tmp_path / "g.safetensors", state_dict, UnetGeneratorSpec(levels=4, ngf=4))
    with pytest.raises(InputError, match="holds NaN or infinity"):
        load_generator(tmp_path / "g.safetensors")


@pytest.mark.parametrize(
    ("weight", "value"),
    [
        ("model.model.0.weight", torch.tensor(1e300, dtype=torch.float64)),
        ("model.model.1.model.2.num_batches_tracked", torch.tensor(torch.nan)),
    ],
)
def test_weights_that_the_cast_would_change_are_refused(tmp_path: Path, weight: str, value: torch.Tensor):
    """A float64 beyond float32's range became infinity, and NaN a whole number."""
    state_dict = UnetGenerator(levels=4, ngf=4).state_dict()
    state_dict[weight] = value.expand(state_dict[weight].shape).clone()
    with pytest.raises(InputError, match=rf"{weight} holds NaN or infinity, or more than torch\.\w+ can hold"):
        read_as_pth(state_dict, tmp_path)
    with pytest.raises(InputError, match=rf"{weight} holds NaN or infinity, or more than torch\.\w+ can hold"):
        read_as_safetensors(state_dict, tmp_path)


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2]
)
def test_weights_of_other_floats_are_read(tmp_path: Path, dtype: torch.dtype):
    """PyTorch has no isfinite for float8."""
    weights = {
        name: value.to(dtype) if value.is_floating_point() else value
        for name, value in UnetGenerator(levels=4, ngf=4).state_dict().items()
    }
    for read in (read_as_pth, read_as_safetensors):
        for name, value in read(weights, tmp_path / read.__name__).state_dict().items():
            assert torch.equal(value, weights[name].to(value.dtype))


@pytest.mark.parametrize(
    "dtype", [torch.int8, torch.uint8, torch.int64, torch.bool, torch.complex64, torch.float4_e2m1fn_x2]
)
def test_weights_of_other_types_are_refused(tmp_path: Path, dtype: torch.dtype):
    """Integers are quantised weights without their scale; of float4 safetensors counts numbers, and PyTorch bytes."""
    weights = UnetGenerator(levels=4, ngf=4).state_dict()
    name = "model.model.1.model.2.weight"
    weights[name] = weights[name].to(torch.uint8).view(dtype) if dtype.itemsize == 1 else weights[name].to(dtype)
    for read in (read_as_pth, read_as_safetensors):
        with pytest.raises(InputError, match=rf"{name} is ({dtype}, expected torch\.float32|\(16,\), expected)"):
            read(weights, tmp_path / read.__name__)


def test_a_negative_variance_is_refused(tmp_path: Path):
    """Its square root made images of NaN."""
    weights = UnetGenerator(levels=4, ngf=4).state_dict()
    name = next(name for name in weights if name.endswith("running_var"))
    weights[name][0] = -1.0
    for read in (read_as_pth, read_as_safetensors):
        with pytest.raises(
            InputError, match=rf"{name} holds -1, expected variances of 0 or more; .* take another copy"
        ):
            read(weights, tmp_path / read.__name__)
