"""A provider in a process of its own: it gets its work on stdin and answers on stdout, one line of JSON each.

So its memory, its caches and PyTorch's global switches are its own, and a crash ends nobody else.

    python -m harness.worker PROVIDER [--device cpu|cuda] [--scale paper|tiny]
"""

import argparse
import gc
import itertools
import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastp2p.models.pix2pix.losses import Losses
from harness.epochs import die_with_parent, eager_batches, fused_steps
from harness.peak_memory import Peak
from harness.providers import SCALES, Provider, Scale, inference, providers, training
from harness.stopwatch import elapsed_ms

SETTLING = {"cpu": 1, "cuda": 5}  # units after the first one; a graph is captured in the fourth
SETS = 6  # inputs that calls take in turn
GRADIENT_STRIDE, OUTPUT_STRIDE = (
    997,
    97,
)  # between elements that a check compares; primes leave no channel out

Answer = dict[str, Any]
Unit = Callable[[], object]  # a step, or a batch through the generator


class Measured:
    """Something that is prepared once and then sampled. Subclasses have `_step`, `_inference` or `_epoch`."""

    def __init__(self, device: torch.device):
        self.device, self.peak = device, Peak(device)
        self.unit: Unit = lambda: None
        self.losses: Losses[Tensor] | None = None  # the last step's

    def prepare(self, what: str, **request: Any) -> Answer:
        """Make ready to sample; the first unit is timed apart, since torch.compile compiles in it.

        Args:
            what: step, inference or epoch.
            request: batch, the images in a unit; of an epoch also data, a folder with train/ of aligned pairs, and
                their direction.
        """
        self.release()
        self.peak.begin()
        self.unit = getattr(self, f"_{what}")(**request)
        first_s = self._ms(1) / 1e3
        self.peak.restart()  # cuDNN has tried its algorithms, some of which take a lot
        self._ms(SETTLING[self.device.type])
        return {"first_s": first_s, "settled_ms": self._ms(1), "peak_mem_mib": self.peak.mib()}

    def release(self) -> Answer:
        """Give back what was prepared, for others to have it."""
        self.unit, self.losses = (lambda: None), None
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        return {}

    def sample(self, calls: int) -> Answer:
        """Milliseconds a unit, over so many of them one after the other."""
        return {"ms": self._ms(calls) / calls}

    def _ms(self, calls: int) -> float:
        """Milliseconds of so many units. Raises RuntimeError where the last losses are not finite."""
        ms = elapsed_ms(self.unit, self.device, calls=calls)
        if self.losses is not None and not all(loss.isfinite() for loss in self.losses):
            raise RuntimeError(f"not finite: {self.losses}")
        return ms


