"""batches -> step -> status line, stats, samples, checkpoints."""

import functools
import math
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import NoReturn

import torch
from tqdm import tqdm

from fastp2p.checkpoint import GeneratorSpec, load_checkpoint, save_checkpoint, save_generator
from fastp2p.config import ResolvedConfig, TrainConfig
from fastp2p.data import batches_per_epoch, eval_batches, train_batches
from fastp2p.data.splits import TrainData, load_train_data
from fastp2p.device import choose_device, describe_device
from fastp2p.errors import TrainingDiverged
from fastp2p.losses import GANLoss, Losses, read_losses
from fastp2p.memory import estimate_step_memory
from fastp2p.metrics import METRICS, evaluate_generator
from fastp2p.networks import count_parameters, generate
from fastp2p.recorder import Recorder
from fastp2p.reference import train_step
from fastp2p.run_folder import new_folder, reopen_folder
from fastp2p.state import TrainState

Say = Callable[[str], None]


def train(config: TrainConfig, *, resume: bool = False, say: Say = tqdm.write) -> Path:
    """Train pix2pix, and leave everything about it in one run folder.

    Args:
        config: all hyperparameters; what is None is chosen.
        resume: continue the run in config.out, bit for bit as if it had never been interrupted (on the same machine
            and versions), instead of making a new one.
        say: takes each line of report.

    Returns:
        The run folder: config.json, checkpoint.pt, netG.safetensors, netG_best.safetensors, stats.jsonl, panel.png,
        panel/, losses.png, tensorboard/.

    Raises:
        InputError: when the configuration or the data cannot be used; nothing is written then.
        TrainingDiverged: when a loss or a weight is no longer finite; the last good checkpoint is kept.
        OSError: when a file cannot be written; the previous checkpoint is kept.
    """
    device = choose_device(config.device)
    resolved = config.resolve(device.type)
    torch.backends.cudnn.deterministic = True  # or a resumed run would not repeat the unbroken one's bits on a GPU
    data = load_train_data(resolved, device, say)
    state = TrainState.new(resolved, device, data.fingerprint)
    folder = reopen_folder(resolved) if resume else new_folder(resolved)
    path = folder / "checkpoint.pt"
    if resume and path.exists():  # a run killed before its first checkpoint begins again, with the same seed
        state.restore(load_checkpoint(path), path)
    Run(resolved, data, state, folder, say).train()
    return folder


def beside_the_steps(method: Callable[["Run"], None]) -> Callable[["Run"], None]:
    """Keep the time that a method of Run takes out of img_per_sec."""

    @functools.wraps(method)
    def timed(run: "Run") -> None:
        began = time.monotonic()
        method(run)
        run.logged += time.monotonic() - began

    return timed


