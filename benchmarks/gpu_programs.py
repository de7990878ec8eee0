"""The programs that a GPU machine launches, compiled and packed: what `gpu_cache.py make` runs on its new wheel."""

import hashlib
import io
import json
import os
import re
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import triton
from gpu_cache import FORMAT, MANIFEST, MOST_BYTES, ROOT

from fastp2p.files import write_atomically
from fastp2p.kernels import ahead as compiler
from fastp2p.kernels.ahead import H100, Compiled, Program
from fastp2p.models.pix2pix.networks import PatchDiscriminator, UnetGenerator
from fastp2p.models.pix2pix.step import FusedStep
from fastp2p.tuner import ahead
from fastp2p.tuner.operations import operations

BATCHES = (1, 4, 16, 64)
TESTS = ("ops", "nn", "engine", "tuner/test_contest.py")  # what runs on a GPU, in tests/
TESTS_LIMIT_S = 600
SIZE = 256  # px
LOAD_SIZES = (286, 256)  # px, of the pairs that batches are cut out of
PRECISIONS = {  # and whether PyTorch's convolutions may round to TF32
    "bf16": (torch.bfloat16, True),
    "fp16": (torch.float16, True),
    "fp32": (torch.float32, False),
    "fp32 in TF32": (torch.float32, True),
}


def new_step(dtype: torch.dtype) -> FusedStep:
    """Make the step of unet_256 and the 70x70 PatchGAN."""
    with torch.device("meta"):
        nets = UnetGenerator(), PatchDiscriminator()
    optimizers = [torch.optim.Adam(net.parameters(), lr=2e-4, betas=(0.5, 0.999)) for net in nets]
    return FusedStep(*nets, *optimizers, size=(SIZE, SIZE), dtype=dtype)


def parts(work: Path, sources: str, wanted: list[str]) -> Iterator[tuple[str, dict[Program, None]]]:
    """Each part of the programs with its name.

    Args:
        work: keeps what the tests launch.
        sources: the digest of what is compiled.
        wanted: the first words of the parts' names, none for all.
    """
    for precision, (dtype, tf32) in PRECISIONS.items() if not wanted or "step" in wanted else ():
        torch.backends.cudnn.allow_tf32 = tf32
        step = ahead.MetaStep(new_step(dtype), serves=lambda name: True)
        for batch in BATCHES:
            with compiler.recording(H100) as programs:
                step.launch(batch)
                for size in LOAD_SIZES:
                    step.launch_augment(batch, size, size)
            yield f"step {precision} batch {batch}", programs
    for batch in BATCHES if not wanted or "tuner" in wanted else ():
        timed = new_step(torch.bfloat16)
        with compiler.recording(H100) as programs:
            ahead.launch_tuner(operations(timed, batch))
            ahead.MetaStep(timed, serves=lambda name: True).launch(batch, ahead.whatever_is_chosen)
        yield f"tuner bf16 batch {batch}", programs
    if not wanted or "tests" in wanted:
        yield from programs_of_tests(work / "tests", sources)


def programs_of_tests(work: Path, sources: str) -> Iterator[tuple[str, dict[Program, None]]]:
    """What each folder of tests launches, as recorded_tests tells; from the last time, where nothing has changed."""
    files = sorted([*(ROOT / "tests").rglob("*.py"), ROOT / "benchmarks" / "recorded_tests.py"])
    of = hashlib.sha256(b"".join(path.read_bytes() for path in files) + sources.encode()).hexdigest()[:16]
    work.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-O", "-m", "pytest", "--quiet", "--assert", "plain", "-p", "recorded_tests"]
    command += ["-p", "no:cacheprovider", "--device", "cuda", "-m", "not slow"]
    command += ["--ignore", "tests/ops/test_cpp_checks.py"]  # its calls are to fail before they launch
    running = {}
    for folder in TESTS:
        record, log = work / f"{Path(folder).stem}-{of}.jsonl", work / f"{Path(folder).stem}.log"
        if not record.exists():
            with log.open("w") as output:
                args = [*command, "--record", record, f"tests/{folder}"]
                running[folder] = subprocess.Popen(args, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT)
    for folder in TESTS:
        record = work / f"{Path(folder).stem}-{of}.jsonl"
        if folder in running:
            try:
                code = running[folder].wait(TESTS_LIMIT_S)
            except subprocess.TimeoutExpired:
                running[folder].kill()
                code = running[folder].wait()
            if not record.exists():
                print(
                    f"tests/{folder}: left out, pytest ended with code {code}: see {work / Path(folder).stem}.log",
                    flush=True,
                )
                continue
        programs = [Program(*json.loads(line)) for line in record.read_text().splitlines()]
        yield f"tests {folder}", dict.fromkeys(programs)


