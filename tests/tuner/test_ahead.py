"""Compiling ahead: what is recorded on meta tensors is what launches take, and nothing is left to compile for them."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from gpu_cache import MANIFEST, ROOT, digest, unpack
from helpers.nets import Trained

from fastp2p.models.pix2pix.networks import PixelDiscriminator, UnetGenerator
from fastp2p.models.pix2pix.step import FusedStep
from fastp2p.ops import kernel_choices, library
from fastp2p.ops.kernel_choices import Measured
from fastp2p.tuner import ahead as engine
from fastp2p.tuner import store
from fastp2p.tuner.operations import Noise, operations

ahead = pytest.importorskip("fastp2p.kernels.ahead", reason="needs triton")
gpu_programs = pytest.importorskip("gpu_programs", reason="needs triton")

SIZE, IMAGES = 8, 2


def small_step() -> FusedStep:
    netG, netD = UnetGenerator(levels=2, ngf=8, dropout="none"), PixelDiscriminator(6, ndf=8)
    return Trained(netG, netD).fused((SIZE, SIZE), torch.bfloat16)


def launch_on_cpu(step: FusedStep) -> None:
    """As on a GPU, but for the device of the tensors."""
    real_A, real_B = torch.zeros(2, IMAGES, 3, SIZE, SIZE).contiguous(memory_format=torch.channels_last_3d)
    with engine._Launches(lambda operator: True, engine.by_rule):
        step.launch({"A": real_A, "B": real_B})


def launch_on_meta(step: FusedStep) -> None:
    engine.MetaStep(step, lambda operator: True).launch(IMAGES)


def constants_of(programs: dict[Any, None], kernel: str) -> set[str]:
    return {str(json.loads(p.specialisation)["constant_vals"]) for p in programs if p.kernel == kernel}


class Made(NamedTuple):
    programs: dict[Any, None]
    cache: Path
    said: list[str]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """A step's programs, compiled by two processes."""
    cache, said = tmp_path_factory.mktemp("cache"), []
    stub = gpu_programs.stub_of_libcuda(tmp_path_factory.mktemp("stub"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_LIBCUDA_PATH", str(stub))  # launchers of Triton 3.6 are linked with the driver's library
        patch.setenv("TRITON_CACHE_DIR", str(cache))
        patch.setenv("TRITON_STORE_BINARY_ONLY", "1")
        patch.setattr(os, "sched_getaffinity", lambda process: {0, 1})
        with ahead.recording(ahead.H100) as programs:
            launch_on_meta(small_step())
        engine.compile_missing(programs, ahead.H100, said.append)
    return Made(programs, cache, said)


COMPILE_FOR_LAUNCH = """
import sys
import triton
sys.path += {paths}
from test_ahead import ahead, launch_on_cpu, small_step
from fastp2p.kernels import norm_act  # its kernels first: the cache must not know programs by their order
run, hits = triton.JITFunction.run, []
triton.JITFunction.run = lambda self, *args, grid, warmup, **options: run(
    self, *args, grid=grid, warmup=True, **options
)
triton.knobs.compilation.listener = lambda *, cache_hit, **_: hits.append(cache_hit)
with ahead.pretending(ahead.H100):
    launch_on_cpu(small_step())
print(len(hits), sum(hits))
"""


def compiled_for_launch(cache: Path) -> tuple[int, int]:
    """How many programs a process of its own takes for a step, and how many of them a cache holds."""
    paths = [str(ROOT / folder) for folder in ("tests", "tests/tuner", "benchmarks")]
    environment = {**os.environ, "TRITON_CACHE_DIR": str(cache)}
    command = [sys.executable, "-c", COMPILE_FOR_LAUNCH.format(paths=paths)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    n, hits = result.stdout.split()
    return int(n), int(hits)


def test_the_processes_leave_nothing_to_compile(made: Made, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(made.cache))
    n = len(made.programs)
    assert n > 20
    (line,) = made.said
    assert line.startswith(f"kernels: {n} programs compiled by 2 processes in ")
    assert line.endswith(" s")
    assert ahead.missing(made.programs, ahead.H100) == []
    monkeypatch.setattr(ahead, "compile_programs", lambda *args, **options: pytest.fail("compiles again"))
    engine.compile_missing(made.programs, ahead.H100, pytest.fail)


def test_a_launch_elsewhere_compiles_nothing(made: Made, tmp_path: Path):
    """In another process and order, from another path, on tensors that have addresses."""
    folder = tmp_path / "carried"
    folder.mkdir()
    content = gpu_programs.pack(made.cache, sorted(path.name for path in made.cache.iterdir()))
    gpu_programs.write_cache(folder, content, {"commit": "abc", "sources": digest(ROOT)}, [])
    assert json.loads((folder / MANIFEST).read_text())["commit"] == "abc"
    environment = unpack(folder, tmp_path / "there")
    n = len(made.programs)
    assert compiled_for_launch(Path(environment["TRITON_CACHE_DIR"])) == (n, n)
    assert str(made.cache) not in "".join(path.read_text() for path in (tmp_path / "there").rglob("__grp__*"))


def test_meta_tensors_take_the_programs_of_others():
    recorded = []
    for launch in (launch_on_meta, launch_on_cpu):
        with ahead.recording(ahead.H100) as programs:
            launch(small_step())
        recorded.append(set(programs))
    assert recorded[0] == recorded[1]
    assert recorded[0]


def test_recording_ends():
    def state() -> tuple[Any, ...]:
        return (
            ahead.driver._active,
            ahead.tile_rule.PROCESSORS_WHEN_INTERPRETED,
            ahead.triton.knobs.runtime.jit_cache_hook,
        )

    def fail() -> None:
        with ahead.recording(ahead.H100):
            assert state() != before
            raise ZeroDivisionError

    before = state()
    with pytest.raises(ZeroDivisionError):
        fail()
    assert state() == before


def test_few_programs_or_one_core_begin_no_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(ahead, "compile_programs", lambda *args, **options: pytest.fail("begins a process"))
    with ahead.recording(ahead.H100) as programs:
        launch_on_meta(small_step())
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0})
    engine.compile_missing(programs, ahead.H100, pytest.fail)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0, 1, 2, 3})
    engine.compile_missing(list(programs)[: 2 * engine.FEWEST - 1], ahead.H100, pytest.fail)


