"""A network's forward as a list of operations: it is run on a stand-in, and what the engine does not know is refused.

torch.fx does as much by patching nn.Module for all threads; here only the network's own modules are touched.
"""

import functools
import operator
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NoReturn

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._pytree import tree_leaves

from fastp2p.engine.supported import LEAVES, NORMS, refuse
from fastp2p.errors import InputError
from fastp2p.nn.block import Convolution
from fastp2p.nn.scope import OPERATORS
from fastp2p.ops.activation import ACTIVATIONS

Size = tuple[int, int]  # height, width

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

    def refuse(self, why: str) -> NoReturn:
        """Raise InputError, naming the operation."""
        refuse(self.name, why)


@dataclass(frozen=True)
class Forward:
    """The operations of a forward in the order in which they run."""

    operations: list[Operation]
    outputs: list[Operation]


def follow(net: nn.Module, channels: int, size: Size) -> Forward:
    """Follow a network's forward in training mode on images of `channels` and (height, width) = `size`.

    The forward runs, once, on a stand-in for the images; modules with parameters do nothing meanwhile.

    Raises:
        InputError: naming the first module or function that is not among those the engine computes.
    """
    walk = _Walk(net)
    x = Operation("input", "the input", (), channels, size)
    with walk:
        try:
            result = net(walk.stand_in(x))
        except InputError:
            raise
        except Exception as error:  # a forward given stand-ins may raise anything; the message says what
            text = (str(error).strip() or "no message").splitlines()[0]
            refuse("the network", f"has a forward that cannot be followed: {type(error).__name__}: {text}")
    operations = [x, *walk.operations]
    for operation in operations:
        for read in operation.inputs:
            read.readers.append(operation)
    outputs: list[Operation] = []
    for value in tree_leaves(result):
        if not isinstance(value, _StandIn):
            refuse("the network", f"returns {value!r:.60}; expected tensors that it computed")
        outputs.append(value.read())
    return Forward(operations, outputs)


class _Walk:
    """A forward that is being followed: its modules' forwards tell of themselves until the `with` ends."""

    def __init__(self, net: nn.Module):
        self.names = {module: name for name, module in net.named_modules()}
        self.operations: list[Operation] = []
        self.stack: list[nn.Module] = []  # whose forwards are running

    def __enter__(self) -> None:
        for module in self.names:
            own = type(module) in LEAVES or (_is_pytorch_s(module) and not isinstance(module, nn.Sequential))
            run = self._call_leaf if own else self._call_container
            module.__dict__["forward"] = functools.partial(run, module)

    def __exit__(self, *error: Any) -> None:
        for module in self.names:
            del module.__dict__["forward"]

    def stand_in(self, operation: Operation) -> "_StandIn":
        return _StandIn(operation, self)

    def _call_container(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        self.stack.append(module)
        result = type(module).forward(module, *args, **kwargs)
        self.stack.pop()
        return result

    def _call_leaf(self, module: nn.Module, *args: Any, **kwargs: Any) -> "_StandIn":
        name = f"{self.names[module] or 'the network'}: {module!r}"
        if len(args) != 1 or kwargs or not isinstance(args[0], _StandIn):
            refuse(name, "is called with something else than a tensor, or with more, such as an output_size")
        return self._keep(_of_module(name, module, args[0].read()))

    def call(self, function: Any, *args: Any, **kwargs: Any) -> "_StandIn":
        """What a function gives that a forward calls."""
        name = f"{self.where()} calls {getattr(function, '__name__', function)}"
        make = _FUNCTIONS.get(function)
        if make is None:
            refuse(f"{name},", "which the engine does not compute")
        return self._keep(make(name, *args, **kwargs))

    def _keep(self, operation: Operation) -> "_StandIn":
        if operation not in self.operations and operation.kind != "input":
            self.operations.append(operation)
            if operation.in_place:
                operation.inputs[0].overwritten_by = operation
        return self.stand_in(operation)

    def where(self) -> str:
        """Which module's forward is running."""
        module = self.stack[-1]
        return f"{self.names[module] or 'the network'}: {type(module).__name__}"


def _is_pytorch_s(module: nn.Module) -> bool:
    return type(module).__module__.startswith("torch.nn")


class _StandIn:
    """Stands for a tensor; knows its shape, but for the number of images."""

    def __init__(self, operation: Operation, walk: _Walk):
        self.operation, self.walk = operation, walk

    def read(self) -> Operation:
        """Whose result the tensor holds by now."""
        operation = self.operation
        while operation.overwritten_by is not None:
            operation = operation.overwritten_by
        return operation

    @property
    def shape(self) -> torch.Size:
        return torch.Size([_ANY_NUMBER, self.operation.channels, *self.operation.size])

    def size(self, dim: int | None = None) -> Any:
        return self.shape if dim is None else self.shape[dim]

    def __add__(self, other: Any) -> "_StandIn":
        return self.walk.call(operator.add, self, other)

    def __iadd__(self, other: Any) -> "_StandIn":
        return self.walk.call(operator.iadd, self, other)

    def __getitem__(self, key: Any) -> "_StandIn":
        return self.walk.call(operator.getitem, self, key)

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> "_StandIn":
        walk = next(leaf.walk for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, cls))
        return walk.call(function, *args, **(kwargs or {}))

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        refuse(self.walk.where(), f"asks a tensor for {name}, which the engine does not compute")


for _name in OPERATORS - {"__add__", "__iadd__", "__getitem__", *dir(object)}:
    setattr(_StandIn, _name, lambda self, *args, _name=_name: self.walk.call(_name.strip("_"), *args))

_ANY_NUMBER = 1  # images: whatever a forward would do with the number, the engine does not compute


