import io
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fastp2p.errors import InputError
from fastp2p.models.pix2pix.model import MODEL as PIX2PIX
from fastp2p.models.pix2pix.options import Pix2PixConfig
from fastp2p.train.recorder import Recorder, draw_panel, read_stats

CONFIG = Pix2PixConfig(gan_mode="vanilla").resolve("cpu", "bf16")
CAPTIONS = ("input", "output", "target")
LINE = {"loss_G_GAN": 1.0, "loss_G_L1": 30.0, "loss_D_real": 0.6, "loss_D_fake": 0.7}


def test_panel_shows_each_image_in_its_place():
    row = {caption: torch.full((3, 8, 8), v) for caption, v in zip(CAPTIONS, (-1.0, 0.0, 1.0), strict=True)}
    rows = [row] * 6
    panel = np.asarray(draw_panel(rows))
    assert panel.shape == (16 + 3 * 12, 2 * 40 - 4, 3)  # two blocks of three rows under a caption
    for left in (0, 40):
        assert [panel[16 + 12 + 4, left + column * 12 + 4, 0] for column in range(3)] == [0, 128, 255]


def test_record_goes_on_where_the_checkpoint_was(tmp_path: Path):
    with Recorder(tmp_path, 0, PIX2PIX, CONFIG, print) as recorder:
        for step in (10, 20, 30):
            recorder.scalars(step, LINE)
        recorder.scalars(20, {"val_L1": 0.1, "val_PSNR": 20.0, "val_SSIM": 0.8})
    with open(tmp_path / "stats.jsonl", "a") as file:
        file.write('{"step": 40, "loss_')  # cut off by kill -9

    with Recorder(tmp_path, 20, PIX2PIX, CONFIG, print) as recorder:
        recorder.scalars(30, LINE)
    assert (tmp_path / "losses.png").exists()
    assert [line["step"] for line in read_stats(tmp_path / "stats.jsonl", PIX2PIX)[0]] == [10, 20, 20, 30]
    for line in (tmp_path / "stats.jsonl").read_text().splitlines():
        json.loads(line)


@pytest.mark.parametrize(
    "damage",
    [
        *(
            b"rubbish",
            b"\xff\xfe",
            b"",
            b"[1, 2]",
            b'"step"',
            b"[" * 100_000,
            b'{"step": 1}',
            b'{"step": 1, "loss_G_L1": 1}',
        ),
        json.dumps({"step": "5", **LINE}).encode(),
        json.dumps({"step": 5.0, **LINE}).encode(),
        json.dumps({"step": True, **LINE}).encode(),
        json.dumps({"step": 5, **LINE, "loss_G_L1": None}).encode(),
        json.dumps({"step": 5, **LINE, "loss_G_L1": 10**400}).encode(),
    ],
    ids=lambda damage: damage[:40].decode(errors="replace"),
)
def test_damaged_lines_cost_themselves_alone(tmp_path: Path, damage: bytes):
    good = [json.dumps({"step": step, **LINE}).encode() for step in (1, 2)]
    (tmp_path / "stats.jsonl").write_bytes(good[0] + b"\n" + damage + b"\n" + good[1] + b"\n")
    said: list[str] = []
    with Recorder(tmp_path, 5, PIX2PIX, CONFIG, said.append):
        pass
    assert said == [f"warning: {tmp_path}/stats.jsonl: damaged lines are dropped: 1"]
    assert (tmp_path / "stats.jsonl").read_bytes().splitlines() == good
    assert (tmp_path / "losses.png").exists()


@pytest.mark.parametrize("kind", ["folder", "pipe", "device"])
def test_stats_that_cannot_be_read_are_told(tmp_path: Path, kind: str):
    """Opening a pipe waits for its writer, and a device may never end."""
    path, said = tmp_path / "stats.jsonl", {"folder": "a folder"}.get(kind, "a named pipe, a socket or a device")
    match kind:
        case "folder":
            path.mkdir()
        case "pipe":
            os.mkfifo(path)
        case "device":
            path.symlink_to("/dev/null")  # not /dev/zero, which would take all memory
    with pytest.raises(InputError, match=rf"stats\.jsonl: is {said}; expected .*; move it away to go on without"):
        Recorder(tmp_path, 5, PIX2PIX, CONFIG, print)