def test_what_does_not_compile_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Nothing raises: a program that cannot be compiled, and one that takes the process with it."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    (tmp_path / "deadly.py").write_text("import os\nos._exit(3)\n")
    monkeypatch.syspath_prepend(tmp_path)
    programs = [ahead.Program("deadly", "any", ""), ahead.Program("fastp2p.kernels.adam", "_adam_kernel", "{}")]
    told: list[Any] = []
    results = ahead.compile_programs(programs, ahead.H100, processes=1, report=told.append)
    assert told == results
    errors = {result.program.module: result.error for result in results}
    assert errors["deadly"] == "the compiling process ended with code 3"
    assert errors["fastp2p.kernels.adam"].startswith("_adam_kernel: KeyError: 'name'")


@pytest.fixture
def on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> list[dict[Any, None]]:
    """What is compiled ahead where there is a GPU whose adam is the extension's."""
    found: list[dict[Any, None]] = []
    served = {"adam": "CUDA C++"}
    monkeypatch.setattr(library, "served_by", lambda name, device_type: served.get(name, "Triton"))
    monkeypatch.setattr(ahead.Target, "of", lambda device_index: ahead.H100)
    monkeypatch.setattr(engine, "compile_missing", lambda programs, target, say: found.append(programs))
    return found


def test_the_tuner_s_candidates(on_a_gpu: list[dict[Any, None]]):
    step = small_step()
    store.candidates_of(step, IMAGES, torch.device("cuda", 0), print)(operations(step, IMAGES))
    with ahead.recording(ahead.H100) as by_rule:
        launch_on_meta(step)
    (programs,) = on_a_gpu
    for kernel in ("_conv_kernel", "_conv_transpose_kernel"):
        assert constants_of(programs, kernel) > constants_of(by_rule, kernel)
    kernels = {program.kernel for program in programs}
    assert "_augment_kernel" not in kernels
    assert "_adam_kernel" in kernels  # conv_wgrad_adam by ATen takes Triton's
    assert "_adam_kernel" in {program.kernel for program in by_rule}


def test_the_step_as_it_is_chosen(on_a_gpu: list[dict[Any, None]], monkeypatch: pytest.MonkeyPatch):
    step = small_step()
    convs = [o.problem for o in operations(step, IMAGES) if o.operator == "conv"]
    table = {problem: Measured("aten") for problem in convs}
    monkeypatch.setattr(kernel_choices, "place_of", lambda device: None)
    monkeypatch.setattr(kernel_choices, "table", lambda place: table)
    step.rng = torch.empty(2, dtype=torch.int64, device="meta")
    monkeypatch.setattr(engine, "compile_ahead", lambda launch, device, say: record(launch))

    def record(launch: Any) -> None:
        with ahead.recording(ahead.H100) as programs:
            launch(lambda operator: operator != "adam")
        on_a_gpu.append(programs)

    store.compile_step(step, [IMAGES], 10, print)
    kernels = {program.kernel for program in on_a_gpu[0]}
    assert "_conv_kernel" not in kernels
    assert {"_conv_transpose_kernel", "_conv_wgrad_adam_kernel", "_augment_kernel"} <= kernels
    assert "_adam_kernel" not in kernels


def test_the_tuner_s_operands_are_aligned():
    """A kernel takes another program for an address that is no multiple of 16, as none in a step is."""
    noise = Noise(torch.device("cpu"))
    for n in (1, 3):
        for _ in range(3):
            images = noise.images(n, 7, 300, 301, dtype=torch.bfloat16)
            assert images.data_ptr() % 16 == 0
