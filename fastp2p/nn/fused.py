"""What `fuse` makes of a model's modules: convolutions that do the whole chain, and the modules that they took in.

Each is its module of before with another class: the same object, parameters, buffers, names and attributes.
"""

from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import Tensor, fx, nn

from fastp2p.errors import InputError
from fastp2p.nn.block import Convolution, Normalisation, run_block
from fastp2p.nn.scope import Parcel, Scope
from fastp2p.nn.settings import has_global_hooks, has_hooks, refusal
from fastp2p.ops.activation import Activation

ACTIVATION_NAMES: dict[type[nn.Module], Activation] = {nn.ReLU: "relu", nn.LeakyReLU: "leaky_relu", nn.Tanh: "tanh"}


@dataclass(eq=False)
class Chain:
    """The modules that a convolution took in. Settings, mode and statistics are read from them at every call."""

    names: tuple[str, ...]  # the convolution's and these modules', for errors
    scope: Scope  # the module whose forward calls them all
    between: tuple[nn.Module, ...] = ()  # modules whose forwards begin or end within the chain
    norm: Normalisation | None = None
    activation: nn.Module | None = None
    dropout: nn.Dropout | None = None

    @property
    def modules(self) -> list[nn.Module]:
        return [module for module in (self.norm, self.activation, self.dropout) if module is not None]

    def serves(self, conv: Convolution, x: Tensor) -> bool:
        """Whether the operators may do this call; where not, each module does its own part, as if never fused."""
        if isinstance(x, fx.Proxy):
            raise InputError("torch.fx: got a fused model; call fastp2p.unfuse(model) first")
        if not self.scope.running or not isinstance(x, Tensor) or x.ndim != 4 or x.numel() == 0:
            return False
        if torch.jit.is_tracing():  # type: ignore[attr-defined]  # a trace would keep today's sizes for good
            return False
        if has_global_hooks() or any(has_hooks(module) for module in self.between):
            return False
        return _fits(self.norm, conv) and not any(refusal(module) for module in (conv, *self.modules))

    def settings(self) -> dict[str, Any]:
        """activation, slope and dropout for `run_block`."""
        names = [name for kind, name in ACTIVATION_NAMES.items() if isinstance(self.activation, kind)]
        slope = self.activation.negative_slope if isinstance(self.activation, nn.LeakyReLU) else 0.0
        dropout = self.dropout.p if self.dropout is not None and self.dropout.training else 0.0
        return {"activation": names[0] if names else "none", "slope": slope, "dropout": dropout}


def _fits(norm: Normalisation | None, conv: Convolution) -> bool:
    """Whether a norm is for this convolution's channels and dtype; float32 goes with half precision, too."""
    if norm is None:
        return True
    tensors = (norm.weight, norm.bias, norm.running_mean, norm.running_var)
    dtypes = {conv.weight.dtype} | ({torch.float32} if conv.weight.dtype.itemsize < 4 else set())
    return norm.num_features == conv.out_channels and all(t is None or t.dtype in dtypes for t in tensors)


class _FusedConvolution(nn.Module):
    """Mixin: forward is the whole chain's where its operators serve, and the convolution's alone elsewhere."""

    _chain: Chain

    def _run_chain(self, conv: Convolution, x: Tensor) -> Parcel:
        chain = self._chain
        result = run_block(x, None, conv, chain.norm, **chain.settings())
        return Parcel(result, chain.scope, chain.modules, chain.names)

    def extra_repr(self) -> str:
        return ", ".join([super().extra_repr(), *(f"+ {name_of(module)}" for module in self._chain.modules)])

    def _replicate_for_data_parallel(self) -> NoReturn:
        advice = "call fastp2p.unfuse(model) first, or use DistributedDataParallel"
        raise InputError(f"nn.DataParallel: got a fused model; {advice}")

    def __prepare_scriptable__(self) -> NoReturn:  # asked by torch.jit.script
        raise InputError("torch.jit.script: got a fused model; call fastp2p.unfuse(model) first")


