"""UnetGenerator and PatchDiscriminator as plain nn.Modules.

The architecture of Isola et al., "Image-to-Image Translation with Conditional Adversarial Networks" (CVPR 2017),
under the state_dict keys of junyanz/pytorch-CycleGAN-and-pix2pix, whose checkpoints load unchanged.
"""

from collections.abc import Callable
from typing import get_args

import torch
from torch import Tensor, nn

from fastp2p.config import MAX_LEVELS, Dropout, NetD, Norm, NormStats
from fastp2p.errors import InputError


def norm_layer(norm: Norm) -> Callable[[int], nn.Module]:
    """From channel count to normalisation layer: eps 1e-5, momentum 0.1; instance norm has no parameters."""
    layers: dict[Norm, Callable[[int], nn.Module]] = {
        "batch": nn.BatchNorm2d,
        "instance": nn.InstanceNorm2d,
        "none": lambda channels: nn.Identity(),
    }
    if norm not in layers:
        raise InputError(f"norm: got {norm!r}, expected one of {', '.join(get_args(Norm))}")
    return layers[norm]


class SampleNorm2d(nn.BatchNorm2d):
    """Batch norm over each image alone: at any batch size what nn.BatchNorm2d does at batch size 1, image by image.

    Same parameters, buffers and state_dict keys; the running averages move once for each image, in their order.
    """

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        return torch.cat([super(SampleNorm2d, self).forward(image) for image in x.split(1)])


def take_statistics_of_samples(net: nn.Module) -> None:
    """Replace every nn.BatchNorm2d in the network by a SampleNorm2d with the same parameters and buffers."""
    for module in list(net.modules()):
        for name, child in module.named_children():
            if type(child) is nn.BatchNorm2d:
                norm = SampleNorm2d(child.num_features, child.eps, child.momentum, device="meta")
                norm.load_state_dict(child.state_dict(), assign=True)
                setattr(module, name, norm)


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


def reflect_pad_to_multiple(x: Tensor, multiple: int) -> Tensor:
    """Pad the last two dimensions of x by reflection, on both sides alike, up to the next multiple.

    Unlike F.pad this reflects as often as it takes, so the padding may be longer than the image. The centre crop of
    the result is x. Returns x itself when there is nothing to pad.
    """
    for dim in (-2, -1):
        size = x.shape[dim]
        padding = -size % multiple
        if padding:
            position = torch.arange(size + padding, device=x.device) - padding // 2
            period = max(1, 2 * (size - 1))  # 0 1 2 3 2 1 | 0 1 2 3 2 1 | ...
            position = position.remainder(period)
            x = x.index_select(dim, torch.minimum(position, period - position) if size > 1 else position)
    return x


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


def init_weights(net: nn.Module, gain: float = 0.02, generator: torch.Generator | None = None) -> None:
    """Draw convolutions from N(0, gain), batch-norm weights from N(1, gain); biases are 0.

    Source: paper, appendix 6.2, for the convolutions; upstream for batch norm.
    """
    for module in net.modules():
        if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
            nn.init.normal_(module.weight, 0.0, gain, generator=generator)
        elif isinstance(module, nn.BatchNorm2d) and module.affine:
            nn.init.normal_(module.weight, 1.0, gain, generator=generator)
        else:
            continue
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def count_parameters(net: nn.Module) -> int:
    """The number of trainable scalars."""
    return sum(parameter.numel() for parameter in net.parameters())


@torch.no_grad()
def generate(netG: nn.Module, real_A: Tensor, *, norm_stats: NormStats = "image", dropout: bool = False) -> Tensor:
    """fake_B = netG(real_A) for looking at, not for training; leaves the net's mode and its statistics untouched.

    Args:
        netG: a generator.
        real_A: (N, C, H, W) in [-1, 1].
        norm_stats: what batch norm normalises with. "image": the statistics of each image alone, what upstream's
            test does at batch 1, independent of how images are batched; "batch": those of this batch together;
            "running": the averages gathered in training (eval mode). Instance norm always uses each image.
        dropout: keep the decoder's dropout on, as the paper does at test time; draws from torch's global generator.

    Returns:
        (N, output_nc, H, W) in [-1, 1].
    """
    if norm_stats not in get_args(NormStats):
        raise InputError(f"norm_stats: got {norm_stats!r}, expected one of {', '.join(get_args(NormStats))}")
    if norm_stats == "image" and len(real_A) > 1:
        images = [generate(netG, image[None], norm_stats="image", dropout=dropout) for image in real_A]
        return torch.cat(images)

    was = {module: module.training for module in netG.modules()}
    batch_norms = {module: module.track_running_stats for module in was if isinstance(module, nn.BatchNorm2d)}
    try:
        for module in was:
            module.training = dropout if isinstance(module, nn.Dropout) else False
        for module in batch_norms:
            module.training = norm_stats != "running"
            module.track_running_stats = norm_stats == "running"  # off: statistics are used but not recorded
        dtype = next(netG.parameters(), real_A).dtype  # float64 in proofs
        fake_B: Tensor = netG(real_A.to(dtype)).to(real_A.dtype)
        return fake_B
    finally:
        for module, training in was.items():
            module.training = training
        for module, tracks in batch_norms.items():
            module.track_running_stats = tracks
