"""What a call of an operator must read, write and multiply, told from its operands' shapes."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

Kind = Literal["maps", "weights", "adam", "vectors"]
Named = Mapping[str, Any]  # a call's arguments by the names in its schema, each tensor as an Operand


class Operand(NamedTuple):
    """A tensor without its values."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int  # in its storage, in elements
    dtype: torch.dtype

    @classmethod
    def of(cls, tensor: Tensor) -> "Operand":
        return cls(tuple(tensor.shape), tensor.stride(), int(tensor.storage_offset()), tensor.dtype)

    @property
    def elements(self) -> int:
        return math.prod(self.shape)

    @property
    def n_bytes(self) -> int:
        return self.elements * self.dtype.itemsize

    @property
    def pixels(self) -> int:
        """Those of all images of (N, C, H, W)."""
        return self.shape[0] * self.shape[2] * self.shape[3]


@dataclass(frozen=True)
class Traffic:
    """Bytes that are read and written, each tensor once a call, and those that are updated twice."""

    maps: int = 0  # images, activations and their gradients
    weights: int = 0  # the convolutions', as they are multiplied
    adam: int = 0  # float32 weights, moments and gradients, and writing the compute weights
    vectors: int = 0  # values per channel, and single ones: biases, statistics, losses, learning rates

    @property
    def total(self) -> int:
        return self.maps + self.weights + self.adam + self.vectors

    def __add__(self, other: "Traffic") -> "Traffic":
        return Traffic(*(a + b for a, b in zip(vars(self).values(), vars(other).values(), strict=True)))


@dataclass(frozen=True)
class Work:
    """How an operator's bytes and FLOPs are counted.

    An argument is read once. One that the schema marks as changed is read and written, unless it is in `overwritten`.
    A result is written once.
    """

    maps: tuple[str, ...] = ()  # arguments by their names; tensors that are in none of the three are vectors
    weights: tuple[str, ...] = ()
    adam: tuple[str, ...] = ()
    results: tuple[Kind, ...] = ()  # the kind of each
    overwritten: tuple[str, ...] = ()  # arguments that are written and not read
    samples: Mapping[str, Callable[[tuple[Operand, ...]], int]] | None = None  # bytes read of what is read in part
    flop: Callable[[Named, tuple[Operand, ...]], int] | None = None  # two for each multiply-accumulate

    def traffic(self, args: Named, results: tuple[Operand, ...], changed: frozenset[str]) -> Traffic:
        """Count a call's bytes.

        Args:
            args, results: the call's.
            changed: names of the arguments that the operator changes in place.
        """
        n_bytes: dict[str, int] = dict.fromkeys(("maps", "weights", "adam", "vectors"), 0)
        for name, operand in args.items():
            if not isinstance(operand, Operand):
                continue
            if self.samples is not None and name in self.samples:
                n_bytes[self._kind(name)] += self.samples[name](results)
                continue
            twice = name in changed and name not in self.overwritten
            n_bytes[self._kind(name)] += operand.n_bytes * (1 + twice)
        for kind, result in zip(self.results, results, strict=True):
            n_bytes[kind] += result.n_bytes
        return Traffic(**n_bytes)

    def _kind(self, name: str) -> Kind:
        if name in self.maps:
            return "maps"
        if name in self.weights:
            return "weights"
        return "adam" if name in self.adam else "vectors"
