"""ConvNormAct and UpConvNormAct: a convolution with all that follows it, and the PatchGAN's loss, as modules."""

from typing import Any, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastp2p import ops
from fastp2p.errors import InputError
from fastp2p.nn.block import Convolution, Normalisation, run_block
from fastp2p.nn.norm import Norm
from fastp2p.ops.activation import ACTIVATIONS, Activation, activate, activation_index
from fastp2p.ops.objectives import OBJECTIVES, GanMode


class _Block(nn.Module):
    """What both layers share: the owners of the parameters and the settings of what comes after."""

    def __init__(
        self,
        conv: Convolution,
        norm: Norm,
        affine: bool | None,
        eps: float,
        momentum: float,
        track_running_stats: bool,
        activation: Activation,
        slope: float,
        dropout: float,
    ):
        super().__init__()
        name = type(self).__name__
        activation_index(name, activation, slope)
        if not 0 <= dropout < 1:
            raise InputError(f"{name}: got dropout {dropout}, expected 0 to below 1")
        if norm not in get_args(Norm):
            raise InputError(f"{name}: got norm {norm!r}, expected one of {', '.join(get_args(Norm))}")
        self.conv = conv
        conv.weight.data = conv.weight.data.contiguous(memory_format=torch.channels_last)
        self.norm: Normalisation | None = None
        if norm == "batch":
            affine = affine is not False
            self.norm = nn.BatchNorm2d(conv.out_channels, eps, momentum, affine, track_running_stats)
        elif norm == "instance":
            self.norm = nn.InstanceNorm2d(conv.out_channels, eps, affine=bool(affine))
        self.activation: Activation = activation
        self.slope = slope
        self.dropout = dropout

    def _run(self, x: Tensor, skip: Tensor | None) -> Tensor:
        settings: dict[str, Any] = {"activation": self.activation, "slope": self.slope}
        dropout = self.dropout if self.training else 0.0
        if torch.jit.is_tracing() or (x.ndim == 4 and x.shape[0] == 0):  # type: ignore[attr-defined]
            # A trace would keep the sizes that operators get as numbers, and no kernel takes an empty batch.
            out = self.conv(x if skip is None else torch.cat([skip, x], 1))
            out = out if self.norm is None else self.norm(out)
            out = activate(out, ACTIVATIONS.index(self.activation), self.slope)
            return F.dropout(out, dropout) if dropout else out
        return run_block(x, skip, self.conv, self.norm, dropout=dropout, **settings)

    def extra_repr(self) -> str:
        slope = f", slope={self.slope}" if self.activation == "leaky_relu" else ""
        dropout = f", dropout={self.dropout}" if self.dropout else ""
        return f"activation={self.activation}{slope}{dropout}"


