"""Files that were damaged or edited give a sentence or the right result, never a traceback or another result."""

import copy
import json
import os
import random
import socket
import struct
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from helpers.runs import assert_equal, config

from fastp2p.commands.convert import convert
from fastp2p.errors import InputError
from fastp2p.models.checkpoint import CHECKSUM, load_checkpoint, load_generator, save_generator
from fastp2p.models.pix2pix.generator import UnetGeneratorSpec
from fastp2p.models.pix2pix.networks import UnetGenerator
from fastp2p.models.pix2pix.options import Pix2PixConfig
from fastp2p.ops import kernel_choices
from fastp2p.ops.kernel_choices import Measured, Problem
from fastp2p.train.loop import train
from fastp2p.train.run_folder import read_config
from fastp2p.train.state import TrainState
from fastp2p.tuner.store import _of_the_run

CPU = torch.device("cpu")
TIMES = 60  # random damages of each kind of file
POISON = [None, "8", 5.0, [], {}, -1, 0, 10**30, True, float("inf"), float("nan"), "x" * 1000, [[]], {"a": 1}]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A short run's folder, with its generator as upstream's .pth beside it; nobody writes into it."""
    root = tmp_path_factory.mktemp("damage")
    folder = root / "run"
    train(config("builtin:emoji", folder, "--max-steps", "2", "--max-minutes", "5"))
    convert(folder / "netG.safetensors", folder / "latest_net_G.pth")
    return folder


def damages(content: bytes) -> Iterator[bytes]:
    """Bits flipped, bytes overwritten, cut off, put in, appended."""
    draw = random.Random(0)
    for number in range(TIMES):
        place, damaged = draw.randrange(len(content)), bytearray(content)
        match number % 5:
            case 0:
                damaged[place] ^= 1 << draw.randrange(8)
            case 1:
                damaged[place : place + 40] = draw.randbytes(len(damaged[place : place + 40]))
            case 2:
                del damaged[place:]
            case 3:
                damaged[place:place] = draw.randbytes(7)
            case 4:
                damaged += draw.randbytes(draw.randrange(1, 2000))
        yield bytes(damaged)


def edits(value: Any) -> Iterator[Any]:
    """The nested dicts and lists with one leaf, or one branch, replaced by what does not belong there."""
    draw = random.Random(1)
    for _ in range(TIMES):
        edited = copy.deepcopy(value)
        place: Any = edited
        while True:
            key = draw.choice(list(place)) if isinstance(place, dict) else draw.randrange(len(place))
            inner = place[key]
            if not (isinstance(inner, dict | list) and inner) or draw.random() < 0.2:
                break
            place = inner
        if draw.random() < 0.2:
            del place[key]
        else:
            place[key] = draw.choice(POISON)
        yield edited


def told_or(act: Callable[[], object]) -> bool:
    """Whether `act` raised InputError, with a sentence; what else it raises is an error, and it may check a result."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            act()
        except InputError as error:
            told = str(error)
        else:
            return False
    assert 20 < len(told) < 1500
    return True


def test_models(run: Path, tmp_path: Path):
    path = tmp_path / "netG.safetensors"
    weights = load_generator(run / "netG.safetensors")[0].state_dict()

    def load() -> None:
        netG, spec = load_generator(path, say=lambda line: None)
        assert_equal(dict(netG.state_dict()), dict(weights))
        assert spec == load_generator(run / "netG.safetensors")[1]

    told = 0
    for content in damages((run / "netG.safetensors").read_bytes()):
        path.write_bytes(content)
        told += told_or(load)
    assert told == TIMES


