import json
import os
import pickle
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import safetensors
import torch

from fastp2p.errors import InputError
from fastp2p.models.checkpoint import load_checkpoint, load_generator, save_checkpoint, save_generator
from fastp2p.models.generate import generate
from fastp2p.models.pix2pix.generator import UnetGeneratorSpec
from fastp2p.models.pix2pix.networks import UnetGenerator


def test_round_trip(tmp_path: Path):
    state = {"step": 3, "netG": {"w": torch.randn(2, 3)}, "rng": {"cpu": torch.get_rng_state(), "cuda": None}}
    save_checkpoint(tmp_path / "c.pt", state)
    loaded = load_checkpoint(tmp_path / "c.pt")
    assert loaded["step"] == 3
    assert torch.equal(loaded["netG"]["w"], state["netG"]["w"])
    assert loaded["rng"]["cuda"] is None


def test_nothing_is_unpickled_in_full(tmp_path: Path):
    class Evil:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "pwned"),))

    torch.save({"format": 1, "x": Evil()}, tmp_path / "c.pt")
    with pytest.raises(InputError, match="is damaged, or holds more than tensors; a pickle of other objects could run"):
        load_checkpoint(tmp_path / "c.pt")
    (tmp_path / "d.pt").write_bytes(pickle.dumps(Evil()))
    with pytest.raises(InputError):
        load_checkpoint(tmp_path / "d.pt")
    assert not (tmp_path / "pwned").exists()


@pytest.mark.parametrize("content", [b"", b"junk", None])
def test_damaged_checkpoint_is_told(tmp_path: Path, content: bytes | None):
    path = tmp_path / "c.pt"
    save_checkpoint(path, {"w": torch.randn(1000)})
    path.write_bytes(path.read_bytes()[:2000] if content is None else content)
    with pytest.raises(InputError, match=r"c\.pt: is damaged"):
        load_checkpoint(path)


def test_each_flipped_bit_is_told_or_changes_nothing(tmp_path: Path):
    """torch.load checks no checksum: with one bit flipped in its weights a run went on."""
    path = tmp_path / "c.pt"
    save_checkpoint(path, {"w": torch.randn(4096)})
    content, w = path.read_bytes(), load_checkpoint(path)["w"]
    told = 0
    for position in np.random.default_rng(0).integers(0, 8 * len(content), 80):
        damaged = bytearray(content)
        damaged[position // 8] ^= 1 << position % 8
        path.write_bytes(damaged)
        try:
            assert torch.equal(load_checkpoint(path)["w"], w)
        except InputError:
            told += 1
    assert told > 60  # nearly all of the file is weights


def test_a_checkpoint_has_checksums_whatever_the_program_has_set(tmp_path: Path):
    torch.serialization.set_crc32_options(False)
    try:
        save_checkpoint(tmp_path / "c.pt", {"w": torch.ones(9)})
        assert not torch.serialization.get_crc32_options()
    finally:
        torch.serialization.set_crc32_options(True)
    assert torch.equal(load_checkpoint(tmp_path / "c.pt")["w"], torch.ones(9))


def test_a_compressed_checkpoint_is_refused(tmp_path: Path):
    """It could unpack to more than there is memory."""
    save_checkpoint(tmp_path / "c.pt", {"w": torch.zeros(4096)})
    with zipfile.ZipFile(tmp_path / "c.pt") as stored, zipfile.ZipFile(tmp_path / "d.pt", "w") as packed:
        for name in stored.namelist():
            packed.writestr(name, stored.read(name), zipfile.ZIP_DEFLATED)
    with pytest.raises(InputError, match="is compressed, which"):
        load_checkpoint(tmp_path / "d.pt")


def test_missing_and_foreign_checkpoints_are_told(tmp_path: Path):
    with pytest.raises(InputError, match="no such file"):
        load_checkpoint(tmp_path / "c.pt")
    torch.save({"w": torch.zeros(1)}, tmp_path / "c.pt")
    with pytest.raises(InputError, match="is no checkpoint of this version"):
        load_checkpoint(tmp_path / "c.pt")


def test_write_cut_off_by_the_kernel_leaves_the_old_file(tmp_path: Path):
    """A file-size limit makes the kernel refuse the write half-way, as a full disk does."""
    code = f"""
import resource, torch
from pathlib import Path
from fastp2p.models.checkpoint import save_checkpoint
from fastp2p.errors import WriteError
path = Path({str(tmp_path / "c.pt")!r})
save_checkpoint(path, {{"w": torch.zeros(10)}})
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    save_checkpoint(path, {{"w": torch.zeros(100_000)}})
except WriteError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "c.pt cannot be written: File too large. What was saved before is intact" in done.stdout
    assert len(load_checkpoint(tmp_path / "c.pt")["w"]) == 10
    assert os.listdir(tmp_path) == ["c.pt"]


@pytest.mark.parametrize("norm", ["batch", "instance"])
def test_generator_describes_itself(tmp_path: Path, norm: str):
    spec = UnetGeneratorSpec(
        levels=4, ngf=6, input_nc=1, norm=norm, dropout="paper", direction="BtoA", crop_size=64, step=9
    )
    netG = spec.build()
    save_generator(tmp_path / "g.safetensors", netG.state_dict(), spec)
    loaded, read = load_generator(tmp_path / "g.safetensors")
    assert read == spec
    x = torch.randn(1, 1, 20, 20)
    assert torch.equal(generate(loaded, x), generate(netG, x))
    with safetensors.safe_open(tmp_path / "g.safetensors", "pt") as file:
        described = json.loads(file.metadata()["fastp2p"])
    assert (described["range"], described["direction"], described["crop_size"]) == ("[-1, 1]", "BtoA", 64)


def test_bad_generator_files_are_told(tmp_path: Path):
    path = tmp_path / "g.safetensors"
    with pytest.raises(InputError, match="no such file"):
        load_generator(path)
    path.write_bytes(b"junk")
    with pytest.raises(InputError, match=r"cannot be read as \.safetensors"):
        load_generator(path)
    with pytest.raises(InputError, match=r"is a folder; expected a file, of a run its netG\.safetensors"):
        load_generator(tmp_path)
    from safetensors.torch import save_file

    save_file({"w": torch.zeros(1)}, path)
    with pytest.raises(InputError, match="has no fastp2p metadata"):
        load_generator(path)
    for metadata in ("junk", "[1]", "{}", '{"version": 1, "range": "[-1, 1]", "colour": 3}'):
        save_file({"w": torch.zeros(1)}, path, {"fastp2p": metadata})
        with pytest.raises(InputError, match="metadata is damaged, or of another version"):
            load_generator(path)
    save_generator(path, UnetGenerator(levels=4, ngf=4).state_dict(), UnetGeneratorSpec(levels=3, ngf=4))
    with pytest.raises(InputError, match="do not fit"):
        load_generator(path)
    torch.save({}, tmp_path / "latest_net_G.pth")
    with pytest.raises(InputError, match="fastp2p convert"):
        load_generator(tmp_path / "latest_net_G.pth")
