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

from fastp2p.config import ResolvedConfig
from fastp2p.data.images import to_image, to_png
from fastp2p.errors import InputError, TrainingDiverged, WriteError
from fastp2p.files import append_line, check_file, is_there, write_atomically
from fastp2p.models.base import Model
from fastp2p.terminal import Say
from fastp2p.train.events import EventFile

CAPTION_HEIGHT = 16  # px
GAP = 4  # px


class Recorder:
    """The written record of one run folder, open as long as the `with` block; its end draws losses.png.

    Numbers must be written. Pictures and TensorBoard's events are extras: of each kind the run says once that one could
    not be written, and goes on.

    Args:
        folder: the run folder.
        step: where the run stands; later lines, which a killed run may have left, are dropped.
        model, config: what is trained; for the names of losses and scores, and how they are drawn.
        say: takes each warning.

    Raises:
        InputError: when stats.jsonl cannot be read.
        WriteError: when it cannot be written.
    """

    def __init__(self, folder: Path, step: int, model: Model[Any], config: ResolvedConfig, say: Say):
        self.folder, self.model, self.config, self.say = folder, model, config, say
        self.stats_path = folder / "stats.jsonl"
        stats, damaged = read_stats(self.stats_path, model)
        if damaged:
            say(f"warning: {self.stats_path}: damaged lines are dropped: {damaged}")
        kept = [line for line in stats if line["step"] <= step]
        write_atomically(self.stats_path, "".join(json.dumps(line) + "\n" for line in kept).encode())
        self.there = {(step, _kind(line, model)) for line in kept if line["step"] == step}
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
                draw_curves(self.stats_path, self.folder / "losses.png", self.model, self.config)

    def scalars(self, step: int, values: dict[str, Any]) -> None:
        """Append a line of numbers to stats.jsonl and to TensorBoard; a line that is there already stays as it is.

        Raises:
            WriteError: when stats.jsonl cannot be written.
        """
        if (step, _kind(values, self.model)) in self.there:
            return
        append_line(self.stats_path, json.dumps({"step": step, **values}))
        tagged = {name.replace("loss_", "loss/").replace("val_", "val/"): value for name, value in values.items()}
        self._to_tensorboard(lambda events: events.scalars(step, tagged))

    def panel(self, step: int, rows: Sequence[Mapping[str, Tensor]]) -> None:
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


def _kind(values: Mapping[str, Any], model: Model[Any]) -> str | None:
    """Whether these are "losses" or "scores"; None for neither, or where some are missing."""
    scores = {f"val_{name}" for name in model.scores}
    return "losses" if values.keys() >= {*model.losses} else "scores" if values.keys() >= scores else None


def read_stats(path: Path, model: Model[Any]) -> tuple[list[dict[str, Any]], int]:
    """The lines of a model's stats.jsonl, without those that are damaged, and how many these are.

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
    parsed = [_parse(line, model) for line in lines]
    stats = [line for line in parsed if line is not None]
    return stats, len(parsed) - len(stats)


def _parse(line: bytes, model: Model[Any]) -> dict[str, Any] | None:
    """A line of stats.jsonl; None for one that no run wrote."""
    try:
        values = json.loads(line)
        if not isinstance(values, dict) or not {type(value) for value in values.values()} <= {int, float}:
            return None
        for value in values.values():
            float(value)  # an int may be too large
    except (ValueError, RecursionError, OverflowError):
        return None
    return values if type(values.get("step")) is int and _kind(values, model) is not None else None


def draw_panel(rows: Sequence[Mapping[str, Tensor]]) -> Image.Image:
    """Rows of pictures by caption, each (C, H, W) in [-1, 1]; two rows side by side if many."""
    captions = list(rows[0])
    height, width = rows[0][captions[0]].shape[-2:]
    blocks = 2 if len(rows) > 4 else 1
    per_block = -(-len(rows) // blocks)
    block_width = len(captions) * (width + GAP) + GAP
    size = (blocks * block_width - GAP, CAPTION_HEIGHT + per_block * (height + GAP))
    panel = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(panel)
    for block in range(blocks):
        for column, caption in enumerate(captions):
            draw.text((block * block_width + column * (width + GAP) + GAP, 2), caption, fill="black")
    for number, row in enumerate(rows):
        left, top = number // per_block * block_width, CAPTION_HEIGHT + number % per_block * (height + GAP)
        for column, x in enumerate(row.values()):
            panel.paste(to_image(x).convert("RGB"), (left + column * (width + GAP), top))
    return panel


def draw_curves(stats_path: Path, path: Path, model: Model[Any], config: ResolvedConfig) -> None:
    """Draw the losses and the validation scores of a stats.jsonl as a PNG; nothing when it holds no losses."""
    from matplotlib.figure import Figure

    stats, _ = read_stats(stats_path, model)
    losses = [line for line in stats if _kind(line, model) == "losses"]
    scores = [line for line in stats if _kind(line, model) == "scores"]
    if not losses:
        return
    curves = model.curves(config)
    figure = Figure(figsize=(4 * (len(curves) + 1), 3.6), layout="constrained")
    *axes_of_losses, validation = figure.subplots(1, len(curves) + 1)
    steps = [line["step"] for line in losses]
    for axes, curve in zip(axes_of_losses, curves, strict=True):
        color = "tab:purple" if len(curve.losses) == 1 else None
        for name in curve.losses:
            axes.plot(steps, [line[name] for line in losses], label=name, linewidth=1, color=color)
        if curve.level is not None:
            axes.axhline(curve.level, color="grey", linestyle=":", label=curve.level_name)
        if len(curve.losses) > 1:
            axes.legend()
        axes.set(title=curve.title, xlabel="step")
    if scores:
        where = [line["step"] for line in scores]
        first, last = model.scores[0], model.scores[-1]
        validation.plot(where, [line[f"val_{first}"] for line in scores], "o-", color="tab:purple")
        validation.set_ylabel(f"{first}, lower is better", color="tab:purple")
        if last != first:
            higher = validation.twinx()
            higher.plot(where, [line[f"val_{last}"] for line in scores], "s-", color="tab:green")
            higher.set_ylabel(f"{last}, higher is better", color="tab:green")
    validation.set(title="validation", xlabel="step")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    write_atomically(path, buffer.getvalue())