def test_edited_metadata(run: Path, tmp_path: Path):
    """With the checksum, and without, as in files of before."""
    with safetensors.safe_open(run / "netG.safetensors", "pt") as file:
        metadata = file.metadata()
        weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    path = tmp_path / "netG.safetensors"
    described = json.loads(metadata["fastp2p"])
    for edited in edits(described):
        text = {"fastp2p": json.dumps(edited)}
        safetensors.torch.save_file(weights, path, metadata | text)
        assert told_or(lambda: load_generator(path)), edited
        safetensors.torch.save_file(weights, path, text)
        if not told_or(lambda: load_generator(path, say=lambda line: None)):
            same_shapes = ("data", "step", "crop_size", "norm_stats", "direction", "dropout", "output_nc", "input_nc")
            assert all(edited.get(name, value) == value for name, value in described.items() if name not in same_shapes)


def test_metadata_that_claims_a_large_network_takes_no_memory(tmp_path: Path):
    path = tmp_path / "netG.safetensors"
    small = UnetGenerator(levels=4, ngf=4).state_dict()
    for claim in ({"ngf": 4096}, {"levels": 12, "ngf": 400}, {"output_nc": 4096}):
        save_generator(path, small, UnetGeneratorSpec(**{"levels": 4, "ngf": 4} | claim))
        with pytest.raises(InputError, match="do not fit the network"):
            within_memory(lambda: load_generator(path))
    content = {
        "model.model.0.weight": torch.ones(1).expand(4096, 3, 4, 4),
        "model.model.3.weight": torch.ones(8, 3, 4, 4),
    }
    torch.save(content, tmp_path / "a.pth")
    with pytest.raises(InputError, match="without a number for each place"):
        within_memory(lambda: convert(tmp_path / "a.pth", tmp_path / "b.safetensors"))


