import subprocess
import sys
import tracemalloc
import zipfile
from pathlib import Path

import pytest

from fastp2p.data.sources.archive import open_archive, read_bytes
from fastp2p.errors import InputError

METHODS = [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA]


def member(path: Path, name: str = "x.png") -> zipfile.Path:
    return open_archive(path) / name


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("size", [0, 1, 5000, 100_000])
def test_members_are_read_whole(tmp_path: Path, method: int, size: int):
    content = bytes(i * i % 251 for i in range(size))
    with zipfile.ZipFile(tmp_path / "x.zip", "w", method) as archive:
        archive.writestr("x.png", content)
    assert read_bytes(member(tmp_path / "x.zip")) == content


def patched(path: Path, offset: int, value: int) -> None:
    """Put a number of 4 bytes into the one entry of the archive's directory."""
    content = bytearray(path.read_bytes())
    at = content.rindex(b"PK\x01\x02") + offset
    content[at : at + 4] = value.to_bytes(4, "little")
    path.write_bytes(content)


def test_a_bomb_is_refused_before_it_is_unpacked(tmp_path: Path):
    with zipfile.ZipFile(tmp_path / "x.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x.png", b"short")
    patched(tmp_path / "x.zip", 24, 2**32 - 2)  # the size that it claims
    with pytest.raises(InputError, match=r"is too large: 4\.0 GiB, expected at most 1"):
        read_bytes(member(tmp_path / "x.zip"))


@pytest.mark.parametrize(
    "method", [zipfile.ZIP_DEFLATED, *(pytest.param(method, marks=pytest.mark.slow) for method in METHODS[2:])]
)
def test_a_bomb_that_claims_to_be_small_is_not_unpacked(tmp_path: Path, method: int):
    """It claims to be 10 bytes, and unpacks to 512 MiB; a block of bzip2 alone makes 46 MB."""
    with zipfile.ZipFile(tmp_path / "x.zip", "w", method) as archive, archive.open("x.png", "w") as stream:
        for _ in range(512 if method != zipfile.ZIP_DEFLATED else 32):
            stream.write(bytes(2**20))
    patched(tmp_path / "x.zip", 24, 10)
    bomb = member(tmp_path / "x.zip")
    tracemalloc.start()
    try:
        with pytest.raises(InputError, match=r"cannot be read from its \.zip: Bad CRC-32"):
            read_bytes(bomb)
        assert tracemalloc.get_traced_memory()[1] < (2**28 if method != zipfile.ZIP_DEFLATED else 2**20)
    finally:
        tracemalloc.stop()


def test_an_encrypted_member_is_told(tmp_path: Path):
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        archive.writestr("x.png", b"secret")
    content = bytearray((tmp_path / "x.zip").read_bytes())
    for magic, offset in ((b"PK\x01\x02", 8), (b"PK\x03\x04", 6)):
        content[content.index(magic) + offset] |= 1
    (tmp_path / "x.zip").write_bytes(content)
    with pytest.raises(InputError, match=r"cannot be read from its \.zip: .*password"):
        read_bytes(member(tmp_path / "x.zip"))


def test_a_python_without_lzma_reads_the_rest():
    code = "import sys; sys.modules['lzma'] = None; import fastp2p.data.sources.archive"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
