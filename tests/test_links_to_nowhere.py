"""A link to a disk that is not mounted is no missing file: nothing begins anew for it or replaces it."""

from pathlib import Path

import pytest
import torch

from fastp2p.commands import profile
from fastp2p.commands.convert import convert
from fastp2p.errors import InputError
from fastp2p.files import is_there
from fastp2p.models.checkpoint import save_generator
from fastp2p.models.pix2pix.generator import UnetGeneratorSpec
from fastp2p.models.pix2pix.model import MODEL as PIX2PIX
from fastp2p.models.pix2pix.networks import UnetGenerator
from fastp2p.models.pix2pix.options import Pix2PixConfig
from fastp2p.ops import kernel_choices
from fastp2p.train.loop import load_saved
from fastp2p.train.recorder import Recorder
from fastp2p.train.run_folder import new_folder, read_config
from fastp2p.tuner import store

PLACE = kernel_choices.place_of(torch.device("cpu"))
GONE = "is a link to /not/mounted, which is not there"


def linked(folder: Path, name: str) -> Path:
    """A link to nowhere."""
    (folder / name).symlink_to("/not/mounted")
    return folder / name


def test_is_there(tmp_path: Path):
    (tmp_path / "file").touch()
    (tmp_path / "loop").symlink_to("loop")
    assert [is_there(path) for path in (tmp_path / "file", tmp_path, linked(tmp_path, "link"), tmp_path / "loop")] == [
        True
    ] * 4
    assert not is_there(tmp_path / "nothing")
    assert not is_there(tmp_path / "file" / "nothing")
    assert is_there(tmp_path / ("x" * 300))  # reading it says that the name is too long


def test_a_run_s_kernels(tmp_path: Path):
    """They were chosen anew, so that the run's bits were no longer those of an unbroken one."""
    with pytest.raises(InputError, match=rf"kernels\.json: cannot be read: {GONE}; delete it to choose kernels anew"):
        store._of_the_run(linked(tmp_path, "kernels.json"), PLACE, print)


def test_a_run_s_statistics(tmp_path: Path):
    """A new file took the link's place."""
    path = linked(tmp_path, "stats.jsonl")
    with pytest.raises(InputError, match=rf"stats\.jsonl: {GONE}; move it away to go on without its lines"):
        Recorder(tmp_path, 5, PIX2PIX, Pix2PixConfig().resolve("cpu", "bf16"), print)
    assert path.is_symlink()


@pytest.mark.parametrize("name", ["checkpoint.pt", "netG.safetensors"])
def test_a_run_s_checkpoint(tmp_path: Path, name: str):
    """The run began again at step 0."""
    linked(tmp_path, name)
    with pytest.raises(InputError, match=rf"checkpoint\.pt: {GONE}|checkpoint\.pt is missing, but the run had one"):
        load_saved(tmp_path, print)


def test_a_run_s_configuration(tmp_path: Path):
    linked(tmp_path, "config.json")
    with pytest.raises(InputError, match=rf"config\.json: {GONE}"):
        read_config(tmp_path)
    with (
        pytest.raises(InputError, match=r"--resume .* continues the run in it"),
        new_folder(Pix2PixConfig(out=tmp_path)),
    ):
        pass


def test_the_choices_kept_on_this_machine(own_cache: None):
    path = kernel_choices.cache_path(PLACE)
    assert path is not None
    path.parent.mkdir(parents=True)
    linked(path.parent, path.name)
    with pytest.warns(UserWarning, match=rf"cannot be used \(.*{GONE}\); kernels go by rule until they are tuned anew"):
        assert kernel_choices.read_cache(PLACE) == {}


def test_what_convert_and_profile_would_write(tmp_path: Path):
    """The link was replaced, as if nothing had been there."""
    save_generator(
        tmp_path / "g.safetensors", UnetGenerator(levels=4, ngf=4).state_dict(), UnetGeneratorSpec(levels=4, ngf=4)
    )
    target, trace = linked(tmp_path, "g.pth"), linked(tmp_path, "trace.json")
    with pytest.raises(InputError, match="exists; choose another name"):
        convert(tmp_path / "g.safetensors", target)
    with pytest.raises(InputError, match="exists; choose another --trace"):
        profile._check_trace(trace, overwrite=False)
    profile._check_trace(trace, overwrite=True)