def within_memory(act: Callable[[], object]) -> object:
    """Run it in a mode that fails where a tensor of more than 16 MiB is made."""

    class Limited(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = func(*args, **kwargs or {})
            if isinstance(result, torch.Tensor) and result.device.type != "meta":
                assert result.untyped_storage().nbytes() < 2**24, func
            return result

    with Limited():
        return act()


def test_upstream_files(run: Path, tmp_path: Path):
    source, target = tmp_path / "latest_net_G.pth", tmp_path / "netG.safetensors"
    weights = load_generator(run / "netG.safetensors")[0].state_dict()

    def read() -> None:
        convert(source, target)
        read = load_generator(target)[0].state_dict()
        for name, value in weights.items():  # without num_batches_tracked, which old files lack and nobody reads
            assert torch.equal(read[name], value) or name.endswith("num_batches_tracked")

    told = 0
    for content in damages((run / "latest_net_G.pth").read_bytes()):
        source.write_bytes(content)
        target.unlink(missing_ok=True)
        told += told_or(read)
    assert told > TIMES // 2
    for edited in edits(torch.load(run / "latest_net_G.pth", weights_only=True)):
        torch.save(edited, source)
        target.unlink(missing_ok=True)
        told += told_or(read)
    assert told > TIMES


def test_checkpoints(run: Path, tmp_path: Path):
    """A run takes over what was written, or nothing."""
    path = tmp_path / "checkpoint.pt"
    original = load_checkpoint(run / "checkpoint.pt")
    del original["format"]
    resolved = read_config(run).resolve("cpu", "fp32")

    def restore() -> dict[str, Any]:
        state = TrainState.new(resolved, CPU, original["fingerprint"])
        state.restore(load_checkpoint(path, say=lambda line: None), path)
        return state.as_dict()

    told = 0
    for content in damages((run / "checkpoint.pt").read_bytes()):
        path.write_bytes(content)
        told += told_or(lambda: assert_equal(restore(), original))
    assert told > TIMES // 2
    whole = torch.load(run / "checkpoint.pt", weights_only=True)
    for edited in edits(whole):
        torch.save(edited, path)
        if not told_or(restore):
            assert_equal(restore(), original)
        edited.pop(CHECKSUM, None)  # as of a version that wrote none
        torch.save(edited, path)
        if not told_or(restore):
            for name in ("step", "netG", "netD", "loss_sums", "rng"):
                assert_equal(edited[name], original[name])


@pytest.mark.parametrize(
    ("place", "value", "expected"),
    [
        (("netG", "model.model.0.weight"), torch.nan, "netG/model.model.0.weight holds NaN or infinity"),
        (("netD", "net.0.weight"), torch.inf, "netD/net.0.weight holds NaN or infinity"),
        (("netG", "model.model.1.model.2.running_var"), -1.0, "running_var holds -1, expected variances of 0 or more"),
        (("optimizer_D", "state", 0, "exp_avg_sq"), -1.0, "state/0/exp_avg_sq holds a negative mean of squares"),
        (("step",), torch.ones(2), r"step is tensor.*, expected int"),
    ],
    ids=lambda case: "/".join(map(str, case)) if isinstance(case, tuple) else "",
)
def test_numbers_that_no_run_comes_to(run: Path, tmp_path: Path, place: tuple[Any, ...], value: Any, expected: str):
    """A checkpoint of an earlier version, without a checksum, trained until its losses were NaN."""
    saved = torch.load(run / "checkpoint.pt", weights_only=True)
    del saved[CHECKSUM]
    holder = saved
    for key in place[:-1]:
        holder = holder[key]
    if isinstance(holder[place[-1]], torch.Tensor):
        holder[place[-1]].fill_(value)
    else:
        holder[place[-1]] = value
    torch.save(saved, tmp_path / "checkpoint.pt")
    state = TrainState.new(read_config(run).resolve("cpu", "fp32"), CPU, saved["fingerprint"])
    path = tmp_path / "checkpoint.pt"
    with pytest.raises(InputError, match=f"is damaged, or was changed .*{expected}; take another copy"):
        state.restore(load_checkpoint(path, say=lambda line: None), path)


def test_configurations(run: Path, tmp_path: Path):
    """A config.json has no checksum: what is read is what it says, each number and text of it, or it is refused."""
    path = tmp_path / "config.json"
    content = (run / "config.json").read_bytes()
    defaults = Pix2PixConfig().as_dict()

    def read() -> None:
        found = read_config(tmp_path)
        written = json.loads(path.read_bytes())
        assert exact(found.as_dict()) == exact(defaults | written | {"out": str(tmp_path)})
        TrainState.new(found.resolve("cpu", "fp32"), CPU, "")

    told = 0
    for damaged in damages(content):
        path.write_bytes(damaged)
        told += told_or(read)
    assert told > TIMES * 3 // 4  # what is left changed a letter of a text or a digit
    for edited in edits(json.loads(content)):
        path.write_text(json.dumps(edited))
        told += told_or(read)
    assert told > TIMES * 5 // 4
    for damaged in (b"[" * 100_000, b"\xff", b"", b"null", b"[]", b"1", content[:-3], content + b"}"):
        path.write_bytes(damaged)
        assert told_or(read), damaged[:20]


def exact(fields: dict[str, Any]) -> dict[str, tuple[type, Any]]:
    """With types, since True == 1 == 1.0."""
    return {name: (type(value), value) for name, value in fields.items()}


def test_kernels(run: Path, tmp_path: Path, own_cache: None):
    """A file of choices has no checksum, either: what is taken is what it says, or nothing, and that is told."""
    place = kernel_choices.place_of(CPU)
    cache = kernel_choices.cache_path(place)
    assert cache is not None
    cache.parent.mkdir(parents=True)
    content = (run / "kernels.json").read_bytes()

    def says(table: kernel_choices.Table | None, written: bytes) -> None:
        loaded = json.loads(written)
        assert (type(loaded["format"]), loaded["format"], loaded["environment"]) == (int, 1, place.environment)
        assert table == {Problem.parse(key): Measured(**row) for key, row in loaded["choices"].items()}
        assert all(measured.choice in kernel_choices.CPU_CHOICES for measured in table.values())
        times = [ms for measured in table.values() for ms in measured.ms.values()]
        assert all(type(ms) in (int, float) and ms >= 0 for ms in times)

    def is_told(written: bytes) -> bool:
        """Whether a file of these bytes is refused, in the cache's place and in a run's; else its choices are taken."""
        cache.write_bytes(written)
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            kernel_choices.forget()
            table = kernel_choices.table(place)
        (tmp_path / "kernels.json").write_bytes(written)
        said: list[str] = []
        taken: list[kernel_choices.Table | None] = []
        refused = told_or(lambda: taken.append(_of_the_run(tmp_path / "kernels.json", place, said.append)))
        if not warned:
            says(table, written)
            says(taken[0], written)
            return False
        assert table == {}
        assert all("kernels go by rule until they are tuned anew" in str(warning.message) for warning in warned)
        assert refused or (taken == [None] and "kernels: chosen anew" in said[0])  # as of another machine
        return True

    told = sum(map(is_told, damages(content))) + sum(
        is_told(json.dumps(e).encode()) for e in edits(json.loads(content))
    )
    assert told > TIMES
    assert all(map(is_told, (b"[" * 100_000, b"", b"null", b"[]", content[:-3], content + b"}")))


@pytest.mark.parametrize("kind", ["pipe", "device", "folder", "socket", "link to nowhere", "unreadable"])
def test_what_is_no_file_is_refused_at_once(run: Path, tmp_path: Path, kind: str):
    """Opening a pipe waits for its writer, and /dev/zero never ends."""
    path = tmp_path / "x"
    match kind:
        case "pipe":
            os.mkfifo(path)
        case "device":
            path.symlink_to("/dev/zero")
        case "folder":
            path.mkdir()
        case "socket":
            socket.socket(socket.AF_UNIX).bind(str(path))
        case "link to nowhere":
            path.symlink_to("/not/mounted")
        case "unreadable":
            path.touch(mode=0)
            if os.access(path, os.R_OK):
                pytest.skip("root reads everything")
    for name, read in {
        "netG.safetensors": load_generator,
        "checkpoint.pt": load_checkpoint,
        "latest_net_G.pth": lambda path: convert(path, tmp_path / "g.safetensors"),
        "config.json": lambda path: read_config(path.parent),
    }.items():
        path.rename(path := tmp_path / name)
        expected = r"; expected |not/mounted, which is not there|permission denied"
        with pytest.raises(InputError, match=f"{name}: .*({expected})"):
            read(path)


def test_files_without_a_checksum_load_and_are_told(run: Path, tmp_path: Path):
    said: list[str] = []
    state = torch.load(run / "checkpoint.pt", weights_only=True)
    del state[CHECKSUM]
    torch.save(state, tmp_path / "checkpoint.pt")
    load_checkpoint(tmp_path / "checkpoint.pt", said.append)
    with safetensors.safe_open(run / "netG.safetensors", "pt") as file:
        weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        safetensors.torch.save_file(weights, tmp_path / "g.safetensors", {"fastp2p": file.metadata()["fastp2p"]})
    load_generator(tmp_path / "g.safetensors", said.append)
    assert [line.partition("has no checksum")[1] for line in said] == ["has no checksum"] * 2


def test_equal_generators_are_equal_files(run: Path, tmp_path: Path):
    """The library orders the metadata otherwise in each process."""
    netG, spec = load_generator(run / "netG.safetensors")
    save_generator(tmp_path / "g.safetensors", netG.state_dict(), spec)
    content = (tmp_path / "g.safetensors").read_bytes()
    assert content == (run / "netG.safetensors").read_bytes()
    header = json.loads(content[8 : 8 + struct.unpack("<Q", content[:8])[0]])
    assert list(header["__metadata__"]) == ["format", "fastp2p", CHECKSUM]


def test_a_checkpoint_in_the_generator_s_place(run: Path):
    with pytest.raises(InputError, match=r"is a run's checkpoint; its generator is .*run/netG\.safetensors"):
        load_generator(run / "checkpoint.pt")
