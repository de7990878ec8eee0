"""TrainState: everything that training changes, and so everything that a checkpoint holds."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastp2p.config import ResolvedConfig
from fastp2p.data import Crops
from fastp2p.engine import GraphedStep, LossScale
from fastp2p.engine.step import LossValues, Step
from fastp2p.errors import InputError
from fastp2p.models import registry
from fastp2p.models.base import Model
from fastp2p.train.saved import check_saved, of_earlier_versions


@dataclass
class TrainState:
    """Networks, optimizers and counters; the random state of the reference engine's dropout is torch's own."""

    model: Model[Any]
    options: dict[str, Any]  # the model's
    nets: dict[str, nn.Module]
    optimizers: dict[str, torch.optim.Adam]
    loss_sums: Tensor  # float64, one for each of the model's losses, over the last loss_steps steps
    loss_scale: Tensor  # (2,) float32, of float16
    device: torch.device
    fingerprint: str  # the training pairs'
    loss_steps: int = 0  # since the last line of stats.jsonl
    step: int = 0
    best_score: float = math.inf  # validation's, so far
    step_of_the_engine: Step | None = None

    @classmethod
    def new(cls, config: ResolvedConfig, device: torch.device, fingerprint: str) -> "TrainState":
        """Step 0, drawn from config.seed."""
        model = registry.find(config.model)
        torch.manual_seed(config.seed)
        nets = model.nets(config)
        for net in nets.values():
            net.to(device, torch.float64 if config.precision == "fp64" else torch.float32)
        optimizers = model.optimizers(config, nets)
        loss_sums = torch.zeros(len(model.losses), dtype=torch.float64, device=device)
        loss_scale = LossScale.new_state(device)
        return cls(model, model.own_options(config), nets, optimizers, loss_sums, loss_scale, device, fingerprint)

    def training_step(self, config: ResolvedConfig) -> Callable[[Crops], LossValues]:
        """The step of config.engine on these networks and optimizers: crops -> losses.

        Made after `restore`: the engines move what training changes into buffers of their own.
        """
        if config.engine == "reference":
            dtype = next(parameter.dtype for net in self.nets.values() for parameter in net.parameters())

            def reference(crops: Crops) -> LossValues:
                batch = {name: images.to(dtype).contiguous() for name, images in crops.cut(self.device).items()}
                return self.model.reference_step(config, self.nets, self.optimizers, batch)

            return reference
        step = self.engine_step(config)
        if self.device.type == "cuda":
            return GraphedStep(step)
        return lambda crops: step.train(crops.cut(self.device, step.image_dtypes))

    def engine_step(self, config: ResolvedConfig) -> Step:
        """The step of config.engine, which is not the reference, made at the first call."""
        if self.step_of_the_engine is None:
            players = (config, self.nets, self.optimizers)
            self.step_of_the_engine = self.model.step(*players, step=self.step, loss_scale=self.loss_scale)
        return self.step_of_the_engine

    @property
    def lr(self) -> float:
        """The learning rate of all optimizers."""
        return float(next(iter(self.optimizers.values())).param_groups[0]["lr"])

    @lr.setter
    def lr(self, lr: float) -> None:
        for optimizer in self.optimizers.values():
            for group in optimizer.param_groups:
                group["lr"] = lr

    def as_dict(self) -> dict[str, Any]:
        """What `restore` takes: tensors, numbers and strings alone."""
        on_cuda = self.device.type == "cuda"
        return {
            "model": self.model.name,
            "options": self.options,
            "step": self.step,
            "best_score": self.best_score,
            "loss_sums": self.loss_sums,
            "loss_steps": self.loss_steps,
            **{name: net.state_dict() for name, net in self.nets.items()},
            **{name: optimizer.state_dict() for name, optimizer in self.optimizers.items()},
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
        saved = of_earlier_versions(saved, self.options)
        check_saved(saved, self.as_dict(), self.nets, self.optimizers, path)
        (names, pictures), (names_before, pictures_before) = (
            text.partition(", pictures ")[::2] for text in (self.fingerprint, str(saved["fingerprint"]))
        )
        if names != names_before:
            raise InputError(
                f"data: got {names}, but {path} was trained on {names_before} (count and hash "
                "of the names); bring the same pairs back, or start a new run"
            )
        for name, net in self.nets.items():
            net.load_state_dict(saved[name])
        for name, optimizer in self.optimizers.items():
            optimizer.load_state_dict(saved[name])
        self.loss_sums.copy_(saved["loss_sums"])
        self.loss_scale.copy_(saved["loss_scale"])
        self.loss_steps, self.step, self.best_score = saved["loss_steps"], saved["step"], saved["best_score"]
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
        tensors = [self.loss_sums, *(tensor for net in self.nets.values() for tensor in net.state_dict().values())]
        return all(bool(tensor.isfinite().all()) for tensor in tensors)