def _operations_of(values: Any) -> tuple[Operation, ...]:
    return tuple(value.read() for value in values if isinstance(value, _StandIn))


def _of_module(name: str, module: nn.Module, x: Operation) -> Operation:
    """The operation of a leaf module's call."""
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
        return Operation("dropout", name, (x,), x.channels, x.size, module, (module.p,)) if module.p else x
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


def _add(name: str, x: Any, other: Any, *, alpha: Any = 1, in_place: bool = False) -> Operation:
    inputs = _operations_of((x, other))
    if len(inputs) != 2 or alpha != 1 or (inputs[0].channels, inputs[0].size) != (inputs[1].channels, inputs[1].size):
        refuse(name, "with something else than two tensors of one shape")
    return Operation("add", name, inputs, inputs[0].channels, inputs[0].size, in_place=in_place)


def _cat(name: str, tensors: Any, dim: int = 0) -> Operation:
    inputs = _operations_of(tensors)
    if len(inputs) != len(tensors) or dim not in (1, -3) or len({x.size for x in inputs}) != 1:
        refuse(name, "along another dimension than the channels, or of tensors of several sizes")
    return Operation("cat", name, inputs, sum(x.channels for x in inputs), inputs[0].size)


def _activation(code: int) -> Callable[..., Operation]:
    def make(name: str, x: Any, negative_slope: float = 0.01, inplace: bool = False) -> Operation:
        (source,) = _operations_of((x,))
        settings = (code, float(negative_slope) if code == LEAKY_RELU else 0.0)
        if not 0 <= settings[1] < float("inf"):
            refuse(name, f"with a slope of {negative_slope}; expected 0 or more")
        return Operation("activation", name, (source,), source.channels, source.size, None, settings, bool(inplace))

    return make if code == LEAKY_RELU else lambda name, x, inplace=False: make(name, x, 0.0, inplace)


def _pad_function(name: str, x: Any, pad: Any, mode: str = "constant", value: Any = None) -> Operation:
    (source,) = _operations_of((x,))
    if mode != "reflect" or value is not None or len(pad) != 4:
        refuse(name, f"with mode {mode!r} and padding {pad}; expected reflect and (left, right, top, bottom)")
    return _pad(name, source, tuple(pad))


def _pad(name: str, x: Operation, padding: tuple[int, ...]) -> Operation:
    left, right, top, bottom = padding
    height, width = x.size
    if not (0 <= max(left, right) < width and 0 <= max(top, bottom) < height) or min(padding) < 0:
        refuse(name, f"of an image of {x.size}; expected padding from 0 to less than the sides")
    if not any(padding):
        return x
    return Operation("pad", name, (x,), x.channels, (height + top + bottom, width + left + right), None, padding)


def _pool_function(
    name: str, x: Any, kernel_size: Any, stride: Any = None, padding: Any = 0, ceil_mode: bool = False,
    count_include_pad: bool = True, divisor_override: int | None = None,
) -> Operation:  # fmt: skip
    (source,) = _operations_of((x,))
    return _pool(name, source, kernel_size, stride, padding, ceil_mode, count_include_pad, divisor_override)


def _pool(
    name: str, x: Operation, kernel_size: Any, stride: Any, padding: Any, ceil_mode: bool, counts: bool, divisor: Any
) -> Operation:
    kernel, stride, padding = (_pair(value) for value in (kernel_size, stride or kernel_size, padding))
    if ceil_mode or divisor is not None:
        refuse(name, "with ceil_mode or divisor_override; expected neither")
    size = _pair([(n + 2 * p - k) // s + 1 for n, k, s, p in zip(x.size, kernel, stride, padding, strict=True)])
    return Operation("pool", name, (x,), x.channels, size, None, (kernel, stride, padding, bool(counts)))


def _upsample_function(
    name: str, x: Any, size: Any = None, scale_factor: Any = None, mode: str = "nearest", align_corners: Any = None,
    recompute_scale_factor: bool | None = None, antialias: bool = False,
) -> Operation:  # fmt: skip
    (source,) = _operations_of((x,))
    if antialias:
        refuse(name, "with antialias; expected none")
    return _upsample(name, source, size, scale_factor, mode, align_corners)


def _upsample(name: str, x: Operation, size: Any, scale_factor: Any, mode: str, align_corners: Any) -> Operation:
    factors = _pair(scale_factor or 1)
    if mode != "nearest" or align_corners is not None or any(factor != int(factor) for factor in factors):
        refuse(name, f"with mode {mode!r} and scale_factor {scale_factor}; expected nearest and a whole number")
    new = _pair(size) if size is not None else _pair([int(n * f) for n, f in zip(x.size, factors, strict=True)])
    return x if new == x.size else Operation("upsample", name, (x,), x.channels, new, None, new)


def _getitem(name: str, x: Any, key: Any) -> Operation:
    """A slice that takes everything, as a network's crop where its sides fit."""
    (source,) = _operations_of((x,))
    slices = [part for part in (key if isinstance(key, tuple) else (key,)) if part is not ...]
    whole = all(isinstance(part, slice) and part.step in (None, 1) and not part.start for part in slices)
    sides = zip(reversed(source.size), reversed(slices), strict=False)
    if not whole or len(slices) > 2 or ... not in key or any(s.stop not in (None, n) for n, s in sides):
        refuse(name, f"with {key}; expected what takes the whole image")
    return source


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
        height, width = ((side - 1) * stride - 2 * padding + kernel + int(conv.output_padding[0]) for side in size)
    else:
        height, width = ((side + 2 * padding - kernel) // stride + 1 for side in size)
    return height, width
