"""Whole runs: what they leave behind, that they resume bit for bit, and that nothing is lost on the way."""

import itertools
import json
import re
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.runs import assert_equal, assert_same_state, config, resume
from PIL import Image

from fastp2p.errors import InputError, TrainingDiverged
from fastp2p.models.checkpoint import load_checkpoint, load_generator
from fastp2p.models.pix2pix.model import MODEL as PIX2PIX
from fastp2p.train import loop, report
from fastp2p.train.loop import train
from fastp2p.train.recorder import read_stats
from fastp2p.train.run_folder import locked, read_config
from fastp2p.train.state import TrainState


@pytest.fixture
def unbroken(aligned: Path, tmp_path: Path) -> Path:
    """The whole run of 18 steps, never interrupted. The net is deep enough to have dropout."""
    return train(config(aligned, tmp_path / "unbroken", "--dropout", "paper"))


def test_run_folder(unbroken: Path):
    names = {path.name for path in unbroken.iterdir()}
    assert names == {
        *("config.json", "kernels.json", "checkpoint.pt", "netG.safetensors", "netG_best.safetensors"),
        *("stats.jsonl", "panel.png", "panel", "losses.png", "tensorboard"),
    }
    stats = read_stats(unbroken / "stats.jsonl", PIX2PIX)[0]
    losses = [line for line in stats if "loss_G_L1" in line]
    scores = [line for line in stats if "val_L1" in line]
    assert [line["step"] for line in losses] == list(range(2, 19, 2))
    assert [line["step"] for line in scores] == [3, 6, 9, 12, 15, 18]
    assert set(losses[0]) == {
        *("step", "epoch", "loss_G_GAN", "loss_G_L1", "loss_D_real", "loss_D_fake", "lr", "img_per_sec")
    }
    assert [line["lr"] for line in losses[-3:-1]] == [pytest.approx(2e-4 * 0.5), pytest.approx(2e-4 * 0.25)]
    assert min(line["val_L1"] for line in scores) == load_checkpoint(unbroken / "checkpoint.pt")["best_score"]

    best, last = load_generator(unbroken / "netG_best.safetensors")[1], load_generator(unbroken / "netG.safetensors")[1]
    assert last.step == 18
    assert best.step == min(scores, key=lambda line: line["val_L1"])["step"]
    assert (last.levels, last.ngf, last.crop_size, last.data) == (3, 4, 32, "aligned")
    assert [path.name for path in sorted((unbroken / "panel").iterdir())] == ["0000000.png", "0000018.png"]
    with Image.open(unbroken / "panel.png") as panel:
        assert panel.size == (3 * 36, 16 + 2 * 36)  # two validation pairs
    saved = json.loads((unbroken / "config.json").read_text())
    assert saved["load_size"] == 36
    assert "out" not in saved


def test_same_seed_same_run_other_seed_other_run(unbroken: Path, aligned: Path, tmp_path: Path):
    again = train(config(aligned, tmp_path / "again", "--dropout", "paper"))
    assert_same_state(unbroken, again)
    other = train(config(aligned, tmp_path / "other", "--dropout", "paper", "--seed", "1"))
    with pytest.raises(AssertionError):
        assert_same_state(unbroken, other)


@pytest.mark.parametrize("stop", [1, 5, 6, 17])
def test_resume_is_bit_exact(unbroken: Path, aligned: Path, tmp_path: Path, stop: int):
    """Stopped in mid-epoch, at an epoch's end, between two lines of stats, in the decay: always the same end."""
    broken = train(config(aligned, tmp_path / "broken", "--dropout", "paper", "--max-steps", str(stop)))
    assert load_checkpoint(broken / "checkpoint.pt")["step"] == stop
    torch.manual_seed(99)  # what another process would start from
    resume(broken, max_steps=None)
    assert_same_state(unbroken, broken)
    unbroken_losses, losses = logged_losses(unbroken), logged_losses(broken)
    assert set(losses) - set(unbroken_losses) <= {stop}  # the end at an odd step has a line of its own
    assert all(losses[step] == value for step, value in unbroken_losses.items())


def logged_losses(run: Path) -> dict[int, float]:
    return {
        line["step"]: line["loss_G_L1"] for line in read_stats(run / "stats.jsonl", PIX2PIX)[0] if "loss_G_L1" in line
    }