def compile_and_pack(folder: Path, work: Path, about: dict[str, Any], wanted: list[str]) -> None:
    """Compile into Triton's cache of this process, and write archive, wheels and manifest.

    Args:
        folder: what is to be carried.
        work: keeps what was compiled for the next time.
        about: what the manifest says of commit, sources and extension, and the paths of the wheels.
        wanted: as for `parts`.
    """
    began = time.monotonic()
    os.environ["TRITON_LIBCUDA_PATH"] = str(stub_of_libcuda(work / "stub"))
    programs: dict[Program, None] = {}
    counts = {}
    for name, found in parts(work, about["sources"], wanted):
        counts[name] = len(found)
        programs |= found
    print(f"{len(programs)} programs of {len(counts)} parts", flush=True)
    results = compiler.compile_programs(programs, H100, processes=os.cpu_count() or 1, report=_Progress(len(programs)))
    failed = [result for result in results if result.error is not None]
    for result in failed:
        print(f"does not compile: {result.error}", flush=True)
    folders = {folder for result in results for folder in result.folders} | {compiler.build_utils()}
    seconds = round(time.monotonic() - began, 1)
    fresh = sum(result.fresh for result in results)
    print(f"{fresh} compiled anew, {len(failed)} failed, {seconds:.0f} s", flush=True)

    content = pack(Path(triton.knobs.cache.dir), sorted(folders))
    if len(content) > MOST_BYTES:
        sys.exit(f"the archive has {len(content)} bytes, more than {MOST_BYTES}: leave programs out")
    about |= {
        "torch": torch.__version__,
        "python": sys.version.split()[0],
        "target": f"sm_{H100.capability}, {H100.processors} processors, {H100.shared_bytes} bytes shared",
        "programs": len(results) - len(failed),
        "failed": [result.error for result in failed],
        "parts": counts,
        "seconds": seconds,
    }
    write_cache(folder, content, about, [Path(wheel) for wheel in about["wheels"]])
    total = sum(path.stat().st_size for path in folder.iterdir())
    print(f"{folder}: {about['programs']} programs in {len(content) / 1e6:.1f} MB, {total / 1e6:.1f} MB in all")


def write_cache(folder: Path, content: bytes, about: dict[str, Any], wheels: list[Path]) -> None:
    """Write what `gpu_cache.unpack` takes: the manifest last, of files that are whole, and then take away others."""
    sha256 = hashlib.sha256(content).hexdigest()
    archive = f"triton-{sha256[:12]}.tar.xz"
    files = {archive: content} | {wheel.name: wheel.read_bytes() for wheel in wheels}
    manifest = {"format": FORMAT, **about, "triton": triton.__version__}
    manifest |= {"archive": archive, "archive_sha256": sha256, "wheels": [wheel.name for wheel in wheels]}
    files[MANIFEST] = json.dumps(manifest, indent=1).encode() + b"\n"
    folder.mkdir(exist_ok=True)
    for name, data in files.items():
        write_atomically(folder / name, data)
    for path in folder.iterdir():  # files of earlier caches
        if path.name not in files:
            path.unlink()


class _Progress:
    """A line for every tenth part."""

    def __init__(self, total: int):
        self.total, self.done, self.began = total, 0, time.monotonic()

    def __call__(self, result: Compiled) -> None:
        self.done += 1
        if self.done * 10 // self.total != (self.done - 1) * 10 // self.total:
            print(f"{self.done}/{self.total} after {time.monotonic() - self.began:.0f} s", flush=True)


def pack(cache: Path, folders: list[str]) -> bytes:
    """The folders of a Triton cache as an archive that holds no path and no time of this machine."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:xz") as tar:
        for path in sorted(path for folder in folders for path in (cache / folder).iterdir() if path.is_file()):
            content = path.read_bytes()
            if path.name.startswith("__grp__"):
                names = json.loads(content)["child_paths"]
                content = json.dumps({"child_paths": {name: name for name in sorted(names)}}).encode()
            info = tarfile.TarInfo(path.relative_to(cache).as_posix())
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def stub_of_libcuda(folder: Path) -> Path:
    """A libcuda.so.1 to link launchers against where there is no driver: names of functions, nothing in them."""
    from triton.backends.nvidia import driver

    texts = [(Path(driver.dirname) / name).read_text() for name in ("driver.c", "driver.py")]
    names = sorted(set(re.findall(r"\bcu[A-Z]\w*(?=\()", " ".join(texts))))
    folder.mkdir(parents=True, exist_ok=True)
    source, library = folder / "stub.c", folder / "libcuda.so.1"
    source.write_text("".join(f"void {name}(void) {{}}\n" for name in names))
    subprocess.run(["gcc", "-shared", "-fPIC", f"-Wl,-soname,{library.name}", "-o", library, source], check=True)
    return folder
