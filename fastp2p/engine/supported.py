"""What the fused engine computes, as a positive list: whatever a network does beside it is refused by name."""

import math
from collections.abc import Iterable
from typing import NoReturn

import torch
from torch import nn

from fastp2p.errors import InputError
from fastp2p.models.pix2pix.networks import PatchDiscriminator, PixelDiscriminator, UnetBlock, UnetGenerator
from fastp2p.nn.norm import SampleNorm2d

_NETS = (UnetGenerator, PatchDiscriminator, PixelDiscriminator)
_NORMS = (nn.BatchNorm2d, nn.InstanceNorm2d, SampleNorm2d)
_ACTIVATIONS = (nn.ReLU, nn.LeakyReLU, nn.Tanh)
_CONVOLUTIONS = (nn.Conv2d, nn.ConvTranspose2d)
_LEAVES = (*_CONVOLUTIONS, *_NORMS, *_ACTIVATIONS, nn.Dropout, nn.Identity)
_CONTAINERS: dict[type[nn.Module], tuple[str, ...]] = {  # and the names of their children
    UnetGenerator: ("model",),
    UnetBlock: ("model",),
    PatchDiscriminator: ("model",),
    PixelDiscriminator: ("net",),
}
_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
_GLOBAL_HOOKS = [getattr(torch.nn.modules.module, f"_global{hooks}") for hooks in _HOOKS]
_OPTIMIZER_HOOKS = ("_optimizer_step_pre_hooks", "_optimizer_step_post_hooks")
HINT = "; the reference engine trains it: --engine reference, or fastp2p.models.pix2pix.reference.train_step"

Settings = tuple[object, ...]


class Supported:
    """A network that the engine computes as it stands, and a watch over what would change that.

    Args:
        net: UnetGenerator, PatchDiscriminator or PixelDiscriminator.

    Raises:
        InputError: naming the first module that the engine does not compute.
    """

    def __init__(self, net: nn.Module):
        if type(net) not in _NETS:
            kind = type(net).__name__
            raise InputError(f"engine: got a {kind}, expected a U-Net generator or a PatchGAN discriminator{HINT}")
        _check_global_hooks()
        self.names = dict(net.named_modules())
        for name, module in net.named_modules(remove_duplicate=False):
            _check(name, module)
            if self.names.get(name) is not module:
                _refuse(name, module, "stands in the network twice; expected each module once")
        if isinstance(net, UnetGenerator):
            _check_levels(net, self.names)
        self.parameters = [p for module in self.names.values() for p in module._parameters.values() if p is not None]
        if len(self.parameters) != len(set(map(id, self.parameters))):
            raise InputError(f"engine: two modules share a parameter; expected one for each{HINT}")
        self._check_parameters()
        self.modules = list(self.names.values())
        self.settings = [_settings(module) for module in self.modules]

    def check_again(self) -> None:
        """Raise InputError where a setting, a mode or a hook has changed since the step was made."""
        _check_global_hooks()
        if [_settings(module) for module in self.modules] != self.settings:
            for name, module, before in zip(self.names, self.modules, self.settings, strict=True):
                if _settings(module) != before:
                    _check(name, module)
                    _refuse(name, module, "was changed after the step was made", hint="; make a new FusedStep")
        self._check_parameters()

    def _check_parameters(self) -> None:
        for p in self.parameters:
            if p._backward_hooks or p._post_accumulate_grad_hooks:
                raise InputError(f"engine: a parameter of shape {tuple(p.shape)} has a hook; expected none{HINT}")


