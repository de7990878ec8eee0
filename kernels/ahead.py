"""Compiling ahead: which programs launches take, on a GPU or without one, and compiling them by several processes.

While `recording` lasts a launch of a kernel compiles and runs nothing: it notes the program that it would take on a
target, as Triton itself tells programs apart. `compile_programs` hands such notes to processes that compile them into
Triton's cache, where the launch finds them later, also on another machine. Tensors may be on the meta device: Triton
looks at their dtype and at whether their address is a multiple of 16, and there the address is the offset in a storage,
of which every allocation on a GPU begins at a multiple of 512.
"""

import hashlib
import importlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from queue import SimpleQueue
from types import SimpleNamespace
from typing import Any, NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia import driver as nvidia_driver
from triton.runtime import build
from triton.runtime.cache import get_cache_key, get_cache_manager
from triton.runtime.driver import driver

from fastp2p.kernels import tile_rule
from fastp2p.kernels.compile_check import fix_keys

DEVICE = -1  # the index in the kernels' own caches; no GPU has it, so nothing here is ever launched


@dataclass(frozen=True)
class Target:
    """What a GPU tells launchers and the compiler of itself."""

    capability: int  # 90 for 9.0
    processors: int
    shared_bytes: int  # that a block may have

    @classmethod
    def of(cls, device_index: int) -> "Target":
        """A GPU of this machine."""
        properties = driver.active.utils.get_device_properties(device_index)
        target = driver.active.get_current_target()
        return cls(target.arch, properties["multiprocessor_count"], properties["max_shared_mem"])


H100 = Target(90, 132, 232448)  # an H200 as well


class Program(NamedTuple):
    """One specialisation of a kernel, as `JITFunction.preload` takes it."""

    module: str
    kernel: str
    specialisation: str


@dataclass(frozen=True)
class Compiled:
    """What became of a program."""

    program: Program
    folders: tuple[str, ...] = ()  # in Triton's cache: the program's and its launcher's
    seconds: float = 0.0
    fresh: bool = False  # compiled, and not found in the cache
    error: str | None = None


@contextmanager
def pretending(target: Target) -> Iterator[None]:
    """Let Triton and the launchers' rules see a target, for tensors that are on no GPU."""
    properties = {"max_shared_mem": target.shared_bytes, "multiprocessor_count": target.processors, "warpSize": 32}
    fake = SimpleNamespace(
        utils=SimpleNamespace(get_device_properties=lambda device: properties),
        get_current_target=lambda: GPUTarget("cuda", target.capability, 32),
        get_current_device=lambda: DEVICE,
        get_current_stream=lambda device: 0,
    )
    fix_keys()
    facts = {
        "SHARED_BYTES_WHEN_INTERPRETED": target.shared_bytes,
        "PROCESSORS_WHEN_INTERPRETED": target.processors,
        "CAPABILITY_WHEN_INTERPRETED": target.capability,
    }
    before, active = {name: getattr(tile_rule, name) for name in facts}, driver._active
    driver.set_active(fake)
    vars(tile_rule).update(facts)
    tile_rule._choose_config.cache_clear()
    try:
        yield
    finally:
        vars(tile_rule).update(before)
        driver.set_active(active)
        tile_rule._choose_config.cache_clear()


@contextmanager
def recording(target: Target) -> Iterator[dict[Program, None]]:
    """Give the programs that launches take on a target, in their order; none is compiled, and no kernel runs."""
    programs: dict[Program, None] = {}

    def note(*, fn: Any, compile: dict[str, Any], **_: Any) -> bool:
        programs[Program(fn.module, fn.jit_function.fn.__name__, compile["specialization_data"])] = None
        return True  # there is nothing to launch

    before = triton.knobs.runtime.jit_cache_hook
    with pretending(target):
        triton.knobs.runtime.jit_cache_hook = note
        try:
            yield programs
        finally:
            triton.knobs.runtime.jit_cache_hook = before


def missing(programs: Iterable[Program], target: Target) -> list[Program]:
    """Those that Triton's cache lacks."""
    with pretending(target):
        return [program for program in programs if not _is_cached(program)]


def _is_cached(program: Program) -> bool:
    kernel = _kernel(program)
    found = []

    def look_up(src: Any, target: Any, options: dict[str, Any], **_: Any) -> None:
        backend = triton.compiler.make_backend(target)
        environment = triton._C.libtriton.get_cache_invalidating_env_vars()
        key = get_cache_key(src, backend, backend.parse_options(dict(options)), environment)
        cache = get_cache_manager(hashlib.sha256(key.encode()).hexdigest())
        found.append(bool(cache.get_group(f"{src.name[:150]}.json")))

    kernel.device_caches.pop(DEVICE, None)
    kernel.device_caches[DEVICE]  # makes the entry, and sets what compiles
    compiles, kernel.compile = kernel.compile, look_up
    try:
        kernel.preload(program.specialisation)
    finally:
        kernel.compile = compiles
        kernel.device_caches.pop(DEVICE)
    return found == [True]


