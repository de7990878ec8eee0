"""What `fuse` makes of a model's modules: convolutions that do the whole chain, and the modules that they took in.

Each is its module of before with another class: the same object, parameters, buffers, names and attributes.
"""

from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from fastp2p.errors import InputError
from fastp2p.nn.block import Convolution, FoldCache, FoldingModule, Normalisation, run_block
from fastp2p.ops._activation import Activation

ACTIVATION_NAMES: dict[type[nn.Module], Activation] = {nn.ReLU: "relu", nn.LeakyReLU: "leaky_relu", nn.Tanh: "tanh"}


@dataclass(eq=False)
class Chain:
    """The modules that a convolution took in. Settings, mode and statistics are read from them at every call."""

    norm: Normalisation | None = None
    activation: nn.Module | None = None
    dropout: nn.Dropout | None = None
    compiled: bool = False  # it has run under torch.compile, where results cannot be marked

    def mark(self, out: Tensor) -> None:
        """Note on the result whose it is, so that the modules taken in know their own."""
        if not torch.compiler.is_compiling():
            out._fastp2p_chain = self  # type: ignore[attr-defined]
        elif torch.compiler.is_dynamo_compiling():
            # An export must not set it, since this model then runs on uncompiled: a strict one drops what is set here.
            # PyTorch 2.11's compiler answers is_exporting with True, always.
            self.compiled = True

    def made(self, out: Tensor) -> bool:
        """Whether this is a result of the chain, as far as can be told."""
        return self.compiled or getattr(out, "_fastp2p_chain", None) is self

    @property
    def modules(self) -> list[nn.Module]:
        return [module for module in (self.norm, self.activation, self.dropout) if module is not None]

    def settings(self) -> dict[str, Any]:
        """activation, slope and dropout for `run_block`."""
        names = [name for kind, name in ACTIVATION_NAMES.items() if isinstance(self.activation, kind)]
        slope = self.activation.negative_slope if isinstance(self.activation, nn.LeakyReLU) else 0.0
        dropout = self.dropout.p if self.dropout is not None and self.dropout.training else 0.0
        return {"activation": names[0] if names else "none", "slope": slope, "dropout": dropout}


class _FusedConvolution(FoldingModule):
    """Mixin: forward is the whole chain's."""

    _chain: Chain

    def _run(self, conv: Convolution, x: Tensor) -> Tensor:
        chain = self._chain
        if x.ndim == 3 and not isinstance(chain.norm, nn.BatchNorm2d):  # one image without a batch, as PyTorch allows
            out = run_block(x[None], None, conv, chain.norm, self._cache, **chain.settings())[0]
        else:
            out = run_block(x, None, conv, chain.norm, self._cache, **chain.settings())
        chain.mark(out)
        return out

    def extra_repr(self) -> str:
        return ", ".join([super().extra_repr(), *(f"+ {name_of(module)}" for module in self._chain.modules)])

    def _replicate_for_data_parallel(self) -> NoReturn:
        raise InputError("nn.DataParallel: got a fused model; expected an unfused one, or DistributedDataParallel")


class FusedConv2d(_FusedConvolution, nn.Conv2d):
    """nn.Conv2d that also does what follows it."""

    def forward(self, input: Tensor) -> Tensor:
        return self._run(self, input)


class FusedConvTranspose2d(_FusedConvolution, nn.ConvTranspose2d):
    """nn.ConvTranspose2d that also does what follows it."""

    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        if output_size is not None:
            raise InputError("FusedConvTranspose2d: got an output_size in the call, expected none; set output_padding")
        return self._run(self, input)


class _Absorbed(nn.Module):
    """Mixin: forward is the identity, since the convolution before has done the work."""

    _chain: Chain

    def forward(self, input: Tensor) -> Tensor:
        if not torch.compiler.is_compiling() and not self._chain.made(input):
            raise InputError(
                f"{type(self).__name__}: got a tensor that does not come straight from the convolution which took this "
                f"{name_of(self)} in; expected the calls that fastp2p.fuse saw. Leave this part of the model unfused"
            )
        return input

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
    before = [cls for cls, fused in _CLASSES.items() if type(module) is fused]
    return (before[0] if before else type(module)).__name__


def is_fused(module: nn.Module) -> bool:
    """Whether `fuse` has changed this module."""
    return isinstance(module, _FusedConvolution | _Absorbed)


def join(conv: nn.Module, chain: Chain, *, channels_last: bool) -> None:
    """Make conv do all of chain, in place."""
    for module in (conv, *chain.modules):
        module.__class__ = _CLASSES[type(module)]
        module.__dict__["_chain"] = chain
    conv.__dict__["_cache"] = FoldCache()
    if channels_last:
        assert isinstance(conv.weight, nn.Parameter)
        conv.weight.data = conv.weight.data.contiguous(memory_format=torch.channels_last)