def _check(name: str, module: nn.Module) -> None:
    """What a module is, what it holds and how it is set."""
    kind = type(module)
    known = (*_CONTAINERS, nn.Sequential, *_LEAVES)
    if kind not in known:
        _refuse(name, module, f"is not among {', '.join(kind.__name__ for kind in known)}")
    own = [key for key in module.__dict__ if callable(getattr(kind, key, None))]
    if own or any(getattr(module, hooks) for hooks in _HOOKS):
        _refuse(name, module, f"has {own[0] + ' of its own' if own else 'a hook'}; expected none")
    if not module.training:
        _refuse(name, module, "is in eval mode; expected training mode: call .train() first")
    children = tuple(module._modules)
    if kind is not nn.Sequential and children != _CONTAINERS.get(kind, ()):
        _refuse(name, module, f"has the modules {', '.join(children)}; expected its own alone")
    parameters = {key: p for key, p in module._parameters.items() if p is not None}
    if not parameters.keys() <= ({"weight", "bias"} if isinstance(module, (*_CONVOLUTIONS, *_NORMS)) else set()):
        _refuse(name, module, f"has the parameters {', '.join(parameters)}; expected its own alone")
    if isinstance(module, _CONVOLUTIONS):
        _check_convolution(name, module)
    elif isinstance(module, _NORMS):
        _check_norm(name, module)
    elif isinstance(module, nn.LeakyReLU) and not 0 <= module.negative_slope < math.inf:
        _refuse(name, module, "expected a slope of 0 or more")
    elif isinstance(module, nn.Dropout) and not 0 <= module.p < 1:
        _refuse(name, module, "expected a probability of 0 or more and less than 1")


def _check_convolution(name: str, module: nn.Conv2d | nn.ConvTranspose2d) -> None:
    square = all(len(set(sides)) == 1 for sides in (module.kernel_size, module.stride))
    padding = module.padding
    if (
        *(module.dilation, module.groups, module.padding_mode, module.output_padding),
        *(square, isinstance(padding, tuple) and len(set(padding)) == 1),
    ) != ((1, 1), 1, "zeros", (0, 0), True, True):
        _refuse(name, module, "expected zeros around it, equal strides and sides, no dilation and no groups")
    channels = (module.out_channels, module.in_channels)
    expected = (*(channels[::-1] if isinstance(module, nn.ConvTranspose2d) else channels), *module.kernel_size)
    if tuple(module.weight.shape) != expected or (module.bias is not None and module.bias.shape != channels[:1]):
        _refuse(name, module, f"has a weight of {tuple(module.weight.shape)}; expected {expected}, as it says itself")


def _check_norm(name: str, module: nn.BatchNorm2d | nn.InstanceNorm2d) -> None:
    tensors = [*module._parameters.values(), *(t for key, t in module._buffers.items() if key.startswith("running"))]
    there = [tensor for tensor in tensors if tensor is not None]
    if (module.weight is None) != (module.bias is None) or {tuple(t.shape) for t in there} > {(module.num_features,)}:
        _refuse(name, module, f"expected weight and bias of ({module.num_features},), or neither, and averages so")
    if (module.running_mean is None) != (module.running_var is None):
        _refuse(name, module, "expected two running averages, or none")
    if len({tensor.dtype for tensor in there}) > 1:
        _refuse(name, module, "holds tensors of several dtypes; expected one")
    if not 0 < module.eps < math.inf or not (module.momentum is None or 0 <= module.momentum <= 1):
        _refuse(name, module, "expected an eps of more than 0 and a momentum from 0 to 1")


def _check_levels(net: UnetGenerator, names: dict[str, nn.Module]) -> None:
    """Each level holds the next between a convolution and a transposed one, and the outermost is the first."""
    blocks = {name: module for name, module in names.items() if isinstance(module, UnetBlock)}
    if len(blocks) != net.levels:
        _refuse("", net, f"has {len(blocks)} levels and says {net.levels}")
    for number, (name, block) in enumerate(blocks.items()):
        kinds = [type(m) for m in block.model if isinstance(m, (UnetBlock, *_CONVOLUTIONS))]
        below = [UnetBlock] if number + 1 < len(blocks) else []
        if kinds != [nn.Conv2d, *below, nn.ConvTranspose2d] or block.outermost != (number == 0):
            _refuse(name, block, "expected a convolution, the next level and a transposed convolution, in this order")


