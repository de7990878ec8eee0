"""How a trained U-Net generator is rebuilt and fed: the metadata of netG.safetensors."""

from dataclasses import dataclass
from typing import ClassVar, get_args

from fastp2p.models.generator_spec import MAX_CHANNELS, GeneratorSpec
from fastp2p.models.pix2pix.networks import MAX_LEVELS, Dropout, UnetGenerator
from fastp2p.nn.norm import Norm


@dataclass(frozen=True, kw_only=True)
class UnetGeneratorSpec(GeneratorSpec):
    """All that is needed to rebuild a U-Net generator and to feed it."""

    model: ClassVar[str] = "pix2pix"
    ranges: ClassVar[dict[str, tuple[int, int]]] = {
        "levels": (2, MAX_LEVELS),
        "ngf": (1, MAX_CHANNELS),
        **GeneratorSpec.ranges,
    }
    choices: ClassVar[dict[str, tuple[str, ...]]] = {
        "norm": get_args(Norm),
        "dropout": get_args(Dropout),
        **GeneratorSpec.choices,
    }

    levels: int
    ngf: int
    norm: Norm = "batch"
    dropout: Dropout = "upstream"

    def build(self) -> UnetGenerator:
        """The generator, with weights yet to be loaded."""
        return UnetGenerator(
            self.input_nc, self.output_nc, levels=self.levels, ngf=self.ngf, norm=self.norm, dropout=self.dropout
        )

    @property
    def channels_at_full_size(self) -> int:
        """Input, output, and the outermost level's maps, which have a quarter of the pixels."""
        return self.input_nc + self.output_nc + self.ngf * 3 // 4
