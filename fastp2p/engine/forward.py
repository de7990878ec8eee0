"""A network's forward as a list of operations: it is run on a stand-in, and what the engine does not know is refused.

torch.fx does as much by patching nn.Module for all threads; here only the network's own modules are touched. Whatever a
forward does beside calling modules and functions on what it is given, it would do once, now, and never in training. So
that is refused, too.
"""

import contextlib
import functools
import operator
import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map_only

from fastp2p.conv_shape import Size
from fastp2p.engine.operation import Operation, of_function, of_module
from fastp2p.engine.supported import LEAVES, identity, refuse, settings_of
from fastp2p.errors import InputError
from fastp2p.nn.scope import OPERATORS, modes
from fastp2p.nn.tracing import undisturbed


@dataclass(frozen=True)
class Forward:
    """The operations of a forward in the order in which they run."""

    operations: list[Operation]
    outputs: list[Operation]


def follow(net: nn.Module, channels: int, size: Size) -> Forward:
    """Follow a network's forward in training mode on images of `channels` and (height, width) = `size`.

    The forward runs, once, on a stand-in for the images. The network stays as it is.

    Raises:
        InputError: naming the first module or function that is not among those the engine computes, or where the
            forward does anything else.
    """
    walk, x = _Walk(net), Operation("input", "the input", (), channels, size)
    try:
        with walk.following():
            result = net(walk.stand_in(x))
    except InputError:
        raise
    except Exception as error:  # users' code may raise anything on stand-ins; the refusal tells what
        text = (str(error).strip() or "no message").splitlines()[0]
        refuse("the network", f"has a forward that cannot be followed: {type(error).__name__}: {text}")
    operations = [x, *walk.operations]
    for operation in operations:
        for read in operation.inputs:
            read.readers.append(operation)
    outputs: list[Operation] = []
    for value in tree_leaves(result):
        if type(value) is not _StandIn:
            refuse("the network", f"returns {value!r:.60}; expected tensors that it computed")
        if value._operation is x:
            refuse("the network", "returns its input; expected tensors that it computed")
        outputs.append(_read(value))
    return Forward(operations, outputs)


