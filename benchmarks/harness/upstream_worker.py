"""The official implementation from a checkout of its own, in a process of its own: see worker.py for how it is asked.

    python -m harness.upstream_worker CHECKOUT [--device cpu|cuda] [--scale paper|tiny]

Its modules are called data, models, options and util, so nothing of ours by these names may be imported here. Between
its loader and its optimize_parameters() there is nothing; the prints, pages and checkpoints of its train.py are left
out.
"""

import itertools
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from harness.epochs import check_count
from harness.providers import Scale
from harness.worker import SETTLING, Answer, Measured, Unit, images, moments, serve


class Upstream(Measured):
    """The official pix2pix, as its own options make it."""

    def __init__(self, checkout: str, device: torch.device, scale: Scale):
        super().__init__(device)
        sys.path.insert(0, checkout)
        self.checkout, self.scale = Path(checkout), scale
        self.folder = tempfile.TemporaryDirectory(prefix="fastp2p-upstream-")  # for what it writes

    def check(self, batch: int, data: str, weights: str) -> Answer:
        """The first step's losses and moments on images and weights that others take, too, without dropout.

        Args:
            weights: file to write the weights to.
        """
        model = self._model(self._options(batch, data, "AtoB", "--no_dropout"))
        nets = [getattr(net, "module", net) for net in (model.netG, model.netD)]  # older ones wrap them on a GPU
        torch.save({name: net.state_dict() for name, net in zip(("netG", "netD"), nets, strict=True)}, weights)
        sets = images(self.scale, batch, self.device)
        losses = self._losses(model, *sets[0])
        answer = {"losses": losses} | moments(nets, (model.optimizer_G, model.optimizer_D))
        for pair in sets[1 : 1 + SETTLING[self.device.type]]:
            losses = self._losses(model, *pair)
        return answer | {"later losses": losses}

    def _losses(self, model: Any, real_A: Tensor, real_B: Tensor) -> list[float]:
        """The losses of a step on these images."""
        model.set_input({"A": real_A, "B": real_B, "A_paths": [], "B_paths": []})
        model.optimize_parameters()
        losses = model.get_current_losses()
        return [float(losses[name]) for name in ("G_GAN", "G_L1", "D_real", "D_fake")]

    def _epoch(self, batch: int, data: str, direction: str) -> Unit:
        options = self._options(batch, data, direction)
        model, batches = self._model(options), self._batches(options, batch)

        def unit() -> None:
            model.set_input(next(batches))
            model.optimize_parameters()

        return unit

    def _options(self, batch: int, data: str, direction: str, *more: str) -> Any:
        """Parsed by its own parser, with its own defaults but for what a comparison must fix."""
        given: dict[str, object] = {"dataroot": data, "direction": direction, "batch_size": batch, "model": "pix2pix"}
        given |= {"name": "fastp2p", "checkpoints_dir": self.folder.name, **self.scale.options}
        if "--gpu_ids" in (self.checkout / "options/base_options.py").read_text():  # before 2025
            given["gpu_ids"] = 0 if self.device.type == "cuda" else -1
        words = ((f"--{name}", str(value)) for name, value in given.items())
        sys.argv = ["train.py", *itertools.chain.from_iterable(words), *more]
        from options.train_options import TrainOptions  # type: ignore[import-not-found]

        options = TrainOptions().parse()
        options.device = self.device
        return options

    def _model(self, options: Any) -> Any:
        from models import create_model  # type: ignore[import-not-found]

        model = create_model(options)
        model.setup(options)
        return model

    def _batches(self, options: Any, batch: int) -> Iterator[Any]:
        """Epoch after epoch, as its train.py reads them; whole batches alone."""
        from data import create_dataset  # type: ignore[import-not-found]

        dataset = create_dataset(options)
        check_count(len(dataset), batch)
        epochs = itertools.chain.from_iterable(itertools.repeat(dataset))
        return (pairs for pairs in epochs if len(pairs["A"]) == batch)


if __name__ == "__main__":
    serve("checkout", Upstream, __doc__)
