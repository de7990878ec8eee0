"""What the engine knows to compute: one call in a forward, of a module or of a function, as an operation."""

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn

import torch
import torch.nn.functional as F
from torch import nn

from fastp2p.conv_shape import Size, conv_size, conv_transpose_size
from fastp2p.engine.supported import LEAVES, NORMS, refuse
from fastp2p.nn.block import Convolution
from fastp2p.ops.activation import ACTIVATIONS

NONE, RELU, LEAKY_RELU, TANH = range(len(ACTIVATIONS))
_CODES: dict[Any, int] = {
    **{nn.ReLU: RELU, nn.LeakyReLU: LEAKY_RELU, nn.Tanh: TANH},
    **{F.relu: RELU, torch.relu: RELU, F.leaky_relu: LEAKY_RELU, torch.tanh: TANH},
}


@dataclass(eq=False)
class Operation:
    """One call in a forward, of a leaf module or of a function, and the shape of its result."""

    kind: str  # input, conv, norm, activation, dropout, add, cat, pad, pool, upsample
    name: str  # for errors: what is called, and where
    inputs: tuple["Operation", ...]
    channels: int
    size: Size
    module: nn.Module | None = None
    settings: tuple[Any, ...] = ()  # activation: (code, slope); dropout: (p,); pad, pool, upsample: their function's
    in_place: bool = False
    readers: list["Operation"] = field(default_factory=list)  # one entry for each time that its result is read
    overwritten_by: "Operation | None" = None  # in place, so that whoever reads later reads that one's result

    def __post_init__(self) -> None:
        if self.kind != "conv" and min(self.size) < 1:  # the plan tells of a convolution's
            self.refuse(f"leaves {self.size} of an image")

    def refuse(self, why: str) -> NoReturn:
        """Raise InputError, naming the operation."""
        refuse(self.name, why)


def of_module(name: str, module: nn.Module, x: Operation) -> Operation:
    """The operation of a leaf module's call; x itself where the module passes it on."""
    if type(module) not in LEAVES:
        refuse(name, f"is not among {', '.join(kind.__name__ for kind in LEAVES)}")
    if isinstance(module, nn.Identity):
        return x
    if isinstance(module, Convolution):
        if x.channels != module.in_channels:
            refuse(name, f"is called with {x.channels} channels")
        return Operation("conv", name, (x,), module.out_channels, _size_after(module, x.size), module)
    if isinstance(module, NORMS):
        if x.channels != module.num_features:
            refuse(name, f"is called with {x.channels} channels")
        return Operation("norm", name, (x,), x.channels, x.size, module)
    if isinstance(module, nn.Dropout):
        if not module.p:
            return x
        return Operation("dropout", name, (x,), x.channels, x.size, module, (module.p,), module.inplace)
    if isinstance(module, nn.ReflectionPad2d):
        return _pad(name, x, tuple(module.padding))
    if isinstance(module, nn.AvgPool2d):
        window = (module.kernel_size, module.stride, module.padding)
        return _pool(name, x, *window, module.ceil_mode, module.count_include_pad, module.divisor_override)
    if isinstance(module, nn.Upsample):
        return _upsample(name, x, module.size, module.scale_factor, module.mode, module.align_corners)
    settings = (_CODES[type(module)], float(getattr(module, "negative_slope", 0.0)))
    in_place = bool(getattr(module, "inplace", False))
    return Operation("activation", name, (x,), x.channels, x.size, module, settings, in_place)


def of_function(name: str, function: Any, *args: Any, **kwargs: Any) -> Operation:
    """The operation of a function's call, whose tensors are operations; one of them where the function passes it on."""
    make = _FUNCTIONS.get(function)
    if make is None:
        refuse(f"{name},", "which the engine does not compute")
    return make(name, *args, **kwargs)


def _image(name: str, x: Any) -> Operation:
    if not isinstance(x, Operation):
        refuse(name, f"with {x!r:.60}; expected a tensor that the network computed")
    return x


def _add(name: str, x: Any, other: Any, *, alpha: Any = 1, in_place: bool = False) -> Operation:
    inputs = tuple(value for value in (x, other) if isinstance(value, Operation))
    if len(inputs) != 2 or alpha != 1 or (inputs[0].channels, inputs[0].size) != (inputs[1].channels, inputs[1].size):
        refuse(name, "with something else than two tensors of one shape")
    return Operation("add", name, inputs, inputs[0].channels, inputs[0].size, in_place=in_place)


def _cat(name: str, tensors: Any, dim: int = 0) -> Operation:
    inputs = tuple(value for value in tensors if isinstance(value, Operation))
    if len(inputs) != len(tensors) or dim not in (1, -3) or len({x.size for x in inputs}) != 1:
        refuse(name, "along another dimension than the channels, or of tensors of several sizes")
    return Operation("cat", name, inputs, sum(x.channels for x in inputs), inputs[0].size)


def _activation(code: int) -> Callable[..., Operation]:
    def make(name: str, x: Any, negative_slope: float = 0.01, inplace: bool = False) -> Operation:
        source = _image(name, x)
        settings = (code, float(negative_slope) if code == LEAKY_RELU else 0.0)
        if not 0 <= settings[1] < float("inf"):
            refuse(name, f"with a slope of {negative_slope}; expected 0 or more")
        return Operation("activation", name, (source,), source.channels, source.size, None, settings, bool(inplace))

    return make if code == LEAKY_RELU else lambda name, x, inplace=False: make(name, x, 0.0, inplace)