def test_engines_see_the_same_data(aligned: Path, tmp_path: Path):
    """Same seed, same weights, order and jitter: in float64 the two engines are one to rounding, over all 18 steps."""
    runs = [
        train(config(aligned, tmp_path / engine, "--engine", engine, "--precision", "fp64"))
        for engine in ("fused", "reference")
    ]
    lines = [read_stats(run / "stats.jsonl", PIX2PIX)[0] for run in runs]
    assert len(lines[0]) == len(lines[1])
    for one, other in zip(*lines, strict=True):
        numbers = {name: value for name, value in one.items() if name != "img_per_sec"}
        tolerance = 1e-6 if "val_L1" in one else 1e-9  # scores are taken in float32
        assert numbers == pytest.approx({name: other[name] for name in numbers}, rel=tolerance)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--precision", "bf16"), "engine fused, bf16 on fp32 weights; "),
        (("--precision", "fp16", "--dropout", "paper"), "engine fused, fp16 on fp32 weights; "),
        (("--precision", "fp32", "--statistics", "sample"), "engine fused, fp32; "),
        (("--engine", "layers", "--precision", "bf16", "--dropout", "paper"), "engine layers, bf16 on fp32 weights; "),
        (("--engine", "reference", "--statistics", "sample"), "engine reference, fp32; "),
        (("--norm", "instance", "--dropout", "paper"), "engine fused, "),
    ],
)
def test_every_engine_and_precision_resumes_bit_for_bit(
    aligned: Path, tmp_path: Path, options: tuple[str, ...], said: str
):
    lines: list[str] = []
    unbroken = train(config(aligned, tmp_path / "unbroken", *options, "--max-steps", "7"), say=lines.append)
    assert any(said in line for line in lines)
    broken = train(config(aligned, tmp_path / "broken", *options, "--max-steps", "4"))
    torch.manual_seed(99)
    resume(broken, max_steps=7)
    assert_same_state(unbroken, broken)


def test_losses_are_means_whatever_the_log_steps(unbroken: Path, aligned: Path, tmp_path: Path):
    """A run that stops between two lines writes one, and one resumed with other log_steps still logs means."""
    folder = train(config(aligned, tmp_path / "run", "--dropout", "paper", "--max-steps", "3"))
    each = train(config(aligned, tmp_path / "each", "--dropout", "paper", "--log-steps", "1"))
    single = logged_losses(each)
    assert logged_losses(folder) == {2: pytest.approx((single[1] + single[2]) / 2), 3: pytest.approx(single[3])}
    resume(folder, log_steps=7, max_steps=None)
    assert logged_losses(folder)[7] == pytest.approx(sum(single[step] for step in range(3, 8)) / 5)
    assert logged_losses(folder)[14] == pytest.approx(sum(single[step] for step in range(8, 15)) / 7)
    assert logged_losses(folder)[18] == pytest.approx(sum(single[step] for step in range(15, 19)) / 4)


def test_resume_of_a_finished_run_says_so(unbroken: Path):
    """It is scored and written once more, and comes out the same."""
    before, stats = load_checkpoint(unbroken / "checkpoint.pt"), (unbroken / "stats.jsonl").read_bytes()
    pictures = [(unbroken / name).read_bytes() for name in ("panel.png", "losses.png", "netG_best.safetensors")]
    said: list[str] = []
    train(read_config(unbroken), resume=True, say=said.append)
    resume(unbroken, max_steps=18, say=said.append)
    resume(unbroken, max_steps=7, n_epochs=90, say=said.append)
    told = [line.partition("To go on, raise ")[2] for line in said if "nothing left to train" in line]
    assert told == ["--n-epochs.", "--max-steps and --n-epochs.", "--max-steps."]
    assert any(line.startswith("netG unet_8") for line in said)
    assert_equal(load_checkpoint(unbroken / "checkpoint.pt"), before)
    assert (unbroken / "stats.jsonl").read_bytes() == stats
    again = [(unbroken / name).read_bytes() for name in ("panel.png", "losses.png", "netG_best.safetensors")]
    assert again == pictures
    resume(unbroken, n_epochs_decay=4)
    assert load_checkpoint(unbroken / "checkpoint.pt")["step"] == 21


