"""batches -> step -> status line, stats, samples, checkpoints."""

import contextlib
import functools
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from shlex import quote
from typing import Any, NoReturn

import torch
from tqdm import tqdm

from fastp2p import terminal
from fastp2p.config import ResolvedConfig, RunConfig
from fastp2p.data import Crops, batches_per_epoch, eval_batches, train_crops
from fastp2p.data.splits import TrainData, load_train_data
from fastp2p.device import prepare
from fastp2p.errors import InputError, TrainingDiverged
from fastp2p.files import is_there, remove_leftovers
from fastp2p.models.checkpoint import load_checkpoint, save_checkpoint, save_generator
from fastp2p.terminal import Say, progress, stop_signals
from fastp2p.train.recorder import Recorder
from fastp2p.train.report import describe
from fastp2p.train.run_folder import check_unused, locked, new_folder, reopen_folder, resume_advice, write_config
from fastp2p.train.state import TrainState
from fastp2p.tuner.store import check_fit, check_kernels, choose_kernels, compile_step


def train(config: RunConfig, *, resume: bool = False, say: Say = terminal.say) -> Path:
    """Train a model, and leave everything about it in one run folder.

    Args:
        config: all hyperparameters; what is None is chosen.
        resume: continue the run in config.out, bit for bit as if it had never been interrupted (on the same machine
            and versions), instead of making a new one.
        say: takes each line of report.

    In the main thread, Ctrl-C, SIGTERM and SIGHUP end the run after the step at hand, and it saves. In another thread
    the run takes no notice of them.

    Returns:
        The run folder: config.json, kernels.json, checkpoint.pt, stats.jsonl, panel.png, panel/, losses.png,
        tensorboard/, and NAME.safetensors and NAME_best.safetensors for each of the model's generators.

    Raises:
        InputError: when the run cannot use the configuration or the data; it writes nothing then. When it can no longer
            read an image in mid-training, it saves first.
        TrainingDiverged: when a loss or a weight is no longer finite; the run keeps the last good checkpoint.
        WriteError: when the run cannot write a file; it keeps the previous checkpoint.
    """
    device, resolved = prepare(config)
    with contextlib.ExitStack() as stack:
        # Every check comes before the first write, and the quick checks before the images
        saved = None
        if resume:
            folder = reopen_folder(resolved, say)
            stack.enter_context(locked(folder))
            saved = load_saved(folder, say)
        else:
            check_unused(resolved)
            check_kernels(resolved.kernels, device)
        data = load_train_data(resolved, device, say)
        state = TrainState.new(resolved, device, data.fingerprint)
        if saved is not None:
            if warning := state.restore(saved, folder / "checkpoint.pt"):
                say(f"warning: {warning}")
            say(f"resuming {folder} at step {state.step}")
        del saved  # as large as all networks and moments
        steps_per_epoch = batches_per_epoch(data.train, resolved.batch_size)
        images = min(resolved.batch_size, len(data.train))  # a batch's
        scheduled = (resolved.n_epochs + resolved.n_epochs_decay) * steps_per_epoch
        last_step = scheduled if resolved.max_steps is None else min(scheduled, resolved.max_steps)
        describe(resolved, state, len(data.train), say)

        if not resume:
            if resolved.engine != "reference":
                check_fit(state.engine_step(resolved), images, resolved.kernels)
            folder = stack.enter_context(new_folder(resolved))
        stack.enter_context(resume_advice(folder))
        if resume:
            remove_leftovers(folder)
            if state.step < last_step:
                write_config(folder, resolved)
            else:
                limits = {"--max-steps": resolved.max_steps, "--n-epochs": scheduled}
                reached = [name for name, steps in limits.items() if steps is not None and steps <= state.step]
                say(
                    f"{folder}: nothing left to train; scores, pictures and files are made once more. To go on, raise "
                    f"{' and '.join(reached)}."
                )
        say(f"{last_step:,} steps of batch {resolved.batch_size}, {steps_per_epoch:,} an epoch -> {folder}")
        if resolved.engine != "reference" and state.step < last_step:
            choose_kernels(state.engine_step(resolved), images, resolved.kernels, folder, say)
            batches = {images, len(data.train) % images or images}  # an epoch's last one may be smaller
            compile_step(state.engine_step(resolved), batches, resolved.load_size, say)

        bar_format = "{desc} |{bar:5}| {n_fmt}/{total_fmt} ETA {remaining}{postfix}"  # fits 80 columns
        recorder = stack.enter_context(Recorder(folder, state.step, state.model, resolved, say))
        bar = progress(total=last_step, initial=state.step, mininterval=0.5, smoothing=0.1, bar_format=bar_format)
        with bar, stop_signals(say) as stop:
            run = Run(resolved, data, state, folder, recorder, bar, say)
            run.train(last_step, stop)
        say(run.where_time_went())

    if state.step < last_step:
        say(f"Stopped and saved at step {state.step}. Go on with: fastp2p train --resume {quote(str(folder))}")
    name, *others = state.model.generators(resolved, state.nets, state.step)
    score = f"val {state.model.scores[0]} {state.best_score:.4f}"
    best = f" (best: {name}_best.safetensors, {score})" if state.best_score < math.inf else ""
    files = ", ".join(f"{name}.safetensors" for name in (name, *others))
    say(f"Results in {folder}: panel.png, losses.png, stats.jsonl, {files}{best}")
    say(f"Use it: fastp2p translate {quote(str(folder / f'{name}.safetensors'))} IMAGES --out OUT")
    say(f"Curves: tensorboard --logdir {quote(str(folder))}")
    return folder


