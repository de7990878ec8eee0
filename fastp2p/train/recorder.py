"""What a run leaves behind to look at: stats.jsonl, TensorBoard events, panels and loss curves."""

import contextlib
import io
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw
from torch import Tensor

from fastp2p.config import GanMode
from fastp2p.data.images import to_image, to_png
from fastp2p.errors import InputError, TrainingDiverged, WriteError
from fastp2p.files import append_line, check_file, is_there, write_atomically
from fastp2p.models.gan_losses import BALANCE
from fastp2p.terminal import Say
from fastp2p.train.events import EventFile

PANEL_COLUMNS = ("input", "output", "target")
CAPTION_HEIGHT = 16  # px
GAP = 4  # px


class Recorder:
    """The written record of one run folder, open as long as the `with` block; its end draws losses.png.

    Numbers must be written. Pictures and TensorBoard's events are extras: of each kind the run says once that one could
    not be written, and goes on.

    Args:
        folder: the run folder.
        step: where the run stands; later lines, which a killed run may have left, are dropped.
        gan_mode: for the balance in the picture of the losses.
        say: takes each warning.

    Raises:
        InputError: when stats.jsonl cannot be read.
        WriteError: when it cannot be written.
    """

    def __init__(self, folder: Path, step: int, gan_mode: GanMode, say: Say):
        self.folder, self.gan_mode, self.say = folder, gan_mode, say
        self.stats_path = folder / "stats.jsonl"
        stats, damaged = read_stats(self.stats_path)
        if damaged:
            say(f"warning: {self.stats_path}: damaged lines are dropped: {damaged}")
        kept = [line for line in stats if line["step"] <= step]
        write_atomically(self.stats_path, "".join(json.dumps(line) + "\n" for line in kept).encode())
        self.there = {(step, _kind(line)) for line in kept if line["step"] == step}
        self.failed: set[str] = set()  # the extras of which one could not be written
        self.events: EventFile | None = None
        with self._extra(EVENTS):
            self.events = EventFile(folder / "tensorboard", step)
        self.thread = ThreadPoolExecutor(1, "panel")  # encoding one takes as long as a hundred steps of a GPU
        self.pending: Future[None] | None = None  # panel, that the thread writes

    def __enter__(self) -> "Recorder":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        self.flush()
        self.thread.shutdown()
        self._to_tensorboard(lambda events: events.close())
        # A diverged run wants its curves most of all; without memory or disk, or in haste, nothing is drawn
        if kind is None or issubclass(kind, TrainingDiverged | InputError):
            with self._extra(PICTURES):
                draw_curves(self.stats_path, self.folder / "losses.png", self.gan_mode)

    def scalars(self, step: int, values: dict[str, Any]) -> None:
        """Append a line of numbers to stats.jsonl and to TensorBoard; a line that is there already stays as it is.

        Raises:
            WriteError: when stats.jsonl cannot be written.
        """
        if (step, _kind(values)) in self.there:
            return
        append_line(self.stats_path, json.dumps({"step": step, **values}))
        tagged = {name.replace("loss_", "loss/").replace("val_", "val/"): value for name, value in values.items()}
        self._to_tensorboard(lambda events: events.scalars(step, tagged))

    def panel(self, step: int, rows: Sequence[Sequence[Tensor]]) -> None:
        """Draw the validation panel; a thread writes it as panel/STEP.png, as panel.png and to TensorBoard."""
        image = draw_panel(rows)
        self.flush()
        self.pending = self.thread.submit(self._write_panel, step, image)

    def flush(self) -> None:
        """Wait until the last panel is written."""
        pending, self.pending = self.pending, None
        if pending is not None:
            with self._extra(PICTURES):
                pending.result()

    def _write_panel(self, step: int, image: Image.Image) -> None:
        png = to_png(image, fast=True)
        self._to_tensorboard(lambda events: events.panel(step, image, png))
        (self.folder / "panel").mkdir(exist_ok=True)
        for path in (self.folder / "panel" / f"{step:07d}.png", self.folder / "panel.png"):
            write_atomically(path, png)

    def _to_tensorboard(self, write: Callable[[EventFile], object]) -> None:
        if self.events is not None and EVENTS not in self.failed:
            with self._extra(EVENTS):
                write(self.events)

    @contextlib.contextmanager
    def _extra(self, what: str) -> Iterator[None]:
        try:
            yield
        except (OSError, WriteError) as error:
            if what not in self.failed:
                self.failed.add(what)
                why = error.what if isinstance(error, WriteError) else f"{what} cannot be written: {error}"
                self.say(f"warning: {why}; training goes on, and says no more of {what}")


