"""When a fused convolution does the whole chain, and how the result gets through the modules that it took in.

Only while the forward runs in which `fuse` saw the chain (`Scope`), and what the convolution returns then is sealed
(`Parcel`): whoever else reads it gets an error instead of a result that is further on than it looks.
"""

import threading
from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fastp2p.errors import InputError


class Scope(threading.local):
    """Whether a module's forward is running in this thread; copied and pickled along with that module."""

    def __init__(self) -> None:
        self.running = False

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), ()

    def watch(self, module: nn.Module) -> "Scope":
        """Follow this module's forward from now on, by hooks: they are copied, pickled and compiled with it."""
        module.register_forward_pre_hook(self.enter)
        module.register_forward_hook(self.leave, always_call=True)
        return self

    def enter(self, module: nn.Module, args: Any) -> None:
        self.running = True

    def leave(self, module: nn.Module, args: Any, output: Any) -> None:
        self.running = False
        if not isinstance(output, Tensor):
            for leaf in pytree.tree_leaves(output):
                if isinstance(leaf, Parcel) and leaf.scope is self:
                    leaf.refuse()

    @staticmethod
    def owns(hook: Callable[..., Any]) -> bool:
        """Whether a hook is one that `watch` registered."""
        return isinstance(getattr(hook, "__self__", None), Scope)


def scope_of(module: nn.Module) -> Scope | None:
    """The scope that watches a module."""
    owners = (getattr(hook, "__self__", None) for hook in module._forward_hooks.values())
    return next((owner for owner in owners if isinstance(owner, Scope)), None)


def unwatch(module: nn.Module) -> None:
    """Remove the hooks of `Scope.watch`."""
    for hooks in (module._forward_pre_hooks, module._forward_hooks):
        for key in [key for key, hook in hooks.items() if Scope.owns(hook)]:
            del hooks[key]
            module._forward_hooks_always_called.pop(key, None)


def modes() -> tuple[bool, ...]:
    """What a `with` around a call may have changed, and a graph does not show."""
    autocast = (torch.is_autocast_enabled(device_type) for device_type in ("cpu", "cuda"))
    return torch.is_grad_enabled(), *autocast


class Parcel:
    """A whole chain's result on its way through the modules that the convolution took in; the last one opens it.

    No tensor: whatever else is done with it raises InputError, which says whose result it is.
    """

    def __init__(self, result: Tensor, scope: Scope, members: list[nn.Module], names: tuple[str, ...]):
        self.result, self.scope, self.members, self.names = result, scope, members, names
        self.passed, self.modes = 0, modes()

    def through(self, module: nn.Module) -> "Parcel | Tensor":
        """The next module has been called: the parcel, or after the last module the result."""
        if self.passed == len(self.members) or module is not self.members[self.passed] or modes() != self.modes:
            self.refuse()
        self.passed += 1
        return self.result if self.passed == len(self.members) else self

    def refuse(self, *args: Any, **kwargs: Any) -> NoReturn:
        self.scope.running = False  # as it is after Ctrl-C, which no hook sees
        got, expected = self.names[self.passed], " -> ".join(self.names)
        raise InputError(
            f"{got}: its result went elsewhere than when fastp2p.fuse saw {expected}; call fastp2p.unfuse(model), then "
            "fastp2p.fuse(model) as it is now"
        )

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        self.refuse()

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> NoReturn:
        next(leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, cls)).refuse()


_BINARY = ("add", "sub", "mul", "matmul", "truediv", "floordiv", "mod", "pow", "and", "or", "xor", "lshift", "rshift")
_OTHERS = (
    "neg pos abs invert eq ne lt le gt ge bool int float index len iter getitem setitem contains array call reduce_ex"
)
# What can be done to a tensor with an operator, and a stand-in for one must refuse
OPERATORS = {f"__{name}__" for name in (*_OTHERS.split(), *(p + name for name in _BINARY for p in ("", "r", "i")))}
for _name in OPERATORS:
    setattr(Parcel, _name, Parcel.refuse)
