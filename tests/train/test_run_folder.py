"""Run folders: each is one run's alone, from the instant that it is made."""

import errno
import json
import os
import shlex
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from threading import Barrier
from typing import Any

import pytest
from conftest import TINY

import fastp2p
from fastp2p import files
from fastp2p.cli import parse
from fastp2p.errors import InputError, WriteError
from fastp2p.files import remove_leftovers
from fastp2p.models.pix2pix.options import Pix2PixConfig
from fastp2p.train.loop import train
from fastp2p.train.run_folder import locked, new_folder, read_config


def test_runs_that_start_together_get_a_folder_each(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """With their own config.json in it; two took one folder, and the loser's config.json stayed in it."""
    monkeypatch.chdir(tmp_path)
    together = Barrier(8)

    def start(number: int) -> tuple[Path, float]:
        config = Pix2PixConfig(data=str(tmp_path), lr=1e-4 * (number + 1))
        together.wait()
        with new_folder(config) as folder:
            together.wait()  # all have written
            return folder, json.loads((folder / "config.json").read_text())["lr"] / config.lr

    with ThreadPoolExecutor(8) as threads:
        for _ in range(5):
            started = list(threads.map(start, range(8)))
            assert len({folder for folder, _ in started}) == 8
            assert [lr for _, lr in started] == [1.0] * 8


def test_a_number_that_another_takes_in_between_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    mkdir, taken = Path.mkdir, []

    def other_is_faster(path: Path, *args: int, **options: bool) -> None:
        if path.name.endswith("-001") and not taken:
            taken.append(path)
            mkdir(path)
        mkdir(path, *args, **options)

    monkeypatch.setattr(Path, "mkdir", other_is_faster)
    with new_folder(Pix2PixConfig(data="photos")) as folder:
        assert (taken, folder) == ([Path("runs/photos-001")], Path("runs/photos-002"))


def test_a_number_that_another_locks_in_between_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A run with --out runs/photos-001 takes the folder that this one has made, before this one locks it."""
    monkeypatch.chdir(tmp_path)
    mkdir = Path.mkdir
    with ExitStack() as other:

        def other_locks(path: Path, *args: int, **options: bool) -> None:
            mkdir(path, *args, **options)
            if path.name.endswith("-001"):
                other.enter_context(locked(path))

        monkeypatch.setattr(Path, "mkdir", other_locks)
        with new_folder(Pix2PixConfig(data="photos")) as folder:
            assert folder == Path("runs/photos-002")
        assert list(Path("runs/photos-001").iterdir()) == []


PROCESS = """
import sys
from pathlib import Path
from fastp2p.models.pix2pix.options import Pix2PixConfig
from fastp2p.files import remove_leftovers
from fastp2p.train.run_folder import new_folder
config = Pix2PixConfig(data="photos", lr=float(sys.argv[1]))
print("ready", flush=True)
sys.stdin.readline()
with new_folder(config) as folder:
    print(folder, flush=True)
    sys.stdin.readline()
"""


def test_processes_that_start_together_keep_their_own_config(tmp_path: Path):
    rates = [1e-4, 2e-4, 3e-4]
    path = os.pathsep.join([str(Path(fastp2p.__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    options: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "cwd": tmp_path}
    processes = [
        subprocess.Popen([sys.executable, "-c", PROCESS, str(lr)], env=os.environ | {"PYTHONPATH": path}, **options)
        for lr in rates
    ]
    try:
        assert [process.stdout.readline() for process in processes] == ["ready\n"] * 3
        for process in processes:
            process.stdin.write("go\n")
            process.stdin.flush()
        folders = [tmp_path / process.stdout.readline().strip() for process in processes]
        written = [json.loads((folder / "config.json").read_text())["lr"] for folder in folders]
    finally:
        for process in processes:
            process.communicate()  # closes its input, at which it ends
    assert len(set(folders)) == 3
    assert written == rates


def test_a_panel_s_leftover_goes(tmp_path: Path):
    (tmp_path / "panel").mkdir()
    (tmp_path / "panel" / ".0000005.png.77.tmp").touch()
    (tmp_path / "panel" / "0000005.png").touch()
    remove_leftovers(tmp_path)
    assert [path.name for path in (tmp_path / "panel").iterdir()] == ["0000005.png"]


def test_a_folder_in_which_another_trains_keeps_its_config(tmp_path: Path):
    """The other has made and locked the folder, and has yet to write into it."""
    folder = tmp_path / "run"
    folder.mkdir()
    with locked(folder), pytest.raises(InputError, match="another process is training in"):  # noqa: SIM117
        with new_folder(Pix2PixConfig(data="photos", out=folder)):
            pass
    assert list(folder.iterdir()) == []


def test_a_killed_start_leaves_no_run(tmp_path: Path):
    """Its half-written config.json does not keep the same command from running."""
    (tmp_path / ".config.json.77.tmp").write_text("{")
    with new_folder(Pix2PixConfig(data="photos", out=tmp_path)) as folder:
        assert [path.name for path in folder.iterdir()] == ["config.json"]


def test_a_folder_with_files_is_refused(tmp_path: Path):
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(InputError, match=r"is not empty \(it holds files\); choose another --out"):  # noqa: SIM117
        with new_folder(Pix2PixConfig(data="photos", out=tmp_path)):
            pass
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize("full", ["checkpoint.pt", "netG.safetensors", "stats.jsonl"])
def test_a_full_disk_names_the_command_that_goes_on(
    aligned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, full: str
):
    """The folder is the run's own, not panel/, and a shell takes it as one word."""
    folder, replaced = tmp_path / "my run", os.replace

    def no_room(source: Path, target: Path) -> None:
        if target == folder / full:
            raise OSError(errno.ENOSPC, "No space left on device")
        replaced(source, target)

    monkeypatch.setattr(files.os, "replace", no_room)
    with pytest.raises(WriteError, match="Make room, then go on") as told:
        train(parse(["train", *TINY, "--data", str(aligned), "--out", str(folder), "--max-steps", "2"]).config)
    text = str(told.value)
    assert text.startswith(f"{folder / full} cannot be written: No space left on device.")
    assert shlex.split(text[text.index("fastp2p train") :]) == ["fastp2p", "train", "--resume", str(folder)]
    monkeypatch.undo()
    train(read_config(folder), resume=True)