class _Walk:
    """A forward that is being followed: its modules' forwards tell of themselves meanwhile."""

    def __init__(self, net: nn.Module):
        self.net, self.names = net, {module: name for name, module in net.named_modules()}
        self.operations: list[Operation] = []
        self.stack: list[nn.Module] = []  # whose forwards are running
        self.refused: InputError | None = None  # the first refusal, should the forward swallow it
        self.images = _AnyNumber(self)
        self.modes = self._modes()

    @contextlib.contextmanager
    def following(self) -> Iterator[None]:
        """Let modules tell of themselves. Afterwards they are as before; InputError where the forward changed one."""
        python_state = random.getstate()
        with undisturbed(self.net, training=True):
            for module in self.names:
                is_leaf = type(module) in LEAVES or (_is_pytorch_s(module) and not isinstance(module, nn.Sequential))
                run = self._call_leaf if is_leaf else self._call_container
                module.__dict__["forward"] = functools.partial(run, module)
            self.before = {module: _contents(module) for module in self.names}
            self.settings = {module: _settings(module) for module in self.names}
            with _NothingElse(self):
                yield
            if self.refused is not None:
                raise self.refused
            for module, name in self.names.items():
                if _contents(module) != self.before[module]:
                    refuse(f"{name or 'the network'}: {type(module).__name__}", "changes itself in its forward")
            if random.getstate() != python_state:
                refuse("the network", "draws random numbers in its forward")

    def stand_in(self, operation: Operation) -> "_StandIn":
        return _StandIn(operation, self)

    def _call_container(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        self.stack.append(module)
        try:
            return type(module).forward(module, *args, **kwargs)
        finally:
            self.stack.pop()

    def _call_leaf(self, module: nn.Module, *args: Any, **kwargs: Any) -> "_StandIn":
        with self.remembering():
            name = f"{self.names[module] or 'the network'}: {module!r}"
            if len(args) != 1 or kwargs or type(args[0]) is not _StandIn:
                refuse(name, "is called with something else than a tensor, or with more, such as an output_size")
            if _settings(module) != self.settings[module]:
                refuse(name, "is changed by the forward that calls it")
            return self._keep(of_module(name, module, _read(args[0])), args[0])

    def call(self, function: Any, *args: Any, **kwargs: Any) -> "_StandIn":
        """What a function gives that a forward calls."""
        with self.remembering():
            name = f"{self.where()} calls {getattr(function, '__name__', function)}"
            read_args, read_kwargs = tree_map_only(_StandIn, _read, (args, kwargs))
            operation = of_function(name, function, *read_args, **read_kwargs)
            return self._keep(operation, next(leaf for leaf in tree_leaves((args, kwargs)) if type(leaf) is _StandIn))

    def _keep(self, operation: Operation, given: "_StandIn") -> "_StandIn":
        """The result of an operation: the tensor itself that was given, where it passes it on or writes to it."""
        if self._modes() != self.modes:
            operation.refuse("runs in another grad, autocast or inference mode than the network")
        if operation is _read(given):
            return given
        self.operations.append(operation)
        if operation.in_place:
            operation.inputs[0].overwritten_by = operation
            return given
        return self.stand_in(operation)

    @contextlib.contextmanager
    def remembering(self) -> Iterator[None]:
        """Keep the first refusal for the end."""
        try:
            yield
        except InputError as error:
            self.refused = self.refused or error
            raise

    def refuse_question(self, what: str) -> Any:
        """Raise InputError, since a forward asks what the engine has no answer to."""
        with self.remembering():
            refuse(self.where(), f"asks a tensor for {what}, which the engine does not compute")

    def where(self) -> str:
        """Which module's forward is running."""
        module = self.stack[-1] if self.stack else self.net
        return f"{self.names[module] or 'the network'}: {type(module).__name__}"

    @staticmethod
    def _modes() -> tuple[bool, ...]:
        return *modes(), torch.is_inference_mode_enabled()


def _is_pytorch_s(module: nn.Module) -> bool:
    return type(module).__module__.startswith("torch.nn")


def _settings(module: nn.Module) -> tuple[Any, ...]:
    return settings_of(module), *(p.requires_grad for p in module.parameters(recurse=False))


def _contents(module: nn.Module) -> dict[str, Any]:
    """A module's attributes, as far as `identity` tells them apart."""
    return {name: identity(value) for name, value in module.__dict__.items()}


class _NothingElse(TorchFunctionMode):
    """Refuses every call of PyTorch's that has no stand-in among its arguments."""

    allowed = (
        *(torch.is_grad_enabled, torch.is_autocast_enabled, torch.is_inference_mode_enabled),
        *(Tensor.shape.__get__, Tensor.ndim.__get__, Tensor.dtype.__get__, Tensor.device.__get__),  # type: ignore[attr-defined]
        *(Tensor.requires_grad.__get__, Tensor.size, Tensor.dim, Tensor.numel),  # type: ignore[attr-defined]
    )

    def __init__(self, walk: _Walk):
        super().__init__()
        self.walk = walk

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        known = function in self.allowed or any(type(leaf) is _StandIn for leaf in tree_leaves((args, kwargs)))
        if not known:
            with self.walk.remembering():
                name = getattr(function, "__name__", function)
                refuse(f"{self.walk.where()} calls {name},", "which the engine does not compute")
        return function(*args, **(kwargs or {}))


class _StandIn:
    """Stands for a tensor; knows its shape, but for the number of images."""

    __slots__ = ("_operation", "_walk")
    _operation: Operation
    _walk: _Walk

    def __init__(self, operation: Operation, walk: _Walk):
        object.__setattr__(self, "_operation", operation)
        object.__setattr__(self, "_walk", walk)

    @property
    def shape(self) -> tuple[Any, ...]:
        return self._walk.images, self._operation.channels, *self._operation.size

    def size(self, dim: int | None = None) -> Any:
        return self.shape if dim is None else self.shape[dim]

    def __add__(self, other: Any) -> "_StandIn":
        return self._walk.call(operator.add, self, other)

    def __iadd__(self, other: Any) -> "_StandIn":
        return self._walk.call(operator.iadd, self, other)

    def __getitem__(self, key: Any) -> "_StandIn":
        return self._walk.call(operator.getitem, self, key)

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> "_StandIn":
        walk = next(leaf._walk for leaf in tree_leaves((args, kwargs)) if type(leaf) is cls)
        return walk.call(function, *args, **(kwargs or {}))

    @property  # type: ignore[misc]
    def __class__(self) -> type:  # isinstance(x, Tensor), and PyTorch's own ways to ask
        raise self._walk.refuse_question("its type")

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        self._walk.refuse_question(name)

    def __setattr__(self, name: str, value: Any) -> None:
        self._walk.refuse_question(f"another {name}")


def _read(tensor: _StandIn) -> Operation:
    """Whose result a tensor holds by now."""
    operation = tensor._operation
    while operation.overwritten_by is not None:
        operation = operation.overwritten_by
    return operation


class _AnyNumber:
    """The number of images: whatever a forward does with it beside passing it on, the engine does not compute."""

    def __init__(self, walk: _Walk):
        self._walk = walk

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        self._walk.refuse_question("its number of images")


def _define(name: str) -> None:
    if name not in ("__add__", "__iadd__", "__getitem__"):
        setattr(_StandIn, name, lambda self, *args: self._walk.call(name.strip("_"), self, *args))
    setattr(_AnyNumber, name, lambda self, *args: self._walk.refuse_question("its number of images"))


for _name in OPERATORS - {"__reduce_ex__"}:
    _define(_name)
_StandIn.__hash__ = object.__hash__  # type: ignore[method-assign]  # as tensors have, beside an == of their own