def test_resume_refuses_what_would_change_the_result(unbroken: Path, aligned: Path):
    with pytest.raises(InputError, match=r"ngf: got 8, but .* was trained with 4"):
        resume(unbroken, ngf=8)
    (aligned / "train" / "0.png").rename(aligned / "train" / "7.png")
    before = (unbroken / "config.json").read_bytes()
    with pytest.raises(InputError, match="bring the same pairs back"):
        resume(unbroken, max_steps=99)
    assert (unbroken / "config.json").read_bytes() == before


def test_what_is_refused_or_done_leaves_the_folder_as_it_was(unbroken: Path, camvid_like: Path):
    before = (unbroken / "config.json").read_bytes()
    for changes in ({"data": str(camvid_like), "max_steps": 60}, {"ngf": 8}):
        with pytest.raises(InputError):
            resume(unbroken, **changes)
    resume(unbroken, max_steps=10)  # is at 18: nothing left to train
    (unbroken / "checkpoint.pt").write_bytes(b"damaged")
    with pytest.raises(InputError, match="is damaged"):
        resume(unbroken, max_steps=77)
    (unbroken / "checkpoint.pt").unlink()
    with pytest.raises(InputError, match=r"checkpoint\.pt is missing, but the run had one"):
        resume(unbroken, max_steps=77)
    assert (unbroken / "config.json").read_bytes() == before


@pytest.fixture
def camvid_like(two_folders: Path) -> Path:
    return two_folders


def test_one_process_a_folder(unbroken: Path):
    with locked(unbroken), pytest.raises(InputError, match="another process is training in"):
        resume(unbroken, n_epochs=9)


def test_what_is_wrong_with_both_splits_is_told_at_once(aligned: Path, tmp_path: Path):
    (aligned / "train" / "0.png").write_bytes(b"")
    (aligned / "val" / "1.png").write_bytes(b"")
    with pytest.raises(InputError, match=r"(?s)train/0\.png: the file is empty.*val/1\.png: the file is empty"):
        train(config(aligned, tmp_path / "run"))


def test_a_batch_larger_than_the_set_and_a_padded_crop_are_said(aligned: Path, tmp_path: Path):
    said: list[str] = []
    options = ("--batch-size", "100", "--crop-size", "33", "--max-steps", "1")
    train(config(aligned, tmp_path / "run", *options), say=said.append)
    assert "warning: --batch-size 100, but there are only 6 pairs, so batches are of 6" in said
    assert "netG pads 33 px to 40, the next multiple of 8, and works at that size" in said
    assert any("a step of batch 6 holds" in line for line in said)


@pytest.mark.parametrize("why", [None, "there is no C++ compiler"])
def test_slower_operators_are_said_once(
    aligned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, why: str | None
):
    monkeypatch.setattr(report, "WHY_ABSENT", why)
    said: list[str] = []
    train(config(aligned, tmp_path / "run", "--max-steps", "1"), say=said.append)
    lines = [line for line in said if "C++" in line]
    assert lines == (
        [] if why is None else [f"no C++ kernels, so plain PyTorch serves the operators, more slowly: {why}"]
    )


