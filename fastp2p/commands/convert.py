"""Upstream's latest_net_G.pth to our netG.safetensors, and back."""

from pathlib import Path

from fastp2p.config import MAX_SIDE, Direction
from fastp2p.errors import InputError
from fastp2p.files import is_there
from fastp2p.models.checkpoint import load_generator, save_generator
from fastp2p.models.pix2pix.convert import read_upstream_generator, write_upstream_generator
from fastp2p.models.pix2pix.generator import UnetGeneratorSpec
from fastp2p.models.pix2pix.networks import Dropout


def convert(
    source: Path,
    target: Path,
    *,
    dropout: Dropout = "upstream",
    direction: Direction = "AtoB",
    crop_size: int | None = None,
) -> UnetGeneratorSpec:
    """Convert a generator; the suffixes say which way: .pth -> .safetensors or .safetensors -> .pth.

    The weights must fit the network exactly, name by name and shape by shape. Depth, widths and norm are read off the
    weights; the other arguments describe what a .pth does not hold.

    Args:
        source, target: the files; target must not exist.
        dropout, direction: of the upstream model (its --no_dropout, --direction).
        crop_size: its --crop_size in px; None is the U-Net's own, 256 for unet_256.

    Returns:
        What the generator is.

    Raises:
        InputError: when the source is no such generator, or the target exists.
    """
    if crop_size is not None and not 11 <= crop_size <= MAX_SIDE:
        raise InputError(f"crop_size: got {crop_size}, expected 11 px, the window of SSIM, to {MAX_SIDE}")
    if is_there(target):
        raise InputError(f"convert: {target} exists; choose another name, or move it away")
    match source.suffix, target.suffix:
        case ".pth", ".safetensors":
            read, made = read_upstream_generator(source, dropout=dropout, direction=direction, crop_size=crop_size)
            save_generator(target, read.state_dict(), made)
            return made
        case ".safetensors", ".pth":
            netG, spec = load_generator(source)
            if not isinstance(spec, UnetGeneratorSpec):
                raise InputError(f"convert: {source} is a generator of {spec.model}; expected one of pix2pix")
            write_upstream_generator(target, netG.state_dict())
            return spec
        case got:
            raise InputError(f"convert: got {got[0]!r} -> {got[1]!r}, expected .pth -> .safetensors or back")
