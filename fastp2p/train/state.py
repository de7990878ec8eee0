"""TrainState: everything that training changes, and so everything that a checkpoint holds."""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastp2p.config import ResolvedConfig, levels_of
from fastp2p.data import Crops
from fastp2p.device import DTYPES
from fastp2p.engine import GraphedStep, LossScale
from fastp2p.errors import InputError
from fastp2p.models.gan_losses import GANLoss, Losses
from fastp2p.models.pix2pix.networks import UnetGenerator, build_netD
from fastp2p.models.pix2pix.reference import train_step
from fastp2p.models.pix2pix.step import FusedStep
from fastp2p.nn.init import init_weights
from fastp2p.nn.norm import take_statistics_of_samples
from fastp2p.train.saved import check_saved

Step = Callable[[Crops], Losses[Tensor]]


@dataclass
class TrainState:
    """Networks, optimizers and counters; the random state of the reference engine's dropout is torch's own."""

    netG: UnetGenerator
    netD: nn.Module
    optimizer_G: torch.optim.Adam
    optimizer_D: torch.optim.Adam
    loss_sums: Tensor  # (4,) float64, over the last loss_steps steps
    loss_scale: Tensor  # (2,) float32, of float16
    device: torch.device
    fingerprint: str  # of the training pairs
    loss_steps: int = 0  # since the last line of stats.jsonl
    step: int = 0
    best_val_L1: float = math.inf
    fused: FusedStep | None = None

    @classmethod
    def new(cls, config: ResolvedConfig, device: torch.device, fingerprint: str) -> "TrainState":
        """Step 0, drawn from config.seed."""
        torch.manual_seed(config.seed)
        input_nc, output_nc, norm = config.input_nc, config.output_nc, config.norm
        levels = levels_of(config.netG)
        netG = UnetGenerator(input_nc, output_nc, levels=levels, ngf=config.ngf, norm=norm, dropout=config.dropout)
        netD = build_netD(config.netD, input_nc + output_nc, ndf=config.ndf, n_layers=config.n_layers_D, norm=norm)
        for net in (netG, netD):
            init_weights(net, config.init_gain)
            if config.statistics == "sample":
                take_statistics_of_samples(net)
            net.to(device, torch.float64 if config.precision == "fp64" else torch.float32)
        optimizer_G, optimizer_D = (
            torch.optim.Adam(net.parameters(), lr=config.lr, betas=(float(config.beta1), float(config.beta2)))
            for net in (netG, netD)
        )
        loss_sums = torch.zeros(4, dtype=torch.float64, device=device)
        loss_scale = LossScale.new_state(device)
        return cls(netG, netD, optimizer_G, optimizer_D, loss_sums, loss_scale, device, fingerprint)

    def training_step(self, config: ResolvedConfig) -> Step:
        """The step of config.engine on these networks and optimizers: crops -> losses.

        Made after `restore`: the fused step moves what training changes into buffers of its own.
        """
        if config.engine == "reference":
            nets = (self.netG, self.netD, self.optimizer_G, self.optimizer_D)
            dtype = next(self.netG.parameters()).dtype
            step = functools.partial(train_step, *nets, gan_loss=GANLoss(config.gan_mode), lambda_L1=config.lambda_L1)
            return lambda crops: step(*(x.to(dtype).contiguous() for x in crops.cut(self.device)))
        fused = self.fused_step(config)
        if self.device.type == "cuda":
            return GraphedStep(fused)
        return lambda crops: fused(*crops.cut(self.device))

    def fused_step(self, config: ResolvedConfig) -> FusedStep:
        """The fused engine's step on these networks and optimizers, made at the first call."""
        if self.fused is None:
            self.fused = FusedStep(
                *(self.netG, self.netD, self.optimizer_G, self.optimizer_D),
                size=(config.crop_size, config.crop_size),
                dtype=DTYPES[config.precision],
                gan_mode=config.gan_mode,
                lambda_L1=config.lambda_L1,
                seed=config.seed,
                step=self.step,
                loss_scale=self.loss_scale,
            )
        return self.fused

    def set_lr(self, lr: float) -> None:
        """Set both optimizers' learning rate."""
        for optimizer in (self.optimizer_G, self.optimizer_D):
            for group in optimizer.param_groups:
                group["lr"] = lr

    def as_dict(self) -> dict[str, Any]:
        """What `restore` takes: tensors, numbers and strings alone."""
        on_cuda = self.device.type == "cuda"
        return {
            "step": self.step,
            "best_val_L1": self.best_val_L1,
            "loss_sums": self.loss_sums,
            "loss_steps": self.loss_steps,
            "netG": self.netG.state_dict(),
            "netD": self.netD.state_dict(),
            "optimizer_G": self.optimizer_G.state_dict(),
            "optimizer_D": self.optimizer_D.state_dict(),
            "loss_scale": self.loss_scale,
            "rng": {"cpu": torch.get_rng_state(), "cuda": torch.cuda.get_rng_state(self.device) if on_cuda else None},
            "fingerprint": self.fingerprint,
        }

    def restore(self, saved: dict[str, Any], path: Path) -> str:
        """Take over the checkpoint read from `path`.

        Returns:
            What to warn of: pictures that changed under their old names; "" for nothing.

        Raises:
            InputError: when it is of other networks or of other training pairs.
        """
        check_saved(saved, self.as_dict(), {"G": self.netG, "D": self.netD}, path)
        (names, pictures), (names_before, pictures_before) = (
            text.partition(", pictures ")[::2] for text in (self.fingerprint, str(saved["fingerprint"]))
        )
        if names != names_before:
            raise InputError(
                f"data: got {names}, but {path} was trained on {names_before} (count and hash "
                "of the names); bring the same pairs back, or start a new run"
            )
        self.netG.load_state_dict(saved["netG"])
        self.netD.load_state_dict(saved["netD"])
        self.optimizer_G.load_state_dict(saved["optimizer_G"])
        self.optimizer_D.load_state_dict(saved["optimizer_D"])
        self.loss_sums.copy_(saved["loss_sums"])
        self.loss_scale.copy_(saved["loss_scale"])
        self.loss_steps, self.step, self.best_val_L1 = saved["loss_steps"], saved["step"], saved["best_val_L1"]
        torch.set_rng_state(saved["rng"]["cpu"])
        if self.device.type == "cuda" and saved["rng"]["cuda"] is not None:
            torch.cuda.set_rng_state(saved["rng"]["cuda"], self.device)
        if pictures == pictures_before or not pictures_before:  # older versions hashed the names alone
            return ""
        return (
            f"data: pictures changed since {path} was written, under the same names, or another version of Pillow "
            "decodes them; training goes on with them as they are now, so the run is not the unbroken one"
        )

    def is_finite(self) -> bool:
        """Whether neither a loss since the last line of stats nor a weight is NaN or infinite."""
        tensors = [self.loss_sums, *self.netG.state_dict().values(), *self.netD.state_dict().values()]
        return all(bool(tensor.isfinite().all()) for tensor in tensors)
