"""What the fused engine computes, module by module: whatever a network does beside it is refused by name."""

import math
from typing import Any, NoReturn

import torch
from torch import nn

from fastp2p.errors import InputError
from fastp2p.nn.norm import SampleNorm2d

NORMS = (nn.BatchNorm2d, nn.InstanceNorm2d, SampleNorm2d)
_CONVOLUTIONS = (nn.Conv2d, nn.ConvTranspose2d)
_LINKS = (nn.ReflectionPad2d, nn.AvgPool2d, nn.Upsample)
LEAVES = (*_CONVOLUTIONS, *NORMS, nn.ReLU, nn.LeakyReLU, nn.Tanh, nn.Dropout, nn.Identity, *_LINKS)
_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
_GLOBAL_HOOKS = [getattr(torch.nn.modules.module, f"_global{hooks}") for hooks in _HOOKS]
_OPTIMIZER_HOOKS = ("_optimizer_step_pre_hooks", "_optimizer_step_post_hooks")
HINT = "; autograd trains it: --engine layers, on fused layers, or --engine reference"
REFERENCE = "; --engine reference trains it"

Settings = tuple[object, ...]


class Supported:
    """A network whose modules the engine computes as they are set, and a watch over what would change that.

    What its forward does with them, `fastp2p.engine.forward.follow` finds out.

    Raises:
        InputError: naming the first module that the engine does not compute.
    """

    def __init__(self, net: nn.Module):
        _check_global_hooks()
        self.names = dict(net.named_modules())
        for name, module in self.names.items():
            _check(name, module)
        self.parameters = [p for module in self.names.values() for p in module._parameters.values() if p is not None]
        places = {(p.untyped_storage()._cdata, p.storage_offset()) for p in self.parameters}
        if len(self.parameters) != len(places):
            raise InputError(f"engine: two modules share a parameter; expected one for each{HINT}")
        self._check_parameters()
        self.modules = list(self.names.values())
        self.settings = [settings_of(module) for module in self.modules]

    def check_again(self) -> None:
        """Raise InputError where a setting, a mode or a hook has changed since the step was made."""
        _check_global_hooks()
        if [settings_of(module) for module in self.modules] != self.settings:
            for name, module, before in zip(self.names, self.modules, self.settings, strict=True):
                if settings_of(module) != before:
                    _check(name, module)
                    _refuse(name, module, "was changed after the step was made", hint="; make a new FusedStep")
        self._check_parameters()

    def _check_parameters(self) -> None:
        for p in self.parameters:
            if p._backward_hooks or p._post_accumulate_grad_hooks:
                raise InputError(f"engine: a parameter of shape {tuple(p.shape)} has a hook; expected none{HINT}")


def _check(name: str, module: nn.Module) -> None:
    """What a module holds and how it is set."""
    kind = type(module)
    own = [key for key in module.__dict__ if callable(getattr(kind, key, None))]
    if own or any(getattr(module, hooks) for hooks in _HOOKS):
        _refuse(name, module, f"has {own[0] + ' of its own' if own else 'a hook'}; expected none")
    if not module.training:
        _refuse(name, module, "is in eval mode; expected training mode: call .train() first")
    if kind not in LEAVES:
        return
    if module._modules:
        _refuse(name, module, f"has the modules {', '.join(module._modules)}; expected none")
    parameters = {key: p for key, p in module._parameters.items() if p is not None}
    if not parameters.keys() <= ({"weight", "bias"} if isinstance(module, (*_CONVOLUTIONS, *NORMS)) else set()):
        _refuse(name, module, f"has the parameters {', '.join(parameters)}; expected its own alone")
    if isinstance(module, _CONVOLUTIONS):
        _check_convolution(name, module)
    elif isinstance(module, NORMS):
        _check_norm(name, module)
    elif isinstance(module, nn.LeakyReLU) and not 0 <= module.negative_slope < math.inf:
        _refuse(name, module, "expected a slope of 0 or more")
    elif isinstance(module, nn.Dropout) and not 0 <= module.p < 1:
        _refuse(name, module, "expected a probability of 0 or more and less than 1")


def _check_convolution(name: str, module: nn.Conv2d | nn.ConvTranspose2d) -> None:
    square = all(len(set(sides)) == 1 for sides in (module.kernel_size, module.stride))
    paddings = (module.padding, module.output_padding)
    alike = all(isinstance(padding, tuple) and len(set(padding)) == 1 for padding in paddings)
    if (module.dilation, module.groups, module.padding_mode, square, alike) != ((1, 1), 1, "zeros", True, True):
        _refuse(name, module, "expected zeros around it, equal strides and sides, no dilation and no groups")
    if module.padding[0] < 0 or not 0 <= module.output_padding[0] < module.stride[0]:  # type: ignore[operator]
        _refuse(name, module, "expected padding of 0 or more, and less output_padding than stride")
    channels = (module.out_channels, module.in_channels)
    expected = (*(channels[::-1] if isinstance(module, nn.ConvTranspose2d) else channels), *module.kernel_size)
    if tuple(module.weight.shape) != expected or (module.bias is not None and module.bias.shape != channels[:1]):
        _refuse(name, module, f"has a weight of {tuple(module.weight.shape)}; expected {expected}, as it says itself")