def test_files_are_what_they_should_be(tmp_path: Path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with Recorder(tmp_path, 0, PIX2PIX, CONFIG, print) as recorder:
        recorder.scalars(10, LINE)
        recorder.panel(10, [dict.fromkeys(CAPTIONS, torch.zeros(3, 8, 8))])
    with Image.open(tmp_path / "losses.png") as curves:
        assert curves.width > 800
    assert (tmp_path / "panel" / "0000010.png").read_bytes() == (tmp_path / "panel.png").read_bytes()
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert events.Scalars("loss/G_L1")[0].value == 30.0
    assert events.Images("panel")[0].step == 10


def test_tensorboard_s_panel_is_small(tmp_path: Path):
    """Its checksum is made in Python, byte by byte, while the steps wait."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    photo = torch.nn.functional.interpolate(torch.rand(3, 1, 16, 16) * 2 - 1, size=128, mode="bicubic")
    with Recorder(tmp_path, 0, PIX2PIX, CONFIG, print) as recorder:
        recorder.panel(10, [{caption: x.expand(3, -1, -1) for caption, x in zip(CAPTIONS, photo, strict=True)}])
    (shown,) = EventAccumulator(str(tmp_path / "tensorboard")).Reload().Images("panel")
    assert 3 * len(shown.encoded_image_string) < (tmp_path / "panel.png").stat().st_size
    with Image.open(io.BytesIO(shown.encoded_image_string)) as jpeg, Image.open(tmp_path / "panel.png") as png:
        assert jpeg.size == png.size == (shown.width, shown.height)
        difference = np.abs(np.asarray(jpeg).astype(float) - np.asarray(png))
    assert difference.mean() < 4  # levels of 255; captions are the hard part


def test_tensorboard_s_panel_of_flat_colours_is_exact(tmp_path: Path):
    """A label map is smaller as a PNG."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    label = torch.ones(3, 128, 128)
    label[:, 32:96, 40:80] = -1
    with Recorder(tmp_path, 0, PIX2PIX, CONFIG, print) as recorder:
        recorder.panel(10, [dict.fromkeys(CAPTIONS, label)])
    (shown,) = EventAccumulator(str(tmp_path / "tensorboard")).Reload().Images("panel")
    assert shown.encoded_image_string == (tmp_path / "panel.png").read_bytes()


@pytest.mark.parametrize("kind", ["panel", "panel.png", "losses.png", "tensorboard"])
def test_pictures_and_events_that_cannot_be_written_cost_one_warning(tmp_path: Path, kind: str):
    """A folder of that name, or a file, is in their way."""
    rows = [dict.fromkeys(CAPTIONS, torch.zeros(3, 8, 8))]
    if "." in kind:
        (tmp_path / kind).mkdir()
    else:
        (tmp_path / kind).touch()
    said: list[str] = []
    with Recorder(tmp_path, 0, PIX2PIX, CONFIG, said.append) as recorder:
        for step in (10, 20, 30):
            recorder.scalars(step, LINE)
            recorder.panel(step, rows)
    assert [line["step"] for line in read_stats(tmp_path / "stats.jsonl", PIX2PIX)[0]] == [10, 20, 30]
    assert len(said) == 1
    assert kind in said[0]
    assert "cannot be written" in said[0]


def test_events_that_fail_later_cost_one_warning(tmp_path: Path):
    """And no later event is tried."""
    said: list[str] = []
    with Recorder(tmp_path, 0, PIX2PIX, CONFIG, said.append) as recorder, open("/dev/full", "wb", 0) as full:
        assert recorder.events is not None
        recorder.events.records._writer = full
        for step in range(10):
            recorder.scalars(step, LINE)
    assert said == [
        "warning: TensorBoard's events cannot be written: [Errno 28] No space left on device; "
        "training goes on, and says no more of TensorBoard's events"
    ]
    assert len(read_stats(tmp_path / "stats.jsonl", PIX2PIX)[0]) == 10


def test_a_line_that_is_there_is_not_written_twice(tmp_path: Path):
    """A run that was killed between its last line and its last checkpoint comes by once more."""
    for _ in range(2):
        with Recorder(tmp_path, 10, PIX2PIX, CONFIG, print) as recorder:
            recorder.scalars(10, LINE)
            recorder.scalars(10, {"val_L1": 0.1, "val_PSNR": 20.0, "val_SSIM": 0.8})
    assert len(read_stats(tmp_path / "stats.jsonl", PIX2PIX)[0]) == 2


def test_nothing_to_draw(tmp_path: Path):
    with Recorder(tmp_path, 0, PIX2PIX, CONFIG, print):
        pass
    assert not (tmp_path / "losses.png").exists()
