"""csrc/cuda compiled for every target with the flags of setup.py, which needs nvcc and no GPU, and what came out read.

pytest tests/kernels/test_cuda_sources.py -s    # make cuda-check: prints registers, spills and shared memory as well
"""

import ast
import importlib.util
import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest
from torch.utils import cpp_extension

ROOT = Path(__file__).resolve().parents[2]
SOURCES = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
QUICK = 90  # the one target of the quick suite
TARGETS = [pytest.param(t, marks=[] if t == QUICK else pytest.mark.slow) for t in (75, 80, 86, 89, 90, 100, 120)]


@dataclass(frozen=True)
class Kernel:
    """What the assembler reports of one."""

    name: str
    registers: int  # per thread
    spilled_bytes: int  # per thread, stored and loaded
    shared_bytes: int  # per block


def tool(name: str) -> str | None:
    """A program of the CUDA toolkit, or the one that Triton brings along."""
    folders = [Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")) / "bin"]
    triton = importlib.util.find_spec("triton")
    if triton is not None and triton.origin is not None:
        folders.append(Path(triton.origin).parent / "backends" / "nvidia" / "bin")
    return shutil.which(name) or next((str(f / name) for f in folders if (f / name).is_file()), None)


needs_nvcc = pytest.mark.skipif(tool("nvcc") is None, reason="needs nvcc, of the CUDA toolkit")


def flags() -> list[str]:
    """Those of setup.py, and those that PyTorch adds to them."""
    names: dict[str, list[str]] = {}
    for node in ast.parse((ROOT / "setup.py").read_text()).body:
        if isinstance(node, ast.Assign):
            exec(compile(ast.Module([node], []), "setup.py", "exec"), names)
    return [*names["NVCC"], *cpp_extension.COMMON_NVCC_FLAGS]


def compile_source(source: Path, target: int, cubin: Path) -> str:
    """Compile for one target; returns what nvcc and the assembler say."""
    include = [f"-I{folder}" for folder in (ROOT / "csrc", *cpp_extension.include_paths())]
    command = [tool("nvcc"), *flags(), *include, "-cubin", f"-arch=sm_{target}", "-Xptxas", "-v"]
    done = subprocess.run([*command, "-o", str(cubin), str(source)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def read_report(report: str) -> list[Kernel]:
    """The kernels of an assembler's report."""
    _, *parts = report.split("Compiling entry function ")
    kernels = []
    for part in parts:
        registers = re.search(r"Used (\d+) registers", part)
        spills = re.findall(r"(\d+) bytes spill", part)
        assert registers, f"ptxas says nothing of registers:\n{part}"
        assert spills, f"ptxas says nothing of spills:\n{part}"
        shared = re.search(r"(\d+) bytes smem", part)
        name, spilled_bytes = part.split("'")[1], sum(map(int, spills))
        kernels.append(Kernel(name, int(registers[1]), spilled_bytes, int(shared[1]) if shared else 0))
    return kernels


def plain_name(mangled: str) -> str:
    """adam_kernel<float, BFloat16, 4>, where there is a c++filt."""
    if shutil.which("c++filt") is None:
        return mangled
    name = subprocess.run(["c++filt", mangled], capture_output=True, text=True, check=True).stdout
    return re.search(r"\w+_kernel<[^>]*>", name)[0].replace("c10::", "")


@needs_nvcc
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.name)
def test_no_kernel_spills(source: Path, target: int, tmp_path: Path):
    known = subprocess.run([tool("nvcc"), "--list-gpu-arch"], capture_output=True, text=True, check=True).stdout
    if f"compute_{target}" not in known.split():
        pytest.skip(f"this nvcc does not know sm_{target}")
    kernels = read_report(compile_source(source, target, tmp_path / "kernels.cubin"))
    assert kernels
    print(f"\n{'kernel':<40} {'target':>6} {'registers':>9} {'spilled':>7} {'shared':>6}")
    for kernel in sorted(kernels, key=lambda kernel: plain_name(kernel.name)):
        numbers = f"{kernel.registers:9} {kernel.spilled_bytes:7} {kernel.shared_bytes:6}"
        print(f"{plain_name(kernel.name):<40} {f'sm_{target}':>6} {numbers}")
    assert [kernel for kernel in kernels if kernel.spilled_bytes] == []


def instructions(cubin: Path) -> dict[str, str]:
    """The machine code of each kernel."""
    text = subprocess.run([tool("nvdisasm"), "-c", str(cubin)], capture_output=True, text=True, check=True).stdout
    _, *sections = re.split(r"^\s*\.section\s+\.text\.", text, flags=re.MULTILINE)
    return {section.split(",")[0]: section for section in sections}


@needs_nvcc
@pytest.mark.skipif(tool("nvdisasm") is None, reason="needs nvdisasm, of the CUDA toolkit or of Triton")
@pytest.mark.parametrize(
    ("source", "wide"),
    [
        # A thread's four elements of param, grad, exp_avg and exp_avg_sq in, three of these and the 16-bit weights out
        ("adam.cu", {"adam_kernelIffN3c108BFloat16ELi4": (4, 3, 1), "adam_kernelIffN3c104HalfELi4": (4, 3, 1)}),
        # The same of gradients in half the bytes, which come in by 64 bits
        ("adam.cu", {"adam_kernelIfN3c108BFloat16ES3_Li4": (3, 3, 1), "adam_kernelIfN3c104HalfES3_Li4": (3, 3, 1)}),
        # Bytes in, four values of A or of B out
        ("augment.cu", {"augment_kernelIfLi4": (0, 2, 0), "augment_kernelIN3c108BFloat16ELi4": (0, 1, 1)}),
    ],
)
def test_accesses_are_wide(source: str, wide: dict[str, tuple[int, int, int]], tmp_path: Path):
    """Loads of 128 bits, stores of 128 and of 64: as many as a thread needs for four elements."""
    cubin = tmp_path / "kernels.cubin"
    compile_source(ROOT / "csrc" / "cuda" / source, QUICK, cubin)
    code = instructions(cubin)
    for kernel, expected in wide.items():
        (text,) = (text for name, text in code.items() if kernel in name)
        found = tuple(text.count(f"{access} ") for access in ("LDG.E.128", "STG.E.128", "STG.E.64"))
        assert found == expected, f"{kernel}: {found}"


def test_the_report_of_the_assembler_is_read():
    report = """
ptxas info    : 28 bytes gmem
ptxas info    : Compiling entry function '_Z3oneIfEvT_' for 'sm_90'
ptxas info    : Function properties for _Z3oneIfEvT_
    8 bytes stack frame, 8 bytes spill stores, 4 bytes spill loads
ptxas info    : Used 255 registers, used 1 barriers, 8 bytes cumulative stack size, 1024 bytes smem
ptxas info    : Compiling entry function '_Z3twov' for 'sm_90'
ptxas info    : Function properties for _Z3twov
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 8 registers, used 0 barriers
"""
    assert read_report(report) == [Kernel("_Z3oneIfEvT_", 255, 12, 1024), Kernel("_Z3twov", 8, 0, 0)]