def _check_norm(name: str, module: nn.BatchNorm2d | nn.InstanceNorm2d) -> None:
    tensors = [*module._parameters.values(), *(t for key, t in module._buffers.items() if key.startswith("running"))]
    there = [tensor for tensor in tensors if tensor is not None]
    if (module.weight is None) != (module.bias is None) or not {tuple(t.shape) for t in there} <= {
        (module.num_features,)
    }:
        _refuse(name, module, f"expected weight and bias of ({module.num_features},), or neither, and averages so")
    if (module.running_mean is None) != (module.running_var is None):
        _refuse(name, module, "expected two running averages, or none")
    batches = module.num_batches_tracked
    if batches is not None and (batches.shape, batches.dtype) != ((), torch.int64):
        _refuse(name, module, "expected num_batches_tracked of () int64, as PyTorch makes it")
    if len({tensor.dtype for tensor in there}) > 1:
        _refuse(name, module, "holds tensors of several dtypes; expected one")
    if not 0 < module.eps < math.inf or not (module.momentum is None or 0 <= module.momentum <= 1):
        _refuse(name, module, "expected an eps of more than 0 and a momentum from 0 to 1")


def _check_global_hooks() -> None:
    if any(_GLOBAL_HOOKS):
        raise InputError(f"engine: a hook is registered for all modules (register_module_...); expected none{HINT}")


def check_optimizer(optimizer: torch.optim.Optimizer) -> None:
    """Raise InputError unless it is torch.optim.Adam itself, not one with its settings, and nothing hooks its step."""
    if type(optimizer) is not torch.optim.Adam:
        raise InputError(f"engine: got the optimizer {type(optimizer).__name__}, expected torch.optim.Adam{REFERENCE}")
    step = optimizer.__dict__.get("step")
    own = step is not None and not hasattr(step, "_wrapped_by_lr_sched")  # a scheduler only counts the calls
    if own or any(getattr(optimizer, hooks) for hooks in _OPTIMIZER_HOOKS):
        raise InputError(
            f"engine: the optimizer has {'a step of its own' if own else 'a hook'}; expected none{REFERENCE}"
        )


def settings_of(module: nn.Module) -> Settings:
    """Everything of a module that decides what it computes, but for the values of its tensors."""
    values = module.__dict__
    held = *values["_parameters"].values(), *values["_buffers"].values(), *values["_modules"].values()
    hooks = any(map(values.__getitem__, _HOOKS))
    names = _OWN.get(type(module))
    # A container's forward may ask for any of its attributes
    own = [(name, identity(value)) for name, value in values.items() if name not in _HELD] if names is None else [
        values.get(name) for name in names
    ]  # fmt: skip
    return type(module), hooks, *map(id, held), *own


def identity(value: Any) -> Any:
    """What tells whether an attribute is still the same; of a list, dict or set also what it holds."""
    if type(value) in _PLAIN:
        return value
    held = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple | set) else ()
    return id(value), *(item if type(item) in _PLAIN else id(item) for item in held)


_PLAIN = (bool, int, float, str, type(None))
_HELD = set(nn.Module().__dict__) - {"training"}  # what every module has, and `settings_of` looks at otherwise

# Attributes that decide what a leaf computes; forward and _conv_forward are among them where an instance has its own
_OF_ALL = ("training", "forward")
_OWN: dict[type[nn.Module], tuple[str, ...]] = {
    **dict.fromkeys(LEAVES, _OF_ALL),
    **dict.fromkeys(NORMS, (*_OF_ALL, "eps", "momentum", "track_running_stats")),
    **dict.fromkeys(
        _CONVOLUTIONS,
        (*_OF_ALL, "_conv_forward", "dilation", "stride", "padding", "padding_mode", "groups", "output_padding"),
    ),
    **{nn.ReLU: (*_OF_ALL, "inplace"), nn.LeakyReLU: (*_OF_ALL, "negative_slope", "inplace")},
    **{nn.Dropout: (*_OF_ALL, "p", "inplace"), nn.Sequential: _OF_ALL},
    nn.ReflectionPad2d: (*_OF_ALL, "padding"),
    nn.AvgPool2d: (*_OF_ALL, "kernel_size", "stride", "padding", "ceil_mode", "count_include_pad", "divisor_override"),
    nn.Upsample: (*_OF_ALL, "size", "scale_factor", "mode", "align_corners"),
}


def refuse(name: str, why: str, hint: str = HINT) -> NoReturn:
    """Raise InputError: the engine does not compute what is named, and why."""
    raise InputError(f"engine: {name} {why}{hint}")


def _refuse(name: str, module: nn.Module, why: str, hint: str = HINT) -> NoReturn:
    text = repr(module) if not module._modules else type(module).__name__
    refuse(f"{name or 'the network'}: {text}", why, hint)
