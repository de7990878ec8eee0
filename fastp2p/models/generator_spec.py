"""What a generator's file tells of it, whatever its model."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, get_args

from torch import nn

from fastp2p.config import MAX_SIDE, Direction
from fastp2p.errors import InputError
from fastp2p.models.generate import NormStats

MAX_CHANNELS = 4096  # an image's or a first layer's; a small file that claims more is damaged


@dataclass(frozen=True, kw_only=True)
class GeneratorSpec(ABC):
    """What netG.safetensors tells of any model's generator; each model's own class adds how to rebuild it."""

    model: ClassVar[str]  # whose generator it is
    ranges: ClassVar[dict[str, tuple[int, int]]] = {
        "input_nc": (1, MAX_CHANNELS),
        "output_nc": (1, MAX_CHANNELS),
        "crop_size": (1, MAX_SIDE),
        "step": (0, 2**53),
    }
    choices: ClassVar[dict[str, tuple[str, ...]]] = {
        "norm_stats": get_args(NormStats),
        "direction": get_args(Direction),
    }

    input_nc: int = 3
    output_nc: int = 3
    norm_stats: NormStats = "image"  # what batch norm is to normalise with when images are generated
    direction: Direction = "AtoB"
    crop_size: int = 256  # px, in training; images are resized to it for evaluation
    data: str = ""  # where the training pairs came from
    step: int = 0  # training steps taken

    def __post_init__(self) -> None:
        for name, (least, most) in self.ranges.items():
            value = getattr(self, name)
            if type(value) is not int or not least <= value <= most:
                raise InputError(f"{name}: got {value!r:.60}, expected a whole number from {least} to {most}")
        for name, choices in self.choices.items():
            if getattr(self, name) not in choices:
                got = f"{getattr(self, name)!r:.60}"
                raise InputError(f"{name}: got {got}, expected one of {', '.join(choices)}")
        if not isinstance(self.data, str):
            raise InputError(f"data: got {self.data!r:.60}, expected a text")

    @abstractmethod
    def build(self) -> nn.Module:
        """The generator, with weights yet to be loaded."""

    @property
    @abstractmethod
    def channels_at_full_size(self) -> int:
        """How many maps of the image's own size the generator holds at once, at least."""
