"""Upstream's latest_net_G.pth in and out."""

import re
from pathlib import Path

import torch
from torch import Tensor, nn

from fastp2p.config import Direction
from fastp2p.errors import InputError
from fastp2p.files import write_atomically
from fastp2p.models.checkpoint import StateDict, build_to_fit, fill, serialised
from fastp2p.models.pickled import load_pickled_tensors
from fastp2p.models.pix2pix.generator import UnetGeneratorSpec
from fastp2p.models.pix2pix.networks import Dropout
from fastp2p.nn.norm import Norm


def read_upstream_generator(
    path: Path, *, dropout: Dropout, direction: Direction, crop_size: int | None
) -> tuple[nn.Module, UnetGeneratorSpec]:
    """Read upstream's latest_net_G.pth; depth, widths and norm are read off the weights.

    `module.` (DataParallel) and `_orig_mod.` (torch.compile) are stripped from the names. Files from before 2018 lack
    num_batches_tracked; it is added as 0.

    Raises:
        InputError: when the file is no U-Net generator of upstream's, with what it looks like instead.
    """
    loaded = load_pickled_tensors(path, "upstream's latest_net_G.pth")
    tensors = isinstance(loaded, dict) and all(isinstance(value, Tensor) for value in loaded.values())
    if not tensors or not all(isinstance(name, str) for name in loaded):
        raise InputError(f"{path}: got {type(loaded).__name__}, expected a bare state_dict such as latest_net_G.pth")
    state_dict = {re.sub(r"^((module|_orig_mod)\.)+", "", name): value for name, value in loaded.items()}
    first, last = state_dict.get("model.model.0.weight"), state_dict.get("model.model.3.weight")
    if first is None or last is None or first.ndim != 4 or last.ndim != 4:
        looks_like = {"model.0.weight": "a PatchGAN discriminator", "model.1.weight": "a ResNet generator"}
        kind = next((kind for name, kind in looks_like.items() if name in state_dict), "something else")
        raise InputError(
            f"{path}: looks like {kind}, expected a U-Net generator (upstream's --netG unet_256 or unet_128)"
        )

    levels = max(name.count("model.") for name in state_dict) - 1  # each level nests one Sequential deeper
    has_averages = any("running_mean" in name for name in state_dict)
    has_bias = "model.model.0.bias" in state_dict
    if has_averages and has_bias:  # instance norm of before PyTorch 0.4, whose averages nobody reads
        state_dict = {name: value for name, value in state_dict.items() if not name.endswith(_AVERAGES)}
    norm: Norm = "instance" if has_bias else "batch" if has_averages else "none"
    for name in [name for name in state_dict if name.endswith("running_mean")]:
        state_dict.setdefault(name.replace("running_mean", "num_batches_tracked"), torch.tensor(0))
    try:
        spec = UnetGeneratorSpec(
            levels=levels,
            ngf=first.shape[0],
            input_nc=first.shape[1],
            output_nc=last.shape[1],
            norm=norm,
            dropout=dropout,
            direction=direction,
            crop_size=2**levels if crop_size is None else crop_size,
        )
    except InputError as error:
        raise InputError(f"{path}: is no U-Net generator of upstream's: {error}") from error
    netG = build_to_fit(path, spec, {name: tuple(value.shape) for name, value in state_dict.items()})
    fill(netG, {name: value.clone() for name, value in state_dict.items()}, path)
    return netG, spec


_AVERAGES = ("running_mean", "running_var", "num_batches_tracked")


def write_upstream_generator(path: Path, state_dict: StateDict) -> None:
    """Write a bare state_dict as upstream's latest_net_G.pth, atomically."""
    write_atomically(path, serialised(dict(state_dict)))
