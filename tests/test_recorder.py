import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fastp2p.errors import InputError, WriteError
from fastp2p.recorder import Recorder, draw_panel, read_stats

LINE = {"loss_G_GAN": 1.0, "loss_G_L1": 30.0, "loss_D_real": 0.6, "loss_D_fake": 0.7}


def test_panel_shows_each_image_in_its_place():
    rows = [tuple(torch.full((3, 8, 8), v) for v in (-1.0, 0.0, 1.0)) for _ in range(6)]
    panel = np.asarray(draw_panel(rows))
    assert panel.shape == (16 + 3 * 12, 2 * 40 - 4, 3)  # two blocks of three rows under a caption
    for left in (0, 40):
        assert [panel[16 + 12 + 4, left + column * 12 + 4, 0] for column in range(3)] == [0, 128, 255]


def test_record_goes_on_where_the_checkpoint_was(tmp_path: Path):
    with Recorder(tmp_path, 0, "vanilla") as recorder:
        for step in (10, 20, 30):
            recorder.scalars(step, LINE)
        recorder.scalars(20, {"val_L1": 0.1, "val_PSNR": 20.0, "val_SSIM": 0.8})
    with open(tmp_path / "stats.jsonl", "a") as file:
        file.write('{"step": 40, "loss_')  # cut off by kill -9

    with Recorder(tmp_path, 20, "vanilla") as recorder:
        recorder.scalars(30, LINE)
    assert (tmp_path / "losses.png").exists()
    assert [line["step"] for line in read_stats(tmp_path / "stats.jsonl")] == [10, 20, 20, 30]
    for line in (tmp_path / "stats.jsonl").read_text().splitlines():
        json.loads(line)


def test_a_damaged_line_is_told(tmp_path: Path):
    (tmp_path / "stats.jsonl").write_text('{"step": 1}\nrubbish\n')
    with pytest.raises(InputError, match=r"stats\.jsonl, line 2: is damaged; delete the line"):
        Recorder(tmp_path, 5, "vanilla")


def test_files_are_what_they_should_be(tmp_path: Path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with Recorder(tmp_path, 0, "vanilla") as recorder:
        recorder.scalars(10, LINE)
        recorder.panel(10, [tuple(torch.zeros(3, 8, 8) for _ in range(3))])
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
    with Recorder(tmp_path, 0, "vanilla") as recorder:
        recorder.panel(10, [tuple(x.expand(3, -1, -1) for x in photo)])
    (shown,) = EventAccumulator(str(tmp_path / "tensorboard")).Reload().Images("panel")
    assert 3 * len(shown.encoded_image_string) < (tmp_path / "panel.png").stat().st_size
    with Image.open(io.BytesIO(shown.encoded_image_string)) as jpeg, Image.open(tmp_path / "panel.png") as png:
        assert jpeg.size == png.size == (shown.width, shown.height)
        difference = np.abs(np.asarray(jpeg).astype(float) - np.asarray(png))
    assert difference.mean() < 4  # of 255; captions are the hard part


def test_tensorboard_s_panel_of_flat_colours_is_exact(tmp_path: Path):
    """A label map is smaller as a PNG."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    label = torch.ones(3, 128, 128)
    label[:, 32:96, 40:80] = -1
    with Recorder(tmp_path, 0, "vanilla") as recorder:
        recorder.panel(10, [(label, label, label)])
    (shown,) = EventAccumulator(str(tmp_path / "tensorboard")).Reload().Images("panel")
    assert shown.encoded_image_string == (tmp_path / "panel.png").read_bytes()


def test_a_panel_that_cannot_be_written_is_told(tmp_path: Path):
    """By the next panel, or at the end."""
    rows = [tuple(torch.zeros(3, 8, 8) for _ in range(3))]
    (tmp_path / "panel.png").mkdir()
    recorder = Recorder(tmp_path, 0, "vanilla")
    recorder.panel(10, rows)
    with pytest.raises(WriteError, match=r"panel\.png"):
        recorder.panel(20, rows)
    recorder.panel(30, rows)
    with pytest.raises(WriteError, match=r"panel\.png"):
        recorder.__exit__(None, None, None)


def test_nothing_to_draw(tmp_path: Path):
    with Recorder(tmp_path, 0, "vanilla"):
        pass
    assert not (tmp_path / "losses.png").exists()
