import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from fastp2p import files
from fastp2p.errors import WriteError
from fastp2p.files import remove_leftovers, write_atomically


def test_failed_write_leaves_the_old_file_and_no_rubbish(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "c.pt"
    write_atomically(path, b"old")

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(WriteError, match=r"c\.pt cannot be written: No space left on device\. What was saved") as told:
        write_atomically(path, b"new")
    assert str(told.value).endswith(" Make room, then go on.")  # translate and convert leave no run to resume
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["c.pt"]


def test_the_real_error_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Not that of deleting the temporary file, which fails on such a disk, too."""
    (tmp_path / "file").touch()
    with pytest.raises(WriteError, match=r"file/c\.pt cannot be written: Not a directory"):
        write_atomically(tmp_path / "file" / "c.pt", b"new")

    def read_only(*_: object, **__: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(files.os, "replace", read_only)
    monkeypatch.setattr(files.os, "unlink", read_only)
    with pytest.raises(WriteError, match=r"c\.pt cannot be written: Read-only file system"):
        write_atomically(tmp_path / "c.pt", b"new")


def test_a_planted_link_is_not_followed(tmp_path: Path):
    (tmp_path / "precious").write_bytes(b"kept")
    (tmp_path / f".c.pt.{os.getpid()}.tmp").symlink_to(tmp_path / "precious")
    write_atomically(tmp_path / "c.pt", b"new")
    assert (tmp_path / "precious").read_bytes() == b"kept"
    assert (tmp_path / "c.pt").read_bytes() == b"new"
    assert not (tmp_path / "c.pt").is_symlink()


@pytest.mark.parametrize(
    ("call", "when", "survives"),
    [
        ("fsync", "before", b"old"),
        ("fsync", "after", b"old"),
        ("replace", "before", b"old"),
        ("replace", "after", b"new"),
    ],
)
def test_killed_at_each_instant_of_a_write(tmp_path: Path, call: str, when: str, survives: bytes):
    path = tmp_path / "c.pt"
    write_atomically(path, b"old")
    code = f"""
import os, signal
from pathlib import Path
from fastp2p.files import write_atomically
call = os.{call}
def killing(*args):
    {"call(*args)" if when == "after" else "pass"}
    os.kill(os.getpid(), signal.SIGKILL)
os.{call} = killing
write_atomically(Path({str(path)!r}), b"new")
"""
    done = subprocess.run([sys.executable, "-c", code], check=False)
    assert done.returncode == -9
    assert path.read_bytes() == survives
    remove_leftovers(tmp_path)
    assert os.listdir(tmp_path) == ["c.pt"]


def test_the_longest_name_can_be_written(tmp_path: Path):
    for name in ("x" * 255, "é" * 127):
        write_atomically(tmp_path / name, b"content")
        assert (tmp_path / name).read_bytes() == b"content"
    assert len(list(tmp_path.iterdir())) == 2