class ProviderWorker(Measured):
    """What a provider is asked to do, a method each."""

    def __init__(self, provider: Provider, device: torch.device, scale: Scale):
        super().__init__(device)
        self.provider, self.scale = provider, scale

    def check(self, what: str, batch: int, weights: str | None = None) -> Answer:
        """What is compared with others before anything is timed; and how long the first call takes, which compiles.

        Args:
            what: step: the losses of the first step, Adam's first moments after it, which are half the gradients, and
                the losses of a later step, on a GPU one that a graph replays. inference: the output.
            batch: images.
            weights: file of {"netG": state_dict, "netD": state_dict} to begin with.
        """
        nets = self.scale.networks(dropout=self.provider.checked_with_dropout)
        if weights is not None:
            states = torch.load(weights, weights_only=True)
            for name, net in zip(("netG", "netD"), nets, strict=True):
                net.load_state_dict(states[name])
        real_A, real_B = self._images(batch)[0]
        if what == "inference":
            run, begin = inference(self.provider, nets[0], self.device), time.perf_counter()
            output = _sampled([run(real_A)], OUTPUT_STRIDE)
            return {"output": output, "first_s": time.perf_counter() - begin}
        work = training(self.provider, nets, self.device, self.scale)
        begin = time.perf_counter()
        losses = [float(loss) for loss in work.step(real_A, real_B)]
        answer = {"losses": losses, "first_s": time.perf_counter() - begin} | moments(work.nets, work.optimizers)
        for pair in self._images(batch)[1 : 1 + SETTLING[self.device.type]]:
            later = work.step(*pair)
        return answer | {"later losses": [float(loss) for loss in later]}

    def _step(self, batch: int) -> Unit:
        step = training(self.provider, self.scale.networks(dropout=True), self.device, self.scale).step
        sets = itertools.cycle(self._images(batch))
        return lambda: self._keep(step(*next(sets)))

    def _inference(self, batch: int) -> Unit:
        run = inference(self.provider, self.scale.networks(dropout=True)[0], self.device)
        sets = itertools.cycle(self._images(batch))
        return lambda: run(next(sets)[0])

    def _epoch(self, batch: int, data: str, direction: str) -> Unit:
        source = (self.provider, self.scale, self.device, batch, Path(data), direction)
        if self.provider.ours:
            steps = fused_steps(*source)
            return lambda: self._keep(next(steps))
        step = training(self.provider, self.scale.networks(dropout=True), self.device, self.scale).step
        batches = eager_batches(*source)
        return lambda: self._keep(step(*next(batches)))

    def _images(self, batch: int) -> list[tuple[Tensor, Tensor]]:
        layout = torch.channels_last if self.provider.channels_last or self.provider.ours else torch.contiguous_format
        return images(self.scale, batch, self.device, layout)

    def _keep(self, losses: Losses[Tensor]) -> None:
        """For a look at them when the clock has stopped: no trainer waits for a GPU after each step."""
        self.losses = losses


def images(
    scale: Scale, batch: int, device: torch.device, layout: torch.memory_format = torch.contiguous_format
) -> list[tuple[Tensor, Tensor]]:
    """Sets of real_A and real_B, (batch, 3, size, size) float32 in [-1, 1], the same in every process on a device."""
    generator, shape = torch.Generator(device).manual_seed(0), (2, batch, 3, scale.size, scale.size)
    sets = (torch.rand(shape, generator=generator, device=device) * 2 - 1 for _ in range(SETS))
    pairs = ([x.contiguous(memory_format=layout) for x in pair] for pair in sets)
    return [(real_A, real_B) for real_A, real_B in pairs]


def moments(nets: Iterable[nn.Module], optimizers: Iterable[torch.optim.Adam]) -> Answer:
    """Adam's first moments of netG and netD, some of their elements."""
    names = "gradient of netG", "gradient of netD"
    return {
        name: _sampled((optimizer.state[p]["exp_avg"] for p in net.parameters()), GRADIENT_STRIDE)
        for name, net, optimizer in zip(names, nets, optimizers, strict=True)
    }


def _sampled(tensors: Iterable[Tensor], stride: int) -> list[float]:
    values: Iterator[list[float]] = (t.detach().flatten()[::stride].double().tolist() for t in tensors)
    return list(itertools.chain.from_iterable(values))


def serve(subject: str, make: Callable[[str, torch.device, Scale], object], about: str | None) -> None:
    """Answer what comes on stdin by calling methods of what `make` gives. What else is printed goes to stderr.

    Args:
        subject: what the command line names first, and `make` takes.
        make: subject, device, scale -> who works.
        about: text of --help.
    """
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(subject)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--scale", default="paper", choices=[*SCALES])
    args = parser.parse_args()
    die_with_parent()
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    worker = make(getattr(args, subject), torch.device(args.device), SCALES[args.scale])
    for line in sys.stdin:
        request = json.loads(line)
        try:
            answer = getattr(worker, request.pop("do"))(**request)
        except Exception as error:  # the team raises it anew, in its own process
            answer = {"error": f"{type(error).__name__}: {error}"[:2000], "traceback": traceback.format_exc()}
        print(json.dumps(answer), file=answers, flush=True)


def provider_worker(name: str, device: torch.device, scale: Scale) -> ProviderWorker:
    known = {p.name: p for p in providers(device, quick=False)[0]}
    return ProviderWorker(known[name], device, scale)


if __name__ == "__main__":
    serve("provider", provider_worker, __doc__)