EVENTS, PICTURES = "TensorBoard's events", "pictures"
_LOSSES = {"loss_G_GAN", "loss_G_L1", "loss_D_real", "loss_D_fake"}
_SCORES = {"val_L1", "val_PSNR", "val_SSIM"}


def _kind(values: Mapping[str, Any]) -> str | None:
    """Whether these are "losses" or "scores"; None for neither, or where some are missing."""
    return "losses" if values.keys() >= _LOSSES else "scores" if values.keys() >= _SCORES else None


def read_stats(path: Path) -> tuple[list[dict[str, Any]], int]:
    """The lines of a stats.jsonl, without those that are damaged, and how many these are.

    The half line that a killed process may have left at the end does not count.

    Raises:
        InputError: when the file cannot be read.
    """
    advice = "move it away to go on without its lines"
    try:
        if not is_there(path):
            return [], 0
        check_file(path, "a run's lines of numbers")
        lines = path.read_bytes().split(b"\n")[:-1]
    except InputError as error:
        raise InputError(f"{error}; {advice}") from error
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}; {advice}") from error
    parsed = [_parse(line) for line in lines]
    stats = [line for line in parsed if line is not None]
    return stats, len(parsed) - len(stats)


def _parse(line: bytes) -> dict[str, Any] | None:
    """A line of stats.jsonl; None for one that no run wrote."""
    try:
        values = json.loads(line)
        if not isinstance(values, dict) or not {type(value) for value in values.values()} <= {int, float}:
            return None
        for value in values.values():
            float(value)  # an int may be too large
    except (ValueError, RecursionError, OverflowError):
        return None
    return values if type(values.get("step")) is int and _kind(values) is not None else None


def draw_panel(rows: Sequence[Sequence[Tensor]]) -> Image.Image:
    """Rows of (real_A, fake_B, real_B), each (C, H, W) in [-1, 1], under a caption; two rows side by side if many."""
    height, width = rows[0][0].shape[-2:]
    blocks = 2 if len(rows) > 4 else 1
    per_block = -(-len(rows) // blocks)
    block_width = 3 * (width + GAP) + GAP
    size = (blocks * block_width - GAP, CAPTION_HEIGHT + per_block * (height + GAP))
    panel = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(panel)
    for block in range(blocks):
        for column, caption in enumerate(PANEL_COLUMNS):
            draw.text((block * block_width + column * (width + GAP) + GAP, 2), caption, fill="black")
    for number, row in enumerate(rows):
        left, top = number // per_block * block_width, CAPTION_HEIGHT + number % per_block * (height + GAP)
        for column, x in enumerate(row):
            panel.paste(to_image(x).convert("RGB"), (left + column * (width + GAP), top))
    return panel


def draw_curves(stats_path: Path, path: Path, gan_mode: GanMode) -> None:
    """Draw the losses and the validation scores of a stats.jsonl as a PNG; nothing when it holds no losses."""
    from matplotlib.figure import Figure

    stats, _ = read_stats(stats_path)
    losses = [line for line in stats if "loss_G_L1" in line]
    scores = [line for line in stats if "val_L1" in line]
    if not losses:
        return
    figure = Figure(figsize=(12, 3.6), layout="constrained")
    gan, l1, validation = figure.subplots(1, 3)
    steps = [line["step"] for line in losses]
    for name in ("loss_D_real", "loss_D_fake", "loss_G_GAN"):
        gan.plot(steps, [line[name] for line in losses], label=name, linewidth=1)
    gan.axhline(BALANCE[gan_mode], color="grey", linestyle=":", label=f"balance ({BALANCE[gan_mode]:.2g})")
    l1.plot(steps, [line["loss_G_L1"] for line in losses], color="tab:purple", linewidth=1)
    if scores:
        where = [line["step"] for line in scores]
        validation.plot(where, [line["val_L1"] for line in scores], "o-", color="tab:purple")
        ssim = validation.twinx()
        ssim.plot(where, [line["val_SSIM"] for line in scores], "s-", color="tab:green")
        validation.set_ylabel("L1, lower is better", color="tab:purple")
        ssim.set_ylabel("SSIM, higher is better", color="tab:green")
    gan.legend()
    for axes, title in ((gan, "adversarial losses"), (l1, "L1 loss, times lambda_L1"), (validation, "validation")):
        axes.set(title=title, xlabel="step")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    write_atomically(path, buffer.getvalue())
