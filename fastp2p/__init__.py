"""fastp2p: fast and trustworthy training of pix2pix, paired image-to-image translation with a conditional GAN."""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("fastp2p")
except PackageNotFoundError as error:
    raise ImportError("this checkout of fastp2p is not installed; in its folder run: pip install -e .") from error

from fastp2p import nn
from fastp2p.models.gan_losses import GANLoss
from fastp2p.models.generate import generate
from fastp2p.models.pix2pix.networks import PatchDiscriminator, PixelDiscriminator, UnetGenerator
from fastp2p.models.pix2pix.options import Pix2PixConfig
from fastp2p.nn import fuse, unfuse
from fastp2p.nn.init import init_weights

__all__ = [
    "GANLoss",
    "PatchDiscriminator",
    "Pix2PixConfig",
    "PixelDiscriminator",
    "UnetGenerator",
    "__version__",
    "fuse",
    "generate",
    "init_weights",
    "nn",
    "unfuse",
]