class FusedConv2d(_FusedConvolution, nn.Conv2d):
    """nn.Conv2d that also does what follows it."""

    def forward(self, input: Tensor) -> Any:
        return self._run_chain(self, input) if self._chain.serves(self, input) else super().forward(input)


class FusedConvTranspose2d(_FusedConvolution, nn.ConvTranspose2d):
    """nn.ConvTranspose2d that also does what follows it."""

    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Any:
        serves = output_size is None and self._chain.serves(self, input)
        return self._run_chain(self, input) if serves else super().forward(input, output_size)


class _Absorbed(nn.Module):
    """Mixin: forward passes on what the convolution before has done, and does its own part of anything else."""

    _chain: Chain

    def forward(self, input: Any) -> Any:
        return input.through(self) if isinstance(input, Parcel) else super().forward(input)

    def extra_repr(self) -> str:
        return ", ".join(filter(None, [super().extra_repr(), "done by the convolution before"]))


class AbsorbedBatchNorm2d(_Absorbed, nn.BatchNorm2d):
    """nn.BatchNorm2d that still owns its parameters, statistics and mode."""


class AbsorbedInstanceNorm2d(_Absorbed, nn.InstanceNorm2d):
    """nn.InstanceNorm2d that still owns its parameters."""


class AbsorbedReLU(_Absorbed, nn.ReLU):
    """nn.ReLU."""


class AbsorbedLeakyReLU(_Absorbed, nn.LeakyReLU):
    """nn.LeakyReLU that still owns its slope."""


class AbsorbedTanh(_Absorbed, nn.Tanh):
    """nn.Tanh."""


class AbsorbedDropout(_Absorbed, nn.Dropout):
    """nn.Dropout that still owns its probability and mode."""


_CLASSES: dict[type[nn.Module], type[nn.Module]] = {
    nn.Conv2d: FusedConv2d,
    nn.ConvTranspose2d: FusedConvTranspose2d,
    nn.BatchNorm2d: AbsorbedBatchNorm2d,
    nn.InstanceNorm2d: AbsorbedInstanceNorm2d,
    nn.ReLU: AbsorbedReLU,
    nn.LeakyReLU: AbsorbedLeakyReLU,
    nn.Tanh: AbsorbedTanh,
    nn.Dropout: AbsorbedDropout,
}


def name_of(module: nn.Module) -> str:
    """The name of a module's class, before fusion if it was fused."""
    return (plain_class(module) or type(module)).__name__


def is_fused(module: nn.Module) -> bool:
    """Whether `fuse` has changed this module."""
    return isinstance(module, _FusedConvolution | _Absorbed)


def join(conv: nn.Module, chain: Chain, *, channels_last: bool) -> None:
    """Let conv do all of chain, in place."""
    for module in (conv, *chain.modules):
        module.__class__ = _CLASSES[type(module)]
        module.__dict__["_chain"] = chain
    if channels_last:
        assert isinstance(conv.weight, nn.Parameter)
        conv.__dict__["_was_contiguous"] = conv.weight.is_contiguous()
        conv.weight.data = conv.weight.data.contiguous(memory_format=torch.channels_last)


def plain_class(module: nn.Module) -> type[nn.Module] | None:
    """The class that a fused module had before; None where something has replaced the fused one since."""
    return next((before for before, fused in _CLASSES.items() if type(module) is fused), None)


def part(module: nn.Module) -> None:
    """Make a fused module what it was before, in place; the others of its chain do their own parts from now on."""
    before = plain_class(module)
    assert before is not None
    module.__class__ = before
    module.__dict__.pop("_chain").scope = Scope()  # which never runs
    if module.__dict__.pop("_was_contiguous", False):
        assert isinstance(module.weight, nn.Parameter)
        module.weight.data = module.weight.data.contiguous()
