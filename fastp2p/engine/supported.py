"""What the fused engine computes, as a positive list: whatever a network does beside it is refused by name."""

from collections.abc import Hashable, Iterable

import torch
from torch import nn

from fastp2p.errors import InputError
from fastp2p.networks import PatchDiscriminator, PixelDiscriminator, SampleNorm2d, UnetBlock, UnetGenerator

_NETS = (UnetGenerator, PatchDiscriminator, PixelDiscriminator)
_NORMS = (nn.BatchNorm2d, nn.InstanceNorm2d, SampleNorm2d)
_ACTIVATIONS = (nn.ReLU, nn.LeakyReLU, nn.Tanh)
_CONVOLUTIONS = (nn.Conv2d, nn.ConvTranspose2d)
_LEAVES = (*_CONVOLUTIONS, *_NORMS, *_ACTIVATIONS, nn.Dropout, nn.Identity)
_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
_HINT = "; the reference engine trains it: --engine reference, or fastp2p.reference.train_step"

Settings = list[tuple[Hashable, ...]]


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
            raise InputError(f"engine: got a {kind}, expected a U-Net generator or a PatchGAN discriminator{_HINT}")
        self.names = dict(net.named_modules())
        for name, module in net.named_modules(remove_duplicate=False):
            self._check(name, module)
            if self.names.get(name) is not module:
                _refuse(name, module, "stands in the network twice; expected each module once")
        parameters = [id(p) for module in self.names.values() for p in module._parameters.values() if p is not None]
        if len(parameters) != len(set(parameters)):
            raise InputError(f"engine: two modules share a parameter; expected one for each{_HINT}")
        self.modules = list(self.names.values())
        self.settings = [_settings(module) for module in self.modules]

    def check_again(self) -> None:
        """Raise InputError where a setting, a mode or a hook has changed since the step was made."""
        for name, module, before in zip(self.names, self.modules, self.settings, strict=True):
            if _settings(module) != before:
                self._check(name, module)
                _refuse(name, module, "was changed after the step was made; make a new FusedStep")

    @staticmethod
    def _check(name: str, module: nn.Module) -> None:
        known = (*_NETS, UnetBlock, nn.Sequential, *_LEAVES)
        if type(module) not in known:
            _refuse(name, module, f"is not among {', '.join(kind.__name__ for kind in known)}")
        if "forward" in module.__dict__ or any(getattr(module, hooks) for hooks in _HOOKS):
            _refuse(name, module, "has a hook or a forward of its own; expected none")
        if not module.training:
            _refuse(name, module, "is in eval mode; expected training mode: call .train() first")
        if isinstance(module, _CONVOLUTIONS):
            square = all(len(set(sides)) == 1 for sides in (module.kernel_size, module.stride))
            padding = module.padding
            if (
                *(module.dilation, module.groups, module.padding_mode, module.output_padding),
                *(square, isinstance(padding, tuple) and len(set(padding)) == 1),
            ) != ((1, 1), 1, "zeros", (0, 0), True, True):
                _refuse(name, module, "expected zeros around it, equal strides and sides, no dilation and no groups")
        if isinstance(module, nn.LeakyReLU) and module.negative_slope < 0:
            _refuse(name, module, "expected a slope of 0 or more")


def check_chain(name: str, rest: Iterable[nn.Module], expected: tuple[type[nn.Module], ...]) -> None:
    """What follows a convolution must be norm, dropout, activation in this order, each once at most.

    Args:
        name: of the layer, for the error.
        rest: the modules between this convolution and the next.
        expected: the activations one of which must be there; () where there must be none.

    Raises:
        InputError: naming the module that the engine would not compute in its place.
    """
    kinds = [(_NORMS, False), ((nn.Dropout,), False), (expected, bool(expected))]
    modules = [module for module in rest if type(module) is not nn.Identity]
    for types, needed in kinds:
        if modules and type(modules[0]) in types:
            modules.pop(0)
        elif needed:
            found = repr(modules[0]) if modules else "nothing"
            names = " or ".join(kind.__name__ for kind in expected)
            raise InputError(f"engine: layer {name}: got {found} where {names} is expected{_HINT}")
    if modules:
        raise InputError(
            f"engine: layer {name}: got {modules[0]!r} where it is not computed; expected a convolution, then norm, "
            f"dropout, activation, each once at most{_HINT}"
        )


def check_optimizer(optimizer: torch.optim.Optimizer) -> None:
    """Raise InputError unless it is torch.optim.Adam itself, not one with its settings."""
    if type(optimizer) is not torch.optim.Adam:
        raise InputError(f"engine: got the optimizer {type(optimizer).__name__}, expected torch.optim.Adam{_HINT}")


def _settings(module: nn.Module) -> tuple[Hashable, ...]:
    """Everything of a module that decides what it computes, but for the values of its tensors."""
    values = module.__dict__
    own = [values[name] for name in ("negative_slope", "p", "eps", "momentum", "track_running_stats") if name in values]
    if "dilation" in values:
        own += [values[name] for name in ("dilation", "stride", "padding", "padding_mode", "groups", "output_padding")]
    children = tuple(map(id, module._modules.values()))
    hooks = any(values[hooks] for hooks in _HOOKS)
    return type(module), module.training, hooks, "forward" in values, children, *own


def _refuse(name: str, module: nn.Module, why: str) -> None:
    text = repr(module).splitlines()[0]
    raise InputError(f"engine: {name or 'the network'}: {text} {why}{_HINT}")