class Run:
    """One call of train: the loop, and what happens beside it."""

    def __init__(self, config: ResolvedConfig, data: TrainData, state: TrainState, folder: Path, say: Say):
        self.config, self.data, self.state, self.folder, self.say = config, data, state, folder, say
        self.gan_loss = GANLoss(config.gan_mode)
        self.epochs = config.n_epochs + config.n_epochs_decay
        self.steps_per_epoch = batches_per_epoch(data.train, config.batch_size)
        self.last_step = min(self.epochs * self.steps_per_epoch, config.max_steps or 10**18)
        self.validated_at = -1  # step
        self.images = 0  # trained on since the last line of stats
        self.reading = ""  # of the losses, at the last line of stats
        self.warning = ""  # the last one given, so that each is given once

    def train(self) -> None:
        """Train until the schedule or a limit ends, or Ctrl-C is pressed; then score, draw and save."""
        config, state = self.config, self.state
        self.describe()
        if state.step >= self.last_step:
            self.say(f"{self.folder} is at step {state.step} of {self.last_step}: nothing left to do. "
                     "--max-steps or --n-epochs with a larger number goes on.")  # fmt: skip
            return

        self.recorder = Recorder(self.folder, state.step)
        self.bar = tqdm(total=self.last_step, initial=state.step, unit=" steps", mininterval=0.5, smoothing=0.1,
                        bar_format="{desc} {percentage:3.0f}%|{bar:20}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}]"
                        "{postfix}")  # fmt: skip
        self.started = self.saved = self.logged = time.monotonic()

        with self.bar, stop_signals() as stop:
            if state.step == 0:
                self.panel()
            for epoch, real_A, real_B in self.batches():
                losses = train_step(
                    state.netG,
                    state.netD,
                    state.optimizer_G,
                    state.optimizer_D,
                    real_A,
                    real_B,
                    gan_loss=self.gan_loss,
                    lambda_L1=config.lambda_L1,
                )
                state.loss_sums += torch.stack([torch.as_tensor(loss) for loss in losses])
                state.step += 1
                self.images += len(real_A)
                self.bar.update()
                self.do_what_is_due(epoch)
                if stop or state.step >= self.last_step or self.out_of_time():
                    break

            if not stop:
                self.validate()
                self.panel()
            self.save()
        curves = self.recorder.close(config.gan_mode)

        if state.step < self.last_step:
            self.say(f"Stopped and saved at step {state.step}. Go on with: fastp2p train --resume {self.folder}")
        self.say(
            f"Results in {self.folder}: panel.png, {'losses.png, ' if curves else ''}netG.safetensors, stats.jsonl"
        )
        self.say(f"Use it: fastp2p translate {self.folder / 'netG.safetensors'} IMAGES --out OUT")
        self.say(f"Curves: tensorboard --logdir {self.folder}")

    def do_what_is_due(self, epoch: int) -> None:
        """What happens every so many steps or minutes beside the steps themselves."""
        config, step = self.config, self.state.step
        if step % config.log_steps == 0:
            self.log(epoch)
        if step % config.panel_steps == 0:
            self.panel()
        if step % (self.steps_per_epoch * config.val_epochs) == 0:
            self.validate()
        if time.monotonic() - self.saved >= config.save_minutes * 60:
            self.save()

    def out_of_time(self) -> bool:
        """Whether --max-minutes are over."""
        minutes = self.config.max_minutes
        return minutes is not None and time.monotonic() - self.started >= minutes * 60

    def batches(self) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
        """(epoch, real_A, real_B) from the state's step to the schedule's end; sets the learning rate."""
        done, first = divmod(self.state.step, self.steps_per_epoch)
        for epoch in range(done + 1, self.epochs + 1):
            self.state.set_lr(self.config.lr * self.config.lr_factor(epoch))
            self.bar.set_description_str(f"epoch {epoch}/{self.epochs}", refresh=False)
            batches = train_batches(
                self.data.train,
                seed=self.config.seed,
                epoch=epoch,
                batch_size=self.config.batch_size,
                crop_size=self.config.crop_size,
                flip=self.config.flip,
                first=first,
                device=self.state.device,
            )
            for real_A, real_B in batches:
                yield epoch, real_A, real_B
            first = 0

    def describe(self) -> None:
        """Print the networks' sizes, the device, and the memory that a step will take, before it takes it."""
        config, state = self.config, self.state
        self.say(
            f"netG {config.netG}, ngf {config.ngf}: {count_parameters(state.netG):,} parameters; "
            f"netD {config.netD}, ndf {config.ndf}: {count_parameters(state.netD):,} parameters; "
            f"{config.gan_mode} + {config.lambda_L1:g} L1"
        )
        need = estimate_step_memory(
            state.netG, state.netD, batch_size=config.batch_size, input_nc=config.input_nc, crop_size=config.crop_size
        )
        mib = 2**20
        self.say(
            f"{describe_device(state.device)}, float32; a step of batch {config.batch_size} takes about "
            f"{need.total / mib:,.0f} MiB: {need.state / mib:,.0f} for weights, gradients and Adam, "
            f"{need.activations / mib:,.0f} for activations"
        )
        if state.device.type == "cuda" and need.total > (free := torch.cuda.mem_get_info(state.device)[0]):
            self.say(f"warning: only {free / mib:,.0f} MiB are free; lower --batch-size, --crop-size or --ngf")
        self.say(
            f"{self.last_step:,} steps of {self.config.batch_size}, {self.steps_per_epoch:,} an epoch -> {self.folder}"
        )

    def log(self, epoch: int) -> None:
        """Read the losses since the last line: status line, stats.jsonl, and a warning when one player has won."""
        state, steps = self.state, self.config.log_steps
        losses = Losses(*(state.loss_sums / steps).tolist())
        if not all(math.isfinite(float(loss)) for loss in losses):
            self.diverged(f"the losses are {', '.join(f'{name} {v:.3g}' for name, v in losses._asdict().items())}")
        state.loss_sums.zero_()

        img_per_sec = self.images / (time.monotonic() - self.logged)
        self.images, self.logged = 0, time.monotonic()
        lr = state.optimizer_G.param_groups[0]["lr"]
        self.recorder.scalars(state.step, {"epoch": epoch, **losses._asdict(), "lr": lr, "img_per_sec": img_per_sec})
        self.bar.set_postfix_str(
            f"{img_per_sec:.1f} img/s, G_GAN {losses.loss_G_GAN:.2f} G_L1 {losses.loss_G_L1:.2f} "
            f"D_real {losses.loss_D_real:.2f} D_fake {losses.loss_D_fake:.2f}",
            refresh=False,
        )
        self.reading, is_warning = read_losses(losses, self.config.gan_mode)
        warning = self.reading.partition(": ")[2] if is_warning else ""  # without its numbers
        if warning and warning != self.warning:
            self.say(f"step {state.step}: warning: {self.reading}")
        self.warning = warning

    @beside_the_steps
    def validate(self) -> None:
        """Score netG on val/, once per step; keep the best by L1."""
        state = self.state
        if self.data.val is None or self.validated_at == state.step:
            return
        self.validated_at = state.step
        values = evaluate_generator(state.netG, eval_batches(self.data.val, device=state.device))
        means = {name: sum(values[name]) / len(values[name]) for name in METRICS}
        if not math.isfinite(means["L1"]):
            self.diverged("the generator's output is not finite")
        self.recorder.scalars(state.step, {f"val_{name}": value for name, value in means.items()})
        best = means["L1"] < state.best_val_L1
        if best:
            state.best_val_L1 = means["L1"]
            save_generator(self.folder / "netG_best.safetensors", state.netG.state_dict(), self.spec())
        self.say(
            f"step {state.step}: val L1 {means['L1']:.4f}{' (best)' if best else ''}, PSNR {means['PSNR']:.2f} dB, "
            f"SSIM {means['SSIM']:.4f}{'; ' * bool(self.reading)}{self.reading}"
        )

    @beside_the_steps
    def panel(self) -> None:
        """Draw the fixed pairs: input, output, target."""
        rows = [(A[0], generate(self.state.netG, A)[0], B[0]) for A, B in self.data.panel]
        self.recorder.panel(self.state.step, rows)

    @beside_the_steps
    def save(self) -> None:
        """Write checkpoint.pt and netG.safetensors, unless the state is not worth keeping."""
        if not self.state.is_finite():
            self.diverged("a loss or a weight is not finite")
        save_checkpoint(self.folder / "checkpoint.pt", self.state.as_dict())
        save_generator(self.folder / "netG.safetensors", self.state.netG.state_dict(), self.spec())
        self.saved = time.monotonic()

    def spec(self) -> GeneratorSpec:
        """How to rebuild and feed the generator as it is now."""
        config = self.config
        return GeneratorSpec(
            levels=self.state.netG.levels,
            ngf=config.ngf,
            input_nc=config.input_nc,
            output_nc=config.output_nc,
            norm=config.norm,
            dropout=config.dropout,
            direction=config.direction,
            load_size=config.load_size,
            crop_size=config.crop_size,
            data=config.data if config.data.startswith("builtin:") else Path(config.data).resolve().name,
            step=self.state.step,
        )

    def diverged(self, what: str) -> NoReturn:
        """Stop without saving, so that the last good checkpoint stays."""
        path = self.folder / "checkpoint.pt"
        kept = f"{path} holds the last good state" if path.exists() else "no checkpoint had been written yet"
        raise TrainingDiverged(
            f"step {self.state.step}: {what}; training stopped, {kept}. "
            "A lower --lr, or --norm instance for batch size 1, usually helps."
        )


@contextmanager
def stop_signals() -> Iterator[list[int]]:
    """A list that fills when Ctrl-C or SIGTERM arrives, so that a step is finished first; a second one interrupts."""
    received: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        if received:
            raise KeyboardInterrupt
        received.append(number)

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