class ConvNormAct(_Block):
    """drop(act(norm(conv(x)))): (N, in_channels, H, W) -> (N, out_channels, H', W').

    In training the convolution gathers the statistics while it writes, and one more pass does the rest. Without a norm
    it is one operator; so it is in eval mode with running statistics, unless the weight is larger than the result.
    Parameters, buffers, their initialisation and their names are those of nn.Conv2d in `conv` and nn.BatchNorm2d or
    nn.InstanceNorm2d in `norm`; those modules are not called themselves, so a hook on them does not fire (but for an
    empty batch and under torch.jit.trace). The result is channels_last, of x's dtype or autocast's.

    The gradient can be taken once: a gradient penalty, which differentiates it again, raises.

    Args:
        in_channels, out_channels, kernel_size, stride, padding: as for nn.Conv2d, strides and padding alike in both
            dimensions; the defaults halve the side, as pix2pix does.
        bias: of the convolution. Left out, it is there unless norm is "batch", whose own shift replaces it. (Instance
            norm cancels it too, but upstream's checkpoints have it.)
        norm: "batch", "instance" or "none".
        affine: whether the norm has weight and bias; left out, batch norm does and instance norm does not.
        eps, momentum, track_running_stats: of the norm, the last two of batch norm alone, which without running
            statistics uses the batch's in eval mode too.
        activation: "none", "relu", "leaky_relu" or "tanh".
        slope: leaky_relu's, on the negative side.
        dropout: probability, 0 to below 1; in training. torch.manual_seed repeats it; the mask is not nn.Dropout's.

    Raises:
        InputError: on an unknown name or an impossible number; in forward on an input that does not fit, or when
            the norm would see one value per channel.

    Source: Isola et al. 2017, appendix 6.1, "Ck" and "CDk".
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int] = 4,
        stride: int = 2,
        padding: int = 1,
        *,
        bias: bool | None = None,
        norm: Norm = "batch",
        affine: bool | None = None,
        eps: float = 1e-5,
        momentum: float = 0.1,
        track_running_stats: bool = True,
        activation: Activation = "none",
        slope: float = 0.2,
        dropout: float = 0.0,
    ):
        bias = norm != "batch" if bias is None else bias
        conv = nn.Conv2d(in_channels, out_channels, kernel_size, stride, padding, bias=bias)
        super().__init__(conv, norm, affine, eps, momentum, track_running_stats, activation, slope, dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self._run(x, None)


class UpConvNormAct(_Block):
    """drop(act(norm(conv_transpose(cat([skip, x], 1))))): the side doubles with the defaults.

    The concatenation, in pix2pix's order, is not written: the operator reads both tensors where they are. Everything
    else is as for `ConvNormAct`, with nn.ConvTranspose2d in `conv`.

    Args:
        in_channels: of skip and x together.
        output_padding: as for nn.ConvTranspose2d, alike in both dimensions, below stride.
        others: as for `ConvNormAct`.

    Args of forward:
        x: (N, in_channels - C2, H, W).
        skip: (N, C2, H, W) or None for C2 = 0.

    Source: Isola et al. 2017, appendix 6.1.1, the U-Net's decoder.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int] = 4,
        stride: int = 2,
        padding: int = 1,
        output_padding: int = 0,
        *,
        bias: bool | None = None,
        norm: Norm = "batch",
        affine: bool | None = None,
        eps: float = 1e-5,
        momentum: float = 0.1,
        track_running_stats: bool = True,
        activation: Activation = "none",
        slope: float = 0.2,
        dropout: float = 0.0,
    ):
        bias = norm != "batch" if bias is None else bias
        window = (kernel_size, stride, padding, output_padding)
        conv = nn.ConvTranspose2d(in_channels, out_channels, *window, bias=bias)
        super().__init__(conv, norm, affine, eps, momentum, track_running_stats, activation, slope, dropout)

    def forward(self, x: Tensor, skip: Tensor | None = None) -> Tensor:
        return self._run(x, skip)


class PatchGANLoss(nn.Module):
    """The adversarial loss of a map of logits, averaged over the map, for either player, its gradient in the same pass.

        vanilla   BCE with logits against 1 (real) or 0 (fake)                        Goodfellow et al. 2014
        lsgan     squared distance of the logit to 1 or 0                             Mao et al. 2017
        hinge     D: max(0, 1 - logit) on real, max(0, 1 + logit) on fake; G: -logit  Lim and Ye 2017

    The same as `fastp2p.GANLoss`, in float32 also for logits in half precision. Differentiable once.

    Args:
        gan_mode: "vanilla", "lsgan" or "hinge".

    Args of forward:
        logits: (N, 1, H, W), or any shape; floating.
        target_is_real: what the player wants D to say of these patches.
        for_discriminator: which player; matters to hinge alone.

    Returns of forward:
        () float32 (float64 for float64).

    Raises:
        InputError: on an unknown gan_mode, or logits without elements.
    """

    def __init__(self, gan_mode: GanMode = "vanilla"):
        super().__init__()
        if gan_mode not in list(OBJECTIVES):
            raise InputError(f"gan_mode: got {gan_mode!r}, expected one of {', '.join(OBJECTIVES)}")
        self.gan_mode = gan_mode

    def forward(self, logits: Tensor, target_is_real: bool, *, for_discriminator: bool = True) -> Tensor:
        objective = OBJECTIVES[self.gan_mode]
        real, fake = objective.D_real, objective.D_fake
        if not for_discriminator:
            real, fake = objective.G, objective.G._replace(value=fake.value)
        kind, value = real if target_is_real else fake
        loss, _ = ops.patch_loss(logits, kind, target=value)
        return loss

    def extra_repr(self) -> str:
        return f"gan_mode={self.gan_mode}"
