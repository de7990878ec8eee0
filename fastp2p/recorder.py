"""What a run leaves behind to look at: stats.jsonl, TensorBoard events, panels and loss curves."""

import io
import json
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw
from torch import Tensor

from fastp2p.config import GanMode
from fastp2p.data.images import to_image, to_jpeg, to_png
from fastp2p.errors import InputError, WriteError
from fastp2p.files import write_atomically
from fastp2p.losses import BALANCE

PANEL_COLUMNS = ("input", "output", "target")
CAPTION_HEIGHT = 16  # px
GAP = 4  # px


class Recorder:
    """The written record of one run folder, open as long as the `with` block; its end draws losses.png.

    Args:
        folder: the run folder.
        step: where the run stands; later lines, which a killed run may have left, are dropped.
        gan_mode: for the balance in the picture of the losses.
    """

    def __init__(self, folder: Path, step: int, gan_mode: GanMode):
        from torch.utils.tensorboard import SummaryWriter

        self.folder, self.gan_mode = folder, gan_mode
        self.stats_path = folder / "stats.jsonl"
        kept = [line for line in read_stats(self.stats_path) if line["step"] <= step]
        write_atomically(self.stats_path, "".join(json.dumps(line) + "\n" for line in kept).encode())
        self.stats = open(self.stats_path, "a", buffering=1)  # noqa: SIM115 (open as long as the run)
        self.events = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)
        self.thread = ThreadPoolExecutor(1, "panel")  # encoding one takes as long as a hundred steps of a GPU
        self.pending: Future[None] | None = None  # panel, that the thread writes

    def __enter__(self) -> "Recorder":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        try:
            self._wait_for_panel()
        finally:
            self.thread.shutdown()
            self.stats.close()
            self.events.close()
        if kind is not WriteError:  # a diverged run wants its curves most of all
            draw_curves(self.stats_path, self.folder / "losses.png", self.gan_mode)

    def scalars(self, step: int, values: dict[str, Any]) -> None:
        """Append a line of numbers to stats.jsonl and to TensorBoard. Raises WriteError."""
        try:
            self.stats.write(json.dumps({"step": step, **values}) + "\n")
        except OSError as error:
            raise WriteError(self.stats_path, error) from error
        for name, value in values.items():
            self.events.add_scalar(name.replace("loss_", "loss/").replace("val_", "val/"), value, step)

    def panel(self, step: int, rows: Sequence[Sequence[Tensor]]) -> None:
        """Draw the validation panel; a thread writes it as panel/STEP.png, as panel.png and to TensorBoard.

        Raises:
            WriteError: when the panel before this one could not be written; the end of the `with` block raises for
                the last one.
        """
        image = draw_panel(rows)
        self._wait_for_panel()
        self.pending = self.thread.submit(self._write_panel, step, image)

    def _wait_for_panel(self) -> None:
        pending, self.pending = self.pending, None
        if pending is not None:
            pending.result()

    def _write_panel(self, step: int, image: Image.Image) -> None:
        from tensorboard.compat.proto.summary_pb2 import Summary

        png = to_png(image, fast=True)
        (self.folder / "panel").mkdir(exist_ok=True)
        for path in (self.folder / "panel" / f"{step:07d}.png", self.folder / "panel.png"):
            write_atomically(path, png)
        # TensorBoard's checksum goes through every byte in Python and holds up the steps. A photo's panel is smaller as
        # a JPEG, a label map's as a PNG.
        encoded = min(png, to_jpeg(image), key=len)
        content = Summary.Image(height=image.height, width=image.width, colorspace=3, encoded_image_string=encoded)
        self.events._get_file_writer().add_summary(Summary(value=[Summary.Value(tag="panel", image=content)]), step)


def read_stats(path: Path) -> list[dict[str, Any]]:
    """The lines of a stats.jsonl, without the half line that a killed process may have left at its end.

    Raises:
        InputError: when another line is damaged.
    """
    if not path.exists():
        return []
    stats = []
    for number, line in enumerate(path.read_text().split("\n")[:-1], start=1):
        try:
            stats.append(dict(json.loads(line)))
            stats[-1]["step"] += 0
        except (ValueError, TypeError, KeyError) as error:
            raise InputError(f"{path}, line {number}: is damaged; delete the line to go on") from error
    return stats


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

    stats = read_stats(stats_path)
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
