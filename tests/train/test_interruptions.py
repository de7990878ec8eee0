"""Runs that are killed, stopped, or find their disk full: nothing is lost, and they go on bit for bit."""

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from helpers.runs import assert_same_state, config, resume, start, wait_for

from fastp2p.errors import InputError, TrainingDiverged
from fastp2p.models.checkpoint import load_checkpoint
from fastp2p.models.pix2pix.model import MODEL as PIX2PIX
from fastp2p.terminal import stop_signals
from fastp2p.train.loop import Run, train
from fastp2p.train.recorder import read_stats
from fastp2p.train.run_folder import read_config
from fastp2p.train.state import TrainState


def test_kill_9_at_any_instant(aligned: Path, tmp_path: Path):
    """Checkpoints are written after every step, so most kills fall into the middle of a write."""
    long = ("--dropout", "paper", "--n-epochs", "400", "--max-steps", "120", "--val-epochs", "1000")
    unbroken = train(config(aligned, tmp_path / "unbroken", *long))
    folder = tmp_path / "killed"
    process = start(aligned, folder, *long, "--save-minutes", "0")
    for delay in (0.05, 0.13, 0.31):
        wait_for(folder / "checkpoint.pt", process)
        time.sleep(delay)
        process.kill()
        process.communicate()
        assert process.returncode == -9, "it ended before it could be killed"
        load_checkpoint(folder / "checkpoint.pt")
        (folder / ".checkpoint.pt.1.tmp").write_text("half a file")  # what a kill in mid-write leaves
        command = [sys.executable, "-m", "fastp2p", "train", "--resume", str(folder)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        while (folder / ".checkpoint.pt.1.tmp").exists():
            assert process.poll() is None, process.communicate()[0]
            time.sleep(0.01)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output
    assert_same_state(unbroken, folder)
    assert not list(folder.glob(".*"))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_ctrl_c_saves_and_exits_cleanly(aligned: Path, tmp_path: Path, number: int):
    process = start(aligned, tmp_path / "run", "--n-epochs", "100000", "--panel-steps", "1")
    wait_for(tmp_path / "run" / "panel" / "0000003.png", process)
    os.kill(process.pid, number)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 0, output
    assert "Traceback" not in output
    step = load_checkpoint(tmp_path / "run" / "checkpoint.pt")["step"]
    assert "stopping: this step is finished and saved" in output
    assert f"Stopped and saved at step {step}. Go on with: fastp2p train --resume" in output
    assert (tmp_path / "run" / "losses.png").exists() == (step >= 20)


def test_full_disk_is_told_and_the_previous_checkpoint_kept(aligned: Path, tmp_path: Path):
    """The kernel refuses files over a limit that the first, smaller files fit and a second checkpoint does not."""
    folder = train(config(aligned, tmp_path / "run", "--max-steps", "2"))
    before = (folder / "checkpoint.pt").read_bytes()
    code = f"""
import resource, sys
from fastp2p.cli import main
resource.setrlimit(resource.RLIMIT_FSIZE, ({len(before) // 2},) * 2)
sys.exit(main(["train", "--resume", {str(folder)!r}, "--max-steps", "4"]))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1, done.stderr
    assert "cannot be written: File too large. What was saved before is intact" in done.stderr
    assert "Traceback" not in done.stderr
    assert (folder / "checkpoint.pt").read_bytes() == before


SHELL = '"$0" -m fastp2p train --resume "$1" --max-steps 4'


@pytest.mark.parametrize(
    ("redirection", "status"),
    [
        *((">&-", 0), ("2>&-", 0), (">&- 2>&- <&-", 0), (">/dev/full", 1), ("2>/dev/full", 0)),
        (" | true; exit ${PIPESTATUS[0]}", 0),
        ("2>&1 | head -n 1 >/dev/null; exit ${PIPESTATUS[0]}", 0),
    ],
)
def test_a_run_outlasts_its_terminal(aligned: Path, tmp_path: Path, redirection: str, status: int):
    """It trains to its end, whoever no longer reads what it says."""
    folder = train(config(aligned, tmp_path / "run", "--max-steps", "2"))
    command = ["bash", "-c", f"{SHELL} {redirection}", sys.executable, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == status, done.stderr
    assert "Traceback" not in done.stderr + done.stdout
    assert "Exception" not in done.stderr
    assert load_checkpoint(folder / "checkpoint.pt")["step"] == 4
    assert {file.name for file in folder.iterdir() if file.is_file()} >= {"config.json", "kernels.json", "panel.png"}
    for name in ("config.json", "kernels.json"):
        json.loads((folder / name).read_text())  # nobody else wrote into it
    if status:
        assert "stdout cannot be written: [Errno 28] No space left on device" in done.stderr


@pytest.mark.parametrize(
    ("args", "redirection", "status"),
    [
        ("info", ">&- 2>&-", 0),
        ("info", ">/dev/full", 1),
        ("info", "| true; exit ${PIPESTATUS[0]}", 0),
        ("--help", ">&-", 0),
        ("train --help", ">/dev/full", 1),
    ],
)
def test_commands_outlast_their_terminal(args: str, redirection: str, status: int):
    command = ["bash", "-c", f'"$0" -m fastp2p {args} {redirection}', sys.executable]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (done.returncode, "Traceback" in done.stderr, "Exception" in done.stderr) == (status, False, False), done


def test_a_run_in_a_thread(aligned: Path, tmp_path: Path):
    """A notebook or a web page trains in a thread: signals are the main thread's."""
    with ThreadPoolExecutor(1) as thread:
        folder = thread.submit(train, config(aligned, tmp_path / "run", "--max-steps", "2")).result()
    assert load_checkpoint(folder / "checkpoint.pt")["step"] == 2


def test_nohup_is_respected():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with stop_signals(print) as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert stop == []
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_terminal_that_closes_tells_so_twice():
    """Shells pass on SIGHUP beside the kernel's; the second one interrupts nothing, a Ctrl-C does."""
    said: list[str] = []
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # where the tests run in the background
    try:
        with stop_signals(said.append) as stop:
            for _ in range(2):
                os.kill(os.getpid(), signal.SIGHUP)
            assert stop == [signal.SIGHUP] * 2
            assert len(said) == 1
            with pytest.raises(KeyboardInterrupt):
                signal.raise_signal(signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("where", ["validate", "panel", "save"])
def test_a_run_killed_at_its_end_ends_as_the_unbroken_one(
    aligned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
):
    """With a checkpoint of the last step written already, --resume makes the scores, the panel and the curves."""
    unbroken = train(config(aligned, tmp_path / "unbroken", "--save-minutes", "0"))
    folder, method = tmp_path / "killed", getattr(Run, where)

    class Killed(BaseException):
        pass

    def killed(run: Run) -> None:
        path = folder / "checkpoint.pt"
        if run.state.step == 18 and path.exists() and load_checkpoint(path)["step"] == 18:
            raise Killed
        method(run)

    monkeypatch.setattr(Run, where, killed)
    with pytest.raises(Killed):
        train(config(aligned, folder, "--save-minutes", "0", "--val-epochs", "100"))
    monkeypatch.undo()
    resume(folder)
    assert_same_state(unbroken, folder)
    lines = [[strip(line) for line in read_stats(run / "stats.jsonl", PIX2PIX)[0][-2:]] for run in (unbroken, folder)]
    assert lines[0] == lines[1]
    assert (folder / "panel.png").read_bytes() == (unbroken / "panel.png").read_bytes()
    assert (folder / "losses.png").exists()


def strip(line: dict[str, Any]) -> dict[str, Any]:
    """Without what depends on the clock."""
    return {name: value for name, value in line.items() if name != "img_per_sec"}


def test_an_image_that_vanishes_ends_a_run_saved(aligned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """It is named; brought back, the run goes on to the unbroken one's end, and --skip-bad goes on without it."""
    unbroken = train(config(aligned, tmp_path / "unbroken"))
    folder, image, away = tmp_path / "my run", aligned / "train" / "3.png", tmp_path / "3.png"

    def vanish(run: Run) -> Iterator[Any]:
        for number, crops in enumerate(batches(run)):
            if number == 1:
                image.rename(away)
            yield crops

    batches = Run.batches
    monkeypatch.setattr(Run, "batches", vanish)
    with pytest.raises(InputError, match=r"data: train/3\.png: .*--skip-bad goes on without it\.\nSaved at") as told:
        train(config(aligned, folder, "--stream", "always"))
    assert shlex.split(str(told.value).rpartition("with: ")[2]) == ["fastp2p", "train", "--resume", str(folder)]
    away.rename(image)
    said: list[str] = []
    train(config(aligned, tmp_path / "skipping", "--stream", "always", "--skip-bad"), say=said.append)
    assert [line.partition("3.png")[0] for line in said if "skipped" in line] == ["train: skipped train/"]
    away.rename(image)
    monkeypatch.undo()
    resume(folder)
    assert_same_state(unbroken, folder)


def test_the_advice_after_a_divergence_can_be_followed(
    aligned: Path, tmp_path: Path, fastp2p: Any, monkeypatch: pytest.MonkeyPatch
):
    folder = tmp_path / "my run"
    cut = "--precision fp16 --save-minutes 0"
    train(config(aligned, folder, *cut.split(), "--max-steps", "3"))
    monkeypatch.setattr(TrainState, "is_finite", lambda self: self.step < 5)
    with pytest.raises(TrainingDiverged, match="Go on more gently with") as told:
        resume(folder, max_steps=9)
    monkeypatch.undo()
    advice = shlex.split(str(told.value).rpartition("with: ")[2].partition("\n")[0])
    assert advice == ["fastp2p", "train", "--resume", str(folder), "--lr", "5e-05"]
    for options in (advice[2:], ["--resume", str(folder), "--precision", "fp32", "--max-steps", "12"]):
        done = fastp2p("train", *options)
        assert done.returncode == 0, done.stderr
        assert f"{options[2][2:]}: {options[3]} from here on" in done.stdout
    assert read_config(folder).lr == 5e-5
    with pytest.raises(InputError, match="precision: got fp64, but"):
        resume(folder, precision="fp64")