def compile_programs(
    programs: Iterable[Program],
    target: Target,
    *,
    processes: int,
    report: Callable[[Compiled], object] = lambda compiled: None,
) -> list[Compiled]:
    """Compile into Triton's cache; what it holds already is left as it is.

    Args:
        programs: of any kernels that can be imported.
        target: what they were recorded for.
        processes: at most so many at a time.
        report: called with each result as it comes, from several threads.

    Returns:
        What became of each, in no order. A failure is there, with the compiler's words; none is raised.
    """
    waiting: SimpleQueue[Program] = SimpleQueue()
    count = 0
    for count, program in enumerate(programs, 1):  # noqa: B007 (the last one is how many there are)
        waiting.put(program)
    results: list[Compiled] = []

    def work() -> None:
        worker: _Worker | None = None
        while not waiting.empty():
            program = waiting.get_nowait() if waiting.qsize() else None
            if program is None:
                break
            worker = worker or _Worker(target)
            result = worker.compile(program)
            if result is None:
                result = Compiled(program, error=f"the compiling process ended with code {worker.close()}")
                worker = None
            results.append(result)
            report(result)
        if worker is not None:
            worker.close()

    n = min(processes, count)
    with ThreadPoolExecutor(max(1, n)) as threads:
        for future in [threads.submit(work) for _ in range(n)]:
            future.result()
    return results


class _Worker:
    """A process that compiles one program after the other.

    It is no fork, which a process that uses a GPU or threads may not become, and no multiprocessing, which would run
    the caller's own script once more.
    """

    def __init__(self, target: Target):
        folders = os.pathsep.join(path or os.getcwd() for path in sys.path)
        cache = {"TRITON_CACHE_DIR": triton.knobs.cache.dir}
        environment = {**os.environ, **cache, "PYTHONPATH": folders, "PYTHONSAFEPATH": "1", "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            [sys.executable, "-c", "from fastp2p.kernels.ahead import serve; serve()"],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,  # the compiler's dumps of what it cannot compile; its error is answered
            text=True,
        )
        self._send(asdict(target))

    def _send(self, message: object) -> None:
        assert self.process.stdin is not None
        with suppress(BrokenPipeError):  # it has ended, and reading tells
            print(json.dumps(message), file=self.process.stdin, flush=True)

    def compile(self, program: Program) -> Compiled | None:
        """None when the process has ended."""
        self._send(program)
        assert self.process.stdout is not None
        answer = self.process.stdout.readline()
        return Compiled(program, **json.loads(answer)) if answer else None

    def close(self) -> int:
        """End it; returns its exit code."""
        with self.process as process:
            assert process.stdin is not None
            process.stdin.close()
            return process.wait()


def serve() -> None:
    """A worker's whole life: a target and then programs come in as lines, answers go out as lines."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what the compiler prints is no answer
    target = Target(**json.loads(sys.stdin.readline()))
    with pretending(target), _not_loading():
        for line in sys.stdin:
            program = Program(*json.loads(line))
            print(json.dumps(_compile(program)), file=answers, flush=True)


def _compile(program: Program) -> dict[str, Any]:
    began = time.perf_counter()
    hits: list[bool] = []
    triton.knobs.compilation.listener = lambda *, cache_hit, **_: hits.append(cache_hit)
    try:
        compiled = _kernel(program).preload(program.specialisation)
        folders = [get_cache_manager(compiled.hash).key, *_build_launcher(compiled)]
    except Exception as error:  # the answer tells of it, and the worker compiles the next program
        cause: BaseException = error
        while cause.__cause__ is not None:  # the innermost function tells why
            cause = cause.__cause__
        return {"error": f"{program.kernel}: {type(cause).__name__}: {str(cause)[-300:]}"}
    return {"folders": folders, "seconds": time.perf_counter() - began, "fresh": hits == [False]}


def _kernel(program: Program) -> Any:
    return getattr(importlib.import_module(program.module), program.kernel)


def _build_launcher(compiled: Any) -> list[str]:
    """The host's half of a launch, in C, for a kernel's arguments; Triton has one for all kernels since 3.7."""
    make_launcher = getattr(nvidia_driver, "make_launcher", None)
    if make_launcher is None:
        return []
    source = make_launcher(compiled.src.constants, compiled.src.signature, compiled.metadata.tensordesc_meta)
    return [_build_module(source, "__triton_launcher")]


def build_utils() -> str:
    """The module by which Triton asks a GPU about itself; returns its folder in the cache."""
    with open(os.path.join(nvidia_driver.dirname, "driver.c")) as file, _not_loading():
        return _build_module(file.read(), "cuda_utils")


@contextmanager
def _not_loading() -> Iterator[None]:
    """What is built here is loaded by who launches, where there is a driver."""
    load, build._load_module_from_path = build._load_module_from_path, lambda name, path: path
    try:
        yield
    finally:
        build._load_module_from_path = load


def _build_module(source: str, name: str) -> str:
    """As Triton builds it, unless the cache holds it; returns its folder in the cache."""
    path = build.compile_module_from_src(
        source,
        name,
        library_dirs=nvidia_driver.library_dirs(),
        include_dirs=nvidia_driver.include_dirs,
        libraries=nvidia_driver.libraries,
    )
    return os.path.basename(os.path.dirname(str(path)))
