"""What make gpu-cache leaves: taken where it belongs, refused in one line elsewhere, whole or absent."""

import importlib.metadata
import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import gpu_cache
import pytest
from gpu_cache import MANIFEST, ROOT, Stale, digest, unpack

pytest.importorskip("triton", reason="needs triton")
gpu_programs = pytest.importorskip("gpu_programs", reason="needs triton")

WHEEL = "fastp2p_wheel-1-py3-none-any.whl"


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A few of the sources."""
    root = tmp_path / "checkout"
    for name in ("kernels/adam.py", "fastp2p/config.py", "csrc/cuda/adam.cu", "pyproject.toml", "setup.py"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, root / name)
    return root


@pytest.fixture
def carried(checkout: Path, tmp_path: Path) -> Path:
    """A cache of one program and one wheel, made of the checkout."""
    cache = tmp_path / "cache"
    program = cache / "PROGRAM"
    program.mkdir(parents=True)
    (program / "kernel.cubin").write_bytes(b"code")
    paths = {"kernel.cubin": str(program / "kernel.cubin")}
    (program / "__grp__kernel.json").write_text(json.dumps({"child_paths": paths}))
    wheel = tmp_path / WHEEL
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("carried_module.py", "ANSWER = 42\n")
    about = {"commit": "abc1234", "sources": digest(checkout)}
    gpu_programs.write_cache(tmp_path / "carried", gpu_programs.pack(cache, ["PROGRAM"]), about, [wheel])
    shutil.rmtree(cache)
    return tmp_path / "carried"


def change(folder: Path, **values: Any) -> None:
    path = folder / MANIFEST
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def test_unpacked(carried: Path, checkout: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PYTHONPATH", "/elsewhere")
    monkeypatch.delenv("FASTP2P_COMMIT", raising=False)
    environment = unpack(carried, tmp_path / "there", checkout)
    assert environment["FASTP2P_COMMIT"] == json.loads((carried / MANIFEST).read_text())["commit"]
    there = Path(environment["TRITON_CACHE_DIR"]) / "PROGRAM"
    assert (there / "kernel.cubin").read_bytes() == b"code"
    group = json.loads((there / "__grp__kernel.json").read_text())
    assert group == {"child_paths": {"kernel.cubin": str(there / "kernel.cubin")}}
    _, *benchmarks, elsewhere = environment["PYTHONPATH"].split(os.pathsep)
    assert (benchmarks, elsewhere) == ([f"{checkout}/benchmarks", f"{checkout}/benchmarks/ops"], "/elsewhere")
    command = [sys.executable, "-c", "import carried_module; print(carried_module.ANSWER)"]
    result = subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True, check=True)
    assert result.stdout == "42\n"
    # A script of the benchmarks, which imports its neighbours, runs in that environment too
    environment["PYTHONPATH"] = environment["PYTHONPATH"].replace(str(checkout), str(ROOT))
    command = [sys.executable, str(ROOT / "benchmarks" / "gpu_cache.py"), "--help"]
    subprocess.run(command, env={**os.environ, **environment}, capture_output=True, check=True)


@pytest.mark.parametrize("name", ["kernels/adam.py", "csrc/cuda/adam.cu", "fastp2p/config.py"])
def test_other_sources_are_refused(name: str, carried: Path, checkout: Path, tmp_path: Path):
    before = digest(checkout)
    with (checkout / name).open("a") as file:
        file.write("\n")
    after = digest(checkout)
    with pytest.raises(Stale) as caught:
        unpack(carried, tmp_path / "there", checkout)
    assert str(caught.value) == (
        f"{carried}: made at commit abc1234 for sources {before}, here {after}: run make gpu-cache again"
    )
    assert not (tmp_path / "there").exists()


def test_a_file_that_is_new_or_has_another_name_changes_the_sources(checkout: Path):
    found = {digest(checkout)}
    (checkout / "kernels" / "new.py").write_text("")
    found.add(digest(checkout))
    (checkout / "kernels" / "new.py").rename(checkout / "kernels" / "newer.py")
    found.add(digest(checkout))
    assert len(found) == 3
    (checkout / "kernels" / "__pycache__").mkdir()
    (checkout / "kernels" / "__pycache__" / "new.pyc").write_bytes(b"")
    assert digest(checkout) in found


def test_another_triton_is_refused(carried: Path, checkout: Path, tmp_path: Path):
    change(carried, triton="2.0.0")
    here = importlib.metadata.version("triton")
    with pytest.raises(Stale, match=rf"made at commit abc1234 for triton 2\.0\.0, here {here}: run make gpu-cache"):
        unpack(carried, tmp_path / "there", checkout)


def test_what_is_not_whole_is_refused(carried: Path, checkout: Path, tmp_path: Path):
    (archive,) = carried.glob("triton-*.tar.xz")
    content = archive.read_bytes()
    archive.write_bytes(content[:-1])
    with pytest.raises(Stale, match=rf"is not the file of {len(content) - 1} bytes that the manifest names"):
        unpack(carried, tmp_path / "there", checkout)
    archive.unlink()
    with pytest.raises(Stale, match="carry it here again"):
        unpack(carried, tmp_path / "there", checkout)
    change(carried, format=0)
    with pytest.raises(Stale, match="got format 0, expected 1: run make gpu-cache again"):
        unpack(carried, tmp_path / "there", checkout)
    (carried / MANIFEST).write_text("{")
    with pytest.raises(Stale, match="is damaged"):
        unpack(carried, tmp_path / "there", checkout)
    (carried / MANIFEST).unlink()
    with pytest.raises(Stale, match=r"there is none: run make gpu-cache where there is a network, and carry"):
        unpack(carried, tmp_path / "there", checkout)
    assert not (tmp_path / "there").exists()


def test_the_command_says_why_in_one_line(carried: Path, tmp_path: Path):
    """The cache belongs to another checkout."""
    command = [sys.executable, gpu_cache.__file__, "unpack", tmp_path / "there", "--folder", carried]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr.count("\n") == 1
    assert "run make gpu-cache again" in result.stderr


def test_wrong_arguments_are_told(carried: Path, checkout: Path, tmp_path: Path):
    command = [sys.executable, gpu_cache.__file__, "make", "--only", "nothing"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert "invalid choice: 'nothing'" in result.stderr
    change(carried, sources=digest(gpu_cache.ROOT))
    (tmp_path / "file").touch()
    command = [sys.executable, gpu_cache.__file__, "unpack", tmp_path / "file", "--folder", carried]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert result.stderr.startswith(f"{tmp_path / 'file'}: cannot be written to: ")
    assert result.stderr.endswith("; choose another folder\n")


def test_a_cache_replaces_the_one_before_at_once(carried: Path, monkeypatch: pytest.MonkeyPatch):
    """Its manifest comes last: until then the old one names files that are there."""
    before = {path.name: path.read_bytes() for path in carried.iterdir()}
    write = gpu_programs.write_atomically

    def fail_at_the_manifest(path: Path, content: bytes) -> None:
        if path.name == MANIFEST:
            raise KeyboardInterrupt
        write(path, content)

    monkeypatch.setattr(gpu_programs, "write_atomically", fail_at_the_manifest)
    with pytest.raises(KeyboardInterrupt):
        gpu_programs.write_cache(carried, b"new", {}, [])
    assert {name: (carried / name).read_bytes() for name in before} == before
    monkeypatch.setattr(gpu_programs, "write_atomically", write)
    gpu_programs.write_cache(carried, b"new", {}, [])
    assert len(list(carried.iterdir())) == 2


def test_an_archive_holds_nothing_of_this_machine(carried: Path, tmp_path: Path):
    (archive,) = carried.glob("triton-*.tar.xz")
    with tarfile.open(fileobj=io.BytesIO(archive.read_bytes())) as tar:
        members = tar.getmembers()
        texts = [tar.extractfile(member).read() for member in members]  # type: ignore[union-attr]
    assert {(member.mtime, member.uid, member.uname) for member in members} == {(0, 0, "")}
    assert not any(str(tmp_path).encode() in text for text in texts)
