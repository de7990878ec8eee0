"""Run folders: each is one run's alone, from the instant that it is made."""

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier

import pytest

from fastp2p.config import TrainConfig
from fastp2p.errors import InputError
from fastp2p.run_folder import locked, new_folder


def test_runs_that_start_together_get_a_folder_each(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """With their own config.json in it; two took one folder, and the loser's config.json stayed in it."""
    monkeypatch.chdir(tmp_path)
    together = Barrier(8)

    def start(number: int) -> tuple[Path, float]:
        config = TrainConfig(data=str(tmp_path), lr=1e-4 * (number + 1))
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
    with new_folder(TrainConfig(data="photos")) as folder:
        assert (taken, folder) == ([Path("runs/photos-001")], Path("runs/photos-002"))


def test_a_folder_in_which_another_trains_keeps_its_config(tmp_path: Path):
    """The other has made and locked the folder, and has yet to write into it."""
    folder = tmp_path / "run"
    folder.mkdir()
    with locked(folder), pytest.raises(InputError, match="another process is training in"):  # noqa: SIM117
        with new_folder(TrainConfig(data="photos", out=folder)):
            pass
    assert list(folder.iterdir()) == []


def test_a_killed_start_leaves_no_run(tmp_path: Path):
    """Its half-written config.json does not keep the same command from running."""
    (tmp_path / ".config.json.77.tmp").write_text("{")
    with new_folder(TrainConfig(data="photos", out=tmp_path)) as folder:
        assert [path.name for path in folder.iterdir()] == ["config.json"]


def test_a_folder_with_files_is_refused(tmp_path: Path):
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(InputError, match=r"is not empty \(it holds files\); choose another --out"):  # noqa: SIM117
        with new_folder(TrainConfig(data="photos", out=tmp_path)):
            pass
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]
