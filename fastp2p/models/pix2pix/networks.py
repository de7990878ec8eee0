"""UnetGenerator and PatchDiscriminator as plain nn.Modules.

The architecture of Isola et al., "Image-to-Image Translation with Conditional Adversarial Networks" (CVPR 2017),
under the state_dict keys of junyanz/pytorch-CycleGAN-and-pix2pix, whose checkpoints load unchanged.
"""

import re
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from fastp2p.errors import InputError
from fastp2p.nn.norm import Norm, norm_layer
from fastp2p.nn.padding import reflect_pad_to_multiple

Dropout = Literal["upstream", "paper", "none"]
NetD = Literal["basic", "n_layers", "pixel"]
MAX_LEVELS = 12  # 4096 px; a deeper U-Net would only see padding


def levels_of(netG: str) -> int:
    """Number of U-Net levels of a name: unet_256 has 8, unet_128 has 7, unet_S has log2(S)."""
    match = re.fullmatch(r"unet_(\d+)", netG)
    side = int(match[1]) if match else 0
    if side < 4 or side > 2**MAX_LEVELS or side & (side - 1):
        raise InputError(f"netG: got {netG!r}, expected unet_S with S a power of two from 4 to 4096, such as unet_256")
    return side.bit_length() - 1


class UnetBlock(nn.Module):
    """One level of the U-Net: halve the side, run the level below, double the side, concatenate [x, up].

    The Sequential's indices are the checkpoint's key names, so activations keep a place of their own. Upstream's
    LeakyReLU works in place on the skip tensor; since relu(leaky_relu(x)) = relu(x), in value and in gradient, this
    out-of-place form gives the same bits.
    """

    def __init__(
        self,
        outer: int,
        inner: int,
        *,
        below: nn.Module | None,
        norm: Norm,
        use_dropout: bool = False,
        in_channels: int | None = None,
    ):
        super().__init__()
        self.outermost = in_channels is not None  # the one level whose input is no output of another
        bias = norm == "instance"  # batch norm's shift replaces it; upstream leaves it out for "none" too
        down = nn.Conv2d(outer if in_channels is None else in_channels, inner, 4, stride=2, padding=1, bias=bias)
        up_bias = bias or self.outermost
        up = nn.ConvTranspose2d(inner * (2 if below else 1), outer, 4, stride=2, padding=1, bias=up_bias)

        make_norm = norm_layer(norm)
        before = [] if self.outermost else [nn.LeakyReLU(0.2)]
        after_down = [] if self.outermost or below is None else [make_norm(inner)]
        after_up = [nn.Tanh()] if self.outermost else [make_norm(outer)]
        dropout = [nn.Dropout(0.5)] if use_dropout else []
        middle = [] if below is None else [below]
        self.model = nn.Sequential(*before, down, *after_down, *middle, nn.ReLU(), up, *after_up, *dropout)

    def forward(self, x: Tensor) -> Tensor:
        up = self.model(x)
        return up if self.outermost else torch.cat([x, up], dim=1)