def load_saved(folder: Path, say: Say) -> dict[str, Any] | None:
    """The folder's checkpoint; None where a run was killed before its first one, which begins again with the same seed.

    Raises:
        InputError: when it cannot be read, or is gone.
    """
    path = folder / "checkpoint.pt"
    if is_there(path):
        return load_checkpoint(path, say)
    # A run writes a generator after checkpoint.pt, and before it only the best one
    if any(not path.stem.endswith("_best") for path in folder.glob("*.safetensors")):
        raise InputError(f"resume: {path} is missing, but the run had one; bring it back, or start a new run")
    say(f"{folder} had no checkpoint yet: beginning again at step 0")
    return None


def untimed(method: Callable[["Run"], None]) -> Callable[["Run"], None]:
    """Keep the time that a method of Run takes out of img_per_sec, and in run.beside."""

    @functools.wraps(method)
    def wrapped(run: "Run") -> None:
        if run.state.device.type == "cuda":
            torch.cuda.synchronize(run.state.device)  # steps still queued count as training
        began = time.monotonic()
        method(run)
        seconds = time.monotonic() - began
        run.logged += seconds
        run.beside[method.__name__] += seconds

    return wrapped


class Run:
    """The training loop, and what happens beside it."""

    def __init__(
        self,
        config: ResolvedConfig,
        data: TrainData,
        state: TrainState,
        folder: Path,
        recorder: Recorder,
        bar: "tqdm[NoReturn]",
        say: Say,
    ):
        self.config, self.data, self.state, self.folder = config, data, state, folder
        self.recorder, self.bar, self.say = recorder, bar, say
        self.epochs = config.n_epochs + config.n_epochs_decay
        self.steps_per_epoch = batches_per_epoch(data.train, config.batch_size)
        self.started = self.saved = self.logged = time.monotonic()
        self.beside = dict.fromkeys(("validate", "panel", "save"), 0.0)  # seconds beside the steps
        self.images = 0  # trained on since self.logged
        self.validated_at = -1  # step
        self.reading = ""  # the losses' meaning at the last line of stats
        self.warning = ""  # the last one printed, so that each is printed once

    def train(self, last_step: int, stop: list[int]) -> None:
        """Train until last_step, --max-minutes, or a signal in `stop`; then score, draw and save.

        Raises:
            InputError: when an image can no longer be read; what was trained until then is saved.
        """
        try:
            self.train_steps(last_step, stop)
            if not stop or self.state.step >= last_step:
                if self.state.loss_steps:
                    self.write_losses()
                self.validate()
                self.panel()
        except InputError as error:
            self.save()
            raise InputError(
                f"{error}\nSaved at step {self.state.step}. Go on with: fastp2p train --resume "
                f"{quote(str(self.folder))}"
            ) from error
        self.save()

    def train_steps(self, last_step: int, stop: list[int]) -> None:
        """Train until last_step, --max-minutes, or a signal in `stop`."""
        state, step = self.state, self.state.training_step(self.config)
        if state.step == 0:
            self.panel()
        for crops in self.batches() if state.step < last_step else ():
            losses = step(crops)
            state.loss_sums += torch.stack([*losses.values()])
            state.loss_steps += 1
            state.step += 1
            self.images += len(crops)
            self.bar.update()
            self.do_what_is_due()
            if stop or state.step >= last_step or self.out_of_time():
                break

    def do_what_is_due(self) -> None:
        """What happens every so many steps or minutes beside the steps themselves."""
        config, step = self.config, self.state.step
        if step % config.log_steps == 0:
            self.log()
        if step % config.panel_steps == 0:
            self.panel()
        if step % (self.steps_per_epoch * config.val_epochs) == 0:
            self.validate()
        if time.monotonic() - self.saved >= config.save_minutes * 60:
            self.save()

    def where_time_went(self) -> str:
        """A line on the seconds since this Run began: all but the pauses count as steps.

        The last panel's file and losses.png are still to come.
        """
        total, beside = time.monotonic() - self.started, self.beside
        return (
            f"{total:.1f} s: {total - sum(beside.values()):.1f} in steps, {beside['validate']:.1f} in scores of val "
            f"and its best state, {beside['panel']:.1f} in panels, {beside['save']:.1f} in saving"
        )

    def out_of_time(self) -> bool:
        """Whether --max-minutes are over."""
        minutes = self.config.max_minutes
        return minutes is not None and time.monotonic() - self.started >= minutes * 60

    def batches(self) -> Iterator[Crops]:
        """Crops from the state's step to the schedule's end; sets the learning rate."""
        done, first = divmod(self.state.step, self.steps_per_epoch)
        for epoch in range(done + 1, self.epochs + 1):
            self.state.lr = self.config.lr * self.config.lr_factor(epoch)
            self.bar.set_description_str(f"epoch {epoch}/{self.epochs}", refresh=False)
            yield from train_crops(
                self.data.train,
                seed=self.config.seed,
                epoch=epoch,
                batch_size=self.config.batch_size,
                crop_size=self.config.crop_size,
                flip=self.config.flip,
                first=first,
            )
            first = 0

    def log(self) -> None:
        """Write the losses since the last line of stats, and begin the next."""
        self.write_losses()
        self.state.loss_sums.zero_()
        self.state.loss_steps = 0

    def write_losses(self) -> None:
        """Mean losses to stats.jsonl and the status line; a warning when one player has won."""
        state = self.state
        losses = dict(zip(state.model.losses, (state.loss_sums / state.loss_steps).tolist(), strict=True))
        if not all(map(math.isfinite, losses.values())):
            self.diverged(f"the losses are {', '.join(f'{name} {value:.3g}' for name, value in losses.items())}")

        if state.loss_scale[0] < 1:
            self.diverged("gradients overflow float16 whatever the loss scale", remedy="--precision fp32")

        img_per_sec = self.images / max(time.monotonic() - self.logged, 1e-6)  # some clocks tick seldom
        self.images, self.logged = 0, time.monotonic()
        epoch = -(-state.step // self.steps_per_epoch)
        self.recorder.scalars(state.step, {"epoch": epoch, **losses, "lr": state.lr, "img_per_sec": img_per_sec})
        self.bar.set_postfix_str(f"{img_per_sec:.1f} img/s, {state.model.status(losses)}", refresh=False)
        self.reading, is_warning = state.model.read(losses, self.config)
        warning = self.reading.partition(": ")[2] if is_warning else ""  # without its numbers
        if warning and warning != self.warning:
            self.say(f"step {state.step}: warning: {self.reading}")
        self.warning = warning

    @untimed
    def validate(self) -> None:
        """Score the state on val/, once per step, keep the best by the first score, and say how it goes."""
        state = self.state
        if self.validated_at == state.step:
            return
        self.validated_at = state.step
        if self.data.val is None:
            if self.reading:  # an epoch may be shorter than --log-steps
                self.say(f"step {state.step}: {self.reading}")
            return
        means = state.model.score(state.nets, eval_batches(self.data.val, device=state.device))
        first, *others = state.model.scores
        if not math.isfinite(means[first]):
            self.diverged("the generator's output is not finite")
        self.recorder.scalars(state.step, {f"val_{name}": value for name, value in means.items()})
        best = means[first] < state.best_score
        if best:
            state.best_score = means[first]
            self.save_generators("_best")
        scores = "".join(f", {name} {format_score(name, means[name])}" for name in others)
        reading = f"; {self.reading}" if self.reading else ""
        self.say(f"step {state.step}: val {first} {means[first]:.4f}{' (best)' if best else ''}{scores}{reading}")

    @untimed
    def panel(self) -> None:
        """Draw the fixed images, and what becomes of them."""
        rows = [self.state.model.panel(self.state.nets, batch) for batch in self.data.panel]
        self.recorder.panel(self.state.step, [{caption: x[0] for caption, x in row.items()} for row in rows])

    @untimed
    def save(self) -> None:
        """Write checkpoint.pt and the generators' files, unless the state is not worth keeping."""
        if not self.state.is_finite():
            self.diverged("a loss or a weight is not finite")
        self.recorder.flush()  # a run that goes on from here draws no earlier panel
        save_checkpoint(self.folder / "checkpoint.pt", self.state.as_dict())
        self.save_generators()
        self.saved = time.monotonic()

    def save_generators(self, suffix: str = "") -> None:
        """Write NAME.safetensors for each of the model's generators."""
        state = self.state
        for name, (net, spec) in state.model.generators(self.config, state.nets, state.step).items():
            save_generator(self.folder / f"{name}{suffix}.safetensors", net.state_dict(), spec)

    def diverged(self, what: str, remedy: str | None = None) -> NoReturn:
        """Stop without saving, so that the last good checkpoint stays; the remedy is an option to go on with."""
        path = self.folder / "checkpoint.pt"
        kept = f"{path} holds the last good state" if path.exists() else "no checkpoint had been written yet"
        remedy = f"--lr {self.config.lr / 4:.2g}" if remedy is None else remedy
        raise TrainingDiverged(
            f"step {self.state.step}: {what}; training stopped, {kept}. Go on more gently with: fastp2p train --resume "
            f"{quote(str(self.folder))} {remedy}\nIf that does not help, start anew with --norm instance."
        )


def format_score(name: str, value: float) -> str:
    """A score with its unit."""
    return f"{value:.2f} dB" if name == "PSNR" else f"{value:.4f}"