def _check_global_hooks() -> None:
    if any(_GLOBAL_HOOKS):
        raise InputError(f"engine: a hook is registered for all modules (register_module_...); expected none{HINT}")


def check_chain(
    name: str, rest: Iterable[nn.Module], expected: tuple[type[nn.Module], ...], names: dict[nn.Module, str]
) -> None:
    """What follows a convolution must be norm, dropout, activation in this order, each once at most.

    Args:
        name: of the layer, for the error.
        rest: the modules between this convolution and the next.
        expected: the activations one of which must be there; () where there must be none.
        names: of all modules in the network.

    Raises:
        InputError: naming the module that the engine would not compute in its place.
    """
    kinds = [(_NORMS, False), ((nn.Dropout,), False), (expected, bool(expected))]
    modules = [module for module in rest if type(module) is not nn.Identity]
    for types, needed in kinds:
        if modules and type(modules[0]) in types:
            modules.pop(0)
        elif needed:
            wanted = " or ".join(kind.__name__ for kind in expected)
            if not modules:
                raise InputError(f"engine: layer {name} ends where {wanted} is expected{HINT}")
            _refuse(names[modules[0]], modules[0], f"stands in layer {name} where {wanted} is expected")
    if modules:
        why = "expected a convolution, then norm, dropout, activation, each once at most"
        _refuse(names[modules[0]], modules[0], f"stands in layer {name} where it is not computed; {why}")


def check_input(before: Iterable[nn.Module], names: dict[nn.Module, str]) -> None:
    """Raise InputError, naming it, where a module changes a network's input before its first convolution."""
    for module in before:
        if type(module) is not nn.Identity:
            _refuse(names[module], module, "stands before the first convolution, where it is not computed")


def check_optimizer(optimizer: torch.optim.Optimizer) -> None:
    """Raise InputError unless it is torch.optim.Adam itself, not one with its settings, and nothing hooks its step."""
    if type(optimizer) is not torch.optim.Adam:
        raise InputError(f"engine: got the optimizer {type(optimizer).__name__}, expected torch.optim.Adam{HINT}")
    step = optimizer.__dict__.get("step")
    own = step is not None and not hasattr(step, "_wrapped_by_lr_sched")  # a scheduler only counts the calls
    if own or any(getattr(optimizer, hooks) for hooks in _OPTIMIZER_HOOKS):
        raise InputError(f"engine: the optimizer has {'a step of its own' if own else 'a hook'}; expected none{HINT}")


def _settings(module: nn.Module) -> Settings:
    """Everything of a module that decides what it computes, but for the values of its tensors."""
    values = module.__dict__
    held = *values["_parameters"].values(), *values["_buffers"].values(), *values["_modules"].values()
    hooks = any(map(values.__getitem__, _HOOKS))
    own = [values.get(name) for name in _OWN.get(type(module), _OF_ALL)]
    return type(module), hooks, *map(id, held), *own


# Attributes that decide what a module computes; forward and _conv_forward are among them where an instance has its own
_OF_ALL = ("training", "forward")
_OWN: dict[type[nn.Module], tuple[str, ...]] = {
    **dict.fromkeys(_NORMS, (*_OF_ALL, "eps", "momentum", "track_running_stats")),
    **dict.fromkeys(
        _CONVOLUTIONS,
        (*_OF_ALL, "_conv_forward", "dilation", "stride", "padding", "padding_mode", "groups", "output_padding"),
    ),
    nn.LeakyReLU: (*_OF_ALL, "negative_slope"),
    nn.Dropout: (*_OF_ALL, "p"),
    UnetBlock: (*_OF_ALL, "outermost"),
    UnetGenerator: (*_OF_ALL, "levels"),
}


def _refuse(name: str, module: nn.Module, why: str, hint: str = HINT) -> NoReturn:
    text = repr(module) if not module._modules else type(module).__name__
    raise InputError(f"engine: {name or 'the network'}: {text} {why}{hint}")