class UnetGenerator(nn.Module):
    """The U-Net generator: (N, input_nc, H, W) in [-1, 1] -> (N, output_nc, H, W) in (-1, 1).

    H and W may be anything from 1 up: sides that are no multiple of 2**levels are padded by reflection and the output
    is cropped. unet_256 with the default widths has 54,413,955 parameters.

    Args:
        input_nc, output_nc: channels of the input and the output image.
        levels: how often the side is halved; 8 for unet_256, 7 for unet_128, at least 2.
        ngf: channels of the first level; level i has ngf * min(2**(i-1), 8).
        norm: "batch", "instance" or "none".
        dropout: where the decoder's Dropout(0.5) sits. "upstream": on d(levels-1) ... d5; "paper": one level deeper,
            on the three innermost (Isola et al., appendix 6.1.1); "none".
    """

    def __init__(
        self,
        input_nc: int = 3,
        output_nc: int = 3,
        *,
        levels: int = 8,
        ngf: int = 64,
        norm: Norm = "batch",
        dropout: Dropout = "upstream",
    ):
        super().__init__()
        if not 2 <= levels <= MAX_LEVELS:
            raise InputError(f"levels: got {levels}, expected 2 to {MAX_LEVELS}")
        if dropout not in get_args(Dropout):
            raise InputError(f"dropout: got {dropout!r}, expected one of {', '.join(get_args(Dropout))}")
        self.levels = levels
        with_dropout = {"upstream": range(5, levels), "paper": range(levels - 2, levels + 1), "none": range(0)}[dropout]

        block = None
        for level in range(levels, 1, -1):  # from the innermost outwards
            outer, inner = (ngf * min(2**i, 8) for i in (level - 2, level - 1))
            block = UnetBlock(outer, inner, below=block, norm=norm, use_dropout=level in with_dropout)
        self.model = UnetBlock(output_nc, ngf, below=block, norm=norm, in_channels=input_nc)

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[-2:]
        top, left = (-height % 2**self.levels // 2, -width % 2**self.levels // 2)
        y: Tensor = self.model(reflect_pad_to_multiple(x, 2**self.levels))
        return y[..., top : top + height, left : left + width]


class PatchDiscriminator(nn.Module):
    """The PatchGAN: cat(A, B) (N, input_nc, H, W) -> logits (N, 1, H', W'), one per patch, without sigmoid.

    With n_layers = 1 / 2 / 3 / 4 / 5 a logit sees 16 / 34 / 70 / 142 / 286 pixels; n_layers = 3 is the paper's
    70x70, 256² -> 30², 2,768,705 parameters. See `PixelDiscriminator` for the 1x1 net.

    Args:
        input_nc: channels of A and B together.
        ndf: channels of the first layer; layer i has ndf * min(2**i, 8).
        n_layers: strided convolutions, 1 to 5.
        norm: "batch", "instance" or "none".
    """

    def __init__(self, input_nc: int = 6, *, ndf: int = 64, n_layers: int = 3, norm: Norm = "batch"):
        super().__init__()
        if not 1 <= n_layers <= 5:
            raise InputError(f"n_layers: got {n_layers}, expected 1 to 5")
        make_norm, bias = norm_layer(norm), norm == "instance"

        layers: list[nn.Module] = [nn.Conv2d(input_nc, ndf, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        channels = ndf
        for i in range(1, n_layers + 1):
            previous, channels = channels, ndf * min(2**i, 8)
            stride = 2 if i < n_layers else 1
            layers += [nn.Conv2d(previous, channels, 4, stride=stride, padding=1, bias=bias), make_norm(channels)]
            layers += [nn.LeakyReLU(0.2)]
        layers += [nn.Conv2d(channels, 1, 4, stride=1, padding=1)]
        self.model = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.model(x)
        return logits


class PixelDiscriminator(nn.Module):
    """The 1x1 PatchGAN ("pixel"): each pixel of cat(A, B) judged alone. 9,024 parameters at the default widths."""

    def __init__(self, input_nc: int = 6, *, ndf: int = 64, norm: Norm = "batch"):
        super().__init__()
        bias = norm == "instance"
        self.net = nn.Sequential(
            nn.Conv2d(input_nc, ndf, 1),
            nn.LeakyReLU(0.2),
            nn.Conv2d(ndf, 2 * ndf, 1, bias=bias),
            norm_layer(norm)(2 * ndf),
            nn.LeakyReLU(0.2),
            nn.Conv2d(2 * ndf, 1, 1, bias=bias),
        )

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.net(x)
        return logits


def build_netD(netD: NetD, input_nc: int, *, ndf: int, n_layers: int, norm: Norm) -> nn.Module:
    """A discriminator by name: "basic" is the 70x70 PatchGAN, "n_layers" of any depth, "pixel" the 1x1 net."""
    if netD == "pixel":
        return PixelDiscriminator(input_nc, ndf=ndf, norm=norm)
    return PatchDiscriminator(input_nc, ndf=ndf, n_layers=3 if netD == "basic" else n_layers, norm=norm)
