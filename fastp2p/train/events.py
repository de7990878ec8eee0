"""TensorBoard's event file of one call of train."""

import os
import socket
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image

from fastp2p.data.images import to_jpeg


class EventFile:
    """Events as TensorBoard reads them, on the disk as soon as they are written.

    PyTorch's SummaryWriter has a thread of its own, whose errors come as tracebacks on the terminal, and later.

    Args:
        folder: made where it is missing.
        step: where the run stands; TensorBoard shows no later events of earlier files.

    Raises:
        OSError: when it cannot be written, as from each method.
    """

    def __init__(self, folder: Path, step: int):
        # Slow to import, and wanted by training alone
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog
        from tensorboard.compat.proto.summary_pb2 import Summary
        from tensorboard.summary.writer.record_writer import RecordWriter

        self.Event, self.Summary = Event, Summary
        folder.mkdir(exist_ok=True)
        name = f"events.out.tfevents.{time.time_ns()}.{socket.gethostname()}.{os.getpid()}"  # sorted by time
        self.file = open(folder / name, "xb")  # noqa: SIM115 (open as long as the run)
        self.records = RecordWriter(self.file)
        self.lock = threading.Lock()  # a panel comes from another thread than numbers
        self._write(file_version="brain.Event:2")
        self._write(step=step + 1, session_log=SessionLog(status=SessionLog.START))

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Numbers by tag, such as loss/G_L1."""
        pairs = [self.Summary.Value(tag=tag, simple_value=value) for tag, value in values.items()]
        self._write(step=step, summary=self.Summary(value=pairs))

    def panel(self, step: int, image: Image.Image, png: bytes) -> None:
        """The panel, given as an image and as a PNG of it.

        The checksum goes through every byte in Python and holds up the steps. A photo's panel is smaller as a JPEG, a
        label map's as a PNG.
        """
        encoded = min(png, to_jpeg(image), key=len)
        content = self.Summary.Image(height=image.height, width=image.width, colorspace=3, encoded_image_string=encoded)
        self._write(step=step, summary=self.Summary(value=[self.Summary.Value(tag="panel", image=content)]))

    def close(self) -> None:
        self.file.close()

    def _write(self, **fields: Any) -> None:
        record = self.Event(wall_time=time.time(), **fields).SerializeToString()
        with self.lock:
            self.records.write(record)
            self.records.flush()
