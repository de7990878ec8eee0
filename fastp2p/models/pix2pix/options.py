"""What a run of pix2pix is told beside what all runs are: each option with its default, unit and source."""

import math
from dataclasses import dataclass
from typing import Any, Literal

from fastp2p.config import BUILTIN, ResolvedConfig, RunConfig, Settings
from fastp2p.errors import InputError
from fastp2p.models.pix2pix.networks import Dropout, NetD, levels_of
from fastp2p.nn.norm import Norm, Statistics
from fastp2p.ops.objectives import GanMode


@dataclass(frozen=True, kw_only=True)
class Pix2PixOptions(Settings):
    """The networks and the objective."""

    netG: str | None = None
    """Generator: unet_S. None: 256; builtin:emoji 128, on a CPU 32. [paper 6.1.1]"""
    ngf: int | None = None
    """Channels of netG's first layer. None: 64; emoji on a CPU 32. [paper 6.1.1]"""
    netD: NetD = "basic"
    """Discriminator: basic (70x70 PatchGAN), n_layers or pixel. [paper 6.1.2]"""
    ndf: int | None = None
    """Channels of netD's first layer. None: 64; emoji on a CPU 16. [paper 6.1.2]"""
    n_layers_D: int = 3
    """Strided layers of --netD n_layers, 1 to 5. [upstream]"""
    norm: Norm = "batch"
    """Normalisation layer of both networks. [paper 6.1]"""
    statistics: Statistics = "batch"
    """Batch norm's statistics: over the batch, or of each sample. [upstream; sample ours]"""
    dropout: Dropout = "upstream"
    """Where the decoder drops half; paper: one level deeper. [upstream; paper 6.1.1]"""
    init_gain: float = 0.02
    """Standard deviation of the initial weights. [paper 6.2]"""
    gan_mode: GanMode | None = None
    """Adversarial loss. None: vanilla; builtin:emoji on a CPU lsgan. [paper eq. 1; others]"""
    lambda_L1: float = 100.0
    """Weight of the L1 loss. [paper eq. 4]"""

    def check(self) -> None:
        super().check()
        for name in ("ngf", "ndf"):
            self.require(name, lambda value: value >= 1, "1 or more")
            self.require(name, lambda value: value <= 4096, "at most 4096")
        self.require("init_gain", lambda value: value > 0, "more than 0")
        self.require("lambda_L1", lambda value: value >= 0, "0 or more")
        for name in ("init_gain", "lambda_L1"):
            self.require(name, math.isfinite, "a finite number")
        self.require("n_layers_D", lambda value: 1 <= value <= 5, "1 to 5")
        if self.netD != "n_layers" and self.n_layers_D != 3:
            raise InputError(f"n_layers_D: got {self.n_layers_D} with netD {self.netD}; add --netD n_layers")
        if self.statistics == "sample" and self.norm != "batch":
            raise InputError(f"statistics: got sample with norm {self.norm}; it is for norm batch")
        if self.netG is not None:
            levels_of(self.netG)


@dataclass(frozen=True, kw_only=True)
class Pix2PixConfig(Pix2PixOptions, RunConfig):
    """pix2pix, paired image-to-image translation, with the paper's settings.

    Each option names its source. [paper N] is section N of Isola et al. 2017.
    [upstream] is junyanz/pytorch-CycleGAN-and-pix2pix. [ours] is fastp2p.
    """

    model: Literal["pix2pix"] = "pix2pix"
    """What to train. [ours]"""

    def check(self) -> None:
        super().check()
        if self.crop_size is not None:
            smallest = 11 if self.netD == "pixel" else max(11, 3 * 2**self.n_layers_D)  # 11: the window of SSIM
            if self.crop_size < smallest:
                raise InputError(
                    f"crop_size: got {self.crop_size}, expected at least {smallest} px for this netD and SSIM; "
                    "enlarge the crop, or take fewer layers with --netD n_layers --n-layers-D K"
                )

    def defaults(self, device_type: str) -> dict[str, Any]:
        """The paper's settings; for a first look at the built-in set, others."""
        chosen = super().defaults(device_type) | _PAPER
        if self.data == BUILTIN:
            chosen |= _EMOJI | (_EMOJI_CPU if device_type == "cpu" else {})
        return chosen

    @classmethod
    def resolved(cls) -> "type[ResolvedPix2Pix]":
        return ResolvedPix2Pix


@dataclass(frozen=True, kw_only=True)
class ResolvedPix2Pix(ResolvedConfig, Pix2PixConfig):
    """A Pix2PixConfig in which everything is decided."""

    netG: str
    ngf: int
    ndf: int
    gan_mode: GanMode


_PAPER = {"netG": "unet_256", "ngf": 64, "ndf": 64, "gan_mode": "vanilla"}
_EMOJI = {"load_size": 143, "crop_size": 128, "netG": "unet_128", "n_epochs": 20, "n_epochs_decay": 20}
_EMOJI_CPU = {"netG": "unet_32", "ngf": 32, "ndf": 16, "gan_mode": "lsgan", "n_epochs": 2, "n_epochs_decay": 8}