def _pad_function(name: str, x: Any, pad: Any, mode: str = "constant", value: Any = None) -> Operation:
    source = _image(name, x)
    if mode != "reflect" or value is not None or len(pad) != 4:
        refuse(name, f"with mode {mode!r} and padding {pad}; expected reflect and (left, right, top, bottom)")
    return _pad(name, source, tuple(pad))


def _pad(name: str, x: Operation, padding: tuple[int, ...]) -> Operation:
    _check_whole(name, padding)
    left, right, top, bottom = padding
    height, width = x.size
    if not (0 <= max(left, right) < width and 0 <= max(top, bottom) < height) or min(padding) < 0:
        refuse(name, f"of an image of {x.size}; expected padding from 0 to less than the sides")
    return Operation("pad", name, (x,), x.channels, (height + top + bottom, width + left + right), None, padding)


def _pool_function(
    name: str, x: Any, kernel_size: Any, stride: Any = None, padding: Any = 0, ceil_mode: bool = False,
    count_include_pad: bool = True, divisor_override: int | None = None,
) -> Operation:  # fmt: skip
    source = _image(name, x)
    return _pool(name, source, kernel_size, stride, padding, ceil_mode, count_include_pad, divisor_override)


def _pool(
    name: str, x: Operation, kernel_size: Any, stride: Any, padding: Any, ceil_mode: bool, counts: bool, divisor: Any
) -> Operation:
    window = (kernel_size, kernel_size if stride is None else stride, padding)
    kernel, stride, padding = (_pair(value) for value in window)
    _check_whole(name, (*kernel, *stride, *padding))
    if ceil_mode or divisor is not None:
        refuse(name, "with ceil_mode or divisor_override; expected neither")
    if min(*kernel, *stride) < 1 or any(not 0 <= p <= k // 2 for p, k in zip(padding, kernel, strict=True)):
        refuse(
            name, f"with {window}; expected a kernel and a stride of 1 or more, and padding of half a kernel at most"
        )
    size = _pair([(n + 2 * p - k) // s + 1 for n, k, s, p in zip(x.size, kernel, stride, padding, strict=True)])
    return Operation("pool", name, (x,), x.channels, size, None, (kernel, stride, padding, bool(counts)))


def _upsample_function(
    name: str, x: Any, size: Any = None, scale_factor: Any = None, mode: str = "nearest", align_corners: Any = None,
    recompute_scale_factor: bool | None = None, antialias: bool = False,
) -> Operation:  # fmt: skip
    source = _image(name, x)
    if antialias:
        refuse(name, "with antialias; expected none")
    return _upsample(name, source, size, scale_factor, mode, align_corners)


def _upsample(name: str, x: Operation, size: Any, scale_factor: Any, mode: str, align_corners: Any) -> Operation:
    if (size is None) == (scale_factor is None):
        refuse(name, f"with size {size} and scale_factor {scale_factor}; expected one of them")
    factors = _pair(1 if scale_factor is None else scale_factor)
    if mode != "nearest" or align_corners is not None or any(factor != int(factor) for factor in factors):
        refuse(name, f"with mode {mode!r} and scale_factor {scale_factor}; expected nearest and a whole number")
    new = _pair(size) if size is not None else _pair([int(n * f) for n, f in zip(x.size, factors, strict=True)])
    _check_whole(name, new)
    return Operation("upsample", name, (x,), x.channels, new, None, new)


def _getitem(name: str, x: Any, key: Any) -> Operation:
    """A slice that takes everything, as a network's crop where its sides fit."""
    source = _image(name, x)
    first, *slices = key if isinstance(key, tuple) else (key,)
    whole = first is ... and len(slices) <= 2 and all(isinstance(part, slice) for part in slices)
    ends = zip(slices, source.size[len(source.size) - len(slices) :] if whole else (), strict=False)
    if not whole or any(
        s.start not in (None, 0) or s.step not in (None, 1) or s.stop not in (None, n) for s, n in ends
    ):
        refuse(name, f"with {key}; expected what takes the whole image")
    return source


def _check_whole(name: str, numbers: Sequence[Any]) -> None:
    """Raise InputError unless these are whole numbers: PyTorch takes no others."""
    if any(type(number) is not int for number in numbers):
        refuse(name, f"with {tuple(numbers)}; expected whole numbers")


def _pair(value: Any) -> Size:
    height, width = value if isinstance(value, list | tuple) else (value, value)
    return height, width


_FUNCTIONS: dict[Any, Callable[..., Operation]] = {
    operator.add: _add,
    operator.iadd: lambda name, x, other: _add(name, x, other, in_place=True),
    torch.add: lambda name, input, other, *, alpha=1: _add(name, input, other, alpha=alpha),
    torch.cat: _cat,
    operator.getitem: _getitem,
    F.pad: _pad_function,
    F.avg_pool2d: _pool_function,
    F.interpolate: _upsample_function,
    **{function: _activation(code) for function, code in _CODES.items() if not isinstance(function, type)},
}


def _size_after(conv: Convolution, size: Size) -> Size:
    """(height, width) of a convolution's result."""
    stride, padding, kernel = int(conv.stride[0]), conv.padding[0], int(conv.kernel_size[0])
    assert isinstance(padding, int)
    if isinstance(conv, nn.ConvTranspose2d):
        more = int(conv.output_padding[0])
        height, width = (conv_transpose_size(side, kernel, stride, padding) + more for side in size)
    else:
        height, width = (conv_size(side, kernel, stride, padding) for side in size)
    return height, width
