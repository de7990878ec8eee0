"""pix2pix as the trainer and the commands see it."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import ClassVar, cast

import torch
from torch import Tensor, nn

from fastp2p.config import RunConfig, Settings
from fastp2p.device import DTYPES
from fastp2p.engine.step import Batch, LossValues
from fastp2p.models.base import Curves, Model, Nets, Optimizers
from fastp2p.models.gan_losses import GANLoss
from fastp2p.models.generate import generate
from fastp2p.models.generator_spec import GeneratorSpec
from fastp2p.models.metrics import METRICS, evaluate_generator
from fastp2p.models.pix2pix.generator import UnetGeneratorSpec
from fastp2p.models.pix2pix.losses import Losses, read_losses
from fastp2p.models.pix2pix.networks import UnetGenerator, build_netD, levels_of
from fastp2p.models.pix2pix.options import Pix2PixConfig, Pix2PixOptions, ResolvedPix2Pix
from fastp2p.models.pix2pix.reference import train_step
from fastp2p.models.pix2pix.step import FusedStep
from fastp2p.models.reading import Reading
from fastp2p.nn.init import count_parameters, init_weights
from fastp2p.nn.norm import take_statistics_of_samples
from fastp2p.ops.objectives import OBJECTIVES


class Pix2Pix(Model[ResolvedPix2Pix]):
    """Isola et al. 2017: a generator netG, and a discriminator netD of pairs."""

    name: ClassVar[str] = "pix2pix"
    options: ClassVar[type[Settings]] = Pix2PixOptions
    config: ClassVar[type[RunConfig]] = Pix2PixConfig
    generator_spec: ClassVar[type[GeneratorSpec]] = UnetGeneratorSpec
    losses: ClassVar[tuple[str, ...]] = Losses._fields
    scores: ClassVar[tuple[str, ...]] = METRICS

    def nets(self, config: ResolvedPix2Pix) -> dict[str, nn.Module]:
        input_nc, output_nc, norm, levels = config.input_nc, config.output_nc, config.norm, levels_of(config.netG)
        netG = UnetGenerator(input_nc, output_nc, levels=levels, ngf=config.ngf, norm=norm, dropout=config.dropout)
        netD = build_netD(config.netD, input_nc + output_nc, ndf=config.ndf, n_layers=config.n_layers_D, norm=norm)
        for net in (netG, netD):
            init_weights(net, config.init_gain)
            if config.statistics == "sample":
                take_statistics_of_samples(net)
        return {"netG": netG, "netD": netD}

    def optimizers(self, config: ResolvedPix2Pix, nets: Nets) -> dict[str, torch.optim.Adam]:
        betas = (float(config.beta1), float(config.beta2))
        return {
            optimizer: torch.optim.Adam(nets[net].parameters(), lr=config.lr, betas=betas)
            for optimizer, net in (("optimizer_G", "netG"), ("optimizer_D", "netD"))
        }

    def reference_step(self, config: ResolvedPix2Pix, nets: Nets, optimizers: Optimizers, batch: Batch) -> LossValues:
        players = (nets["netG"], nets["netD"], optimizers["optimizer_G"], optimizers["optimizer_D"])
        gan_loss = GANLoss(config.gan_mode)
        return train_step(*players, batch["A"], batch["B"], gan_loss=gan_loss, lambda_L1=config.lambda_L1)._asdict()

    def fused_step(
        self, config: ResolvedPix2Pix, nets: Nets, optimizers: Optimizers, *, step: int, loss_scale: Tensor
    ) -> FusedStep:
        return FusedStep(
            *(_netG(nets), nets["netD"], optimizers["optimizer_G"], optimizers["optimizer_D"]),
            size=(config.crop_size, config.crop_size),
            dtype=DTYPES[config.precision],
            gan_mode=config.gan_mode,
            lambda_L1=config.lambda_L1,
            seed=config.seed,
            step=step,
            loss_scale=loss_scale,
        )

    def panel(self, nets: Nets, batch: Batch) -> dict[str, Tensor]:
        return {"input": batch["A"], "output": generate(nets["netG"], batch["A"]), "target": batch["B"]}

    def score(self, nets: Nets, batches: Iterable[Batch]) -> dict[str, float]:
        values = evaluate_generator(nets["netG"], batches)
        return {name: sum(values[name]) / len(values[name]) for name in METRICS}

    def read(self, losses: Mapping[str, float], config: ResolvedPix2Pix) -> Reading:
        return read_losses(Losses(**losses), config.gan_mode)

    def status(self, losses: Mapping[str, float]) -> str:
        return "G {loss_G_GAN:.2f} L1 {loss_G_L1:.1f} D {loss_D_real:.2f} {loss_D_fake:.2f}".format(**losses)

    def curves(self, config: ResolvedPix2Pix) -> list[Curves]:
        balance = OBJECTIVES[config.gan_mode].balance
        adversarial = ("loss_D_real", "loss_D_fake", "loss_G_GAN")
        return [
            Curves("adversarial losses", adversarial, balance, f"balance ({balance:.2g})"),
            Curves("L1 loss, times lambda_L1", ("loss_G_L1",)),
        ]

    def generators(self, config: ResolvedPix2Pix, nets: Nets, step: int) -> dict[str, tuple[nn.Module, GeneratorSpec]]:
        spec = UnetGeneratorSpec(
            levels=_netG(nets).levels,
            ngf=config.ngf,
            input_nc=config.input_nc,
            output_nc=config.output_nc,
            norm=config.norm,
            dropout=config.dropout,
            direction=config.direction,
            crop_size=config.crop_size,
            data=config.data if config.data.startswith("builtin:") else Path(config.data).resolve().name,
            step=step,
        )
        return {"netG": (nets["netG"], spec)}

    def describe(self, config: ResolvedPix2Pix, nets: Nets) -> list[str]:
        dropouts = sum(isinstance(module, nn.Dropout) for module in nets["netG"].modules())
        lines = [
            f"netG {config.netG}, ngf {config.ngf}: {count_parameters(nets['netG']):,} parameters, {dropouts} "
            f"dropouts; netD {config.netD}, ndf {config.ndf}: {count_parameters(nets['netD']):,} parameters; "
            f"loss: {config.gan_mode} + {config.lambda_L1:g} L1"
        ]
        size, multiple = config.crop_size, 2 ** _netG(nets).levels
        if size % multiple:
            padded = -(-size // multiple) * multiple
            lines.append(f"netG pads {size} px to {padded}, the next multiple of {multiple}, and works at that size")
        return lines

    def summary(self, config: ResolvedPix2Pix) -> str:
        layers = f", n_layers_D {config.n_layers_D}" if config.netD == "n_layers" else ""
        return f"{config.netG}, ngf {config.ngf}; netD {config.netD}{layers}, ndf {config.ndf}; norm {config.norm}"


def _netG(nets: Nets) -> UnetGenerator:
    return cast(UnetGenerator, nets["netG"])


MODEL = Pix2Pix()