def test_a_run_is_resumed_from_any_folder(aligned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(aligned.parent)
    folder = train(config(Path("aligned"), tmp_path / "run", "--max-steps", "2"))
    monkeypatch.chdir("/")
    resume(folder, max_steps=3)
    assert load_checkpoint(folder / "checkpoint.pt")["step"] == 3


def test_out_must_be_empty(unbroken: Path, aligned: Path):
    with pytest.raises(InputError, match=r"not empty \(--resume .*unbroken continues"):
        train(config(aligned, unbroken))
    with pytest.raises(InputError, match=r"out: .*config\.json/run cannot be made: Not a directory"):
        train(config(aligned, unbroken / "config.json" / "run"))
    assert load_checkpoint(unbroken / "checkpoint.pt")["step"] == 18


def test_what_needs_no_image_is_refused_before_images_are_read(
    unbroken: Path, aligned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Decoding a large set takes minutes."""
    monkeypatch.setattr(loop, "load_train_data", lambda *args: pytest.fail("images were read"))
    refused = {
        "is not empty": config(aligned, unbroken),
        "no such file": config(aligned, tmp_path / "run", "--kernels", "x"),
    }
    for why, wrong in refused.items():
        with pytest.raises(InputError, match=why):
            train(wrong)
    with pytest.raises(InputError, match="ngf: got 8"):
        resume(unbroken, ngf=8)
    with locked(unbroken), pytest.raises(InputError, match="another process is training"):
        resume(unbroken)
    (unbroken / "checkpoint.pt").write_bytes(b"damaged")
    with pytest.raises(InputError, match="is damaged"):
        resume(unbroken)


def test_bad_data_leaves_no_folder(aligned: Path, tmp_path: Path):
    (aligned / "train" / "0.png").write_bytes(b"")
    with pytest.raises(InputError, match="add --skip-bad"):
        train(config(aligned, tmp_path / "run"))
    assert not (tmp_path / "run").exists()
    said: list[str] = []
    train(config(aligned, tmp_path / "run", "--skip-bad", "--max-steps", "1"), say=said.append)
    assert "train: skipped train/0.png: the file is empty (zero bytes)" in said


def test_without_val_short_epochs_say_nothing(two_folders: Path, tmp_path: Path):
    """Until there is a line of losses to tell."""
    said: list[str] = []
    train(config(two_folders, tmp_path / "run", "--log-steps", "5"), say=said.append)
    assert "step 2:" not in "\n".join(said)
    assert not any(line.rstrip().endswith(":") for line in said if line.startswith("step "))


def test_without_val_the_panel_shows_training_pairs(two_folders: Path, tmp_path: Path):
    said: list[str] = []
    folder = train(config(two_folders, tmp_path / "run", "--max-steps", "2"), say=said.append)
    assert any("no folder val/" in line for line in said)
    assert (folder / "panel.png").exists()
    assert not (folder / "netG_best.safetensors").exists()


def test_nan_stops_the_run_and_keeps_the_last_good_checkpoint(aligned: Path, tmp_path: Path, monkeypatch):
    make_step = TrainState.training_step

    def poisoned_steps(self: TrainState, config: Any) -> Any:
        step, calls = make_step(self, config), itertools.count(1)

        def poisoned(crops: Any) -> Any:
            losses = step(crops)
            return losses | {"loss_D_real": losses["loss_D_real"] * float("nan")} if next(calls) == 5 else losses

        return poisoned

    monkeypatch.setattr(TrainState, "training_step", poisoned_steps)
    with pytest.raises(TrainingDiverged, match=r"step 5: .*checkpoint\.pt holds the last good state"):
        train(config(aligned, tmp_path / "run", "--save-minutes", "0"))
    assert load_checkpoint(tmp_path / "run" / "checkpoint.pt")["step"] == 4
    assert (tmp_path / "run" / "losses.png").exists()
    with pytest.raises(TrainingDiverged, match="no checkpoint had been written"):
        train(config(aligned, tmp_path / "other"))


def test_max_minutes(aligned: Path, tmp_path: Path):
    folder = train(config(aligned, tmp_path / "run", "--max-minutes", "0"))
    assert load_checkpoint(folder / "checkpoint.pt")["step"] == 1


def test_img_per_sec_counts_training_alone(aligned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Half a second of drawing after every step must not slow the figure down, and is told at the end."""
    draw, said = loop.Recorder.panel, []
    monkeypatch.setattr(loop.Recorder, "panel", lambda *args: (time.sleep(0.5), draw(*args))[1])
    folder = train(config(aligned, tmp_path / "run", "--panel-steps", "1", "--max-steps", "4"), say=said.append)
    lines = [line for line in read_stats(folder / "stats.jsonl", PIX2PIX)[0] if "img_per_sec" in line]
    assert len(lines) == 2
    assert all(line["img_per_sec"] > 2 * 2 / 0.9 for line in lines)  # 2 steps of 2 images; drawing takes 1 s of them
    (told,) = [line for line in said if " in panels" in line]
    total, steps, scores, panels, saving = map(float, re.findall(r"\d+\.\d", told))
    assert panels >= 6 * 0.5  # before the first step, after each, and at the end
    assert steps + 6 * 0.5 <= total + 0.1  # drawing is no part of the steps; each is rounded to a tenth
    assert min(scores, saving) >= 0


def test_gpu_without_one_is_told(aligned: Path, tmp_path: Path):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(InputError, match="device: got cuda, but"):
        train(config(aligned, tmp_path / "run", "--device", "cuda"))
