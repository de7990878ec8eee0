"""Builds fastp2p._C from csrc/ on PyTorch's stable ABI; everything else is in pyproject.toml.

FASTP2P_BUILD says what to build: "cpu"; "cuda", with the CUDA kernels as well (TORCH_CUDA_ARCH_LIST chooses the GPUs);
"none"; or "auto", the default: "cuda" where nvcc and a CUDA build of PyTorch are found, whether or not there is a GPU,
else "cpu", and "none", with a warning, without a C++ compiler.
"""

import os
import shutil
import sys
from pathlib import Path

from setuptools import setup
from torch.utils import cpp_extension

STABLE_ABI = ["-DTORCH_TARGET_VERSION=0x020b000000000000", "-DPy_LIMITED_API=0x030b0000"]  # torch 2.11, Python 3.11
CXX = ["-std=c++20", "-O3", "-fno-math-errno", "-fno-trapping-math", "-fvisibility=hidden", "-g0", "-Wall", *STABLE_ABI]
NVCC = ["-std=c++20", "-O3", "--expt-relaxed-constexpr", "-lineinfo", "-DUSE_CUDA", *STABLE_ABI]


def what_to_build() -> str:
    """The resolved FASTP2P_BUILD."""
    build = os.environ.get("FASTP2P_BUILD", "auto")
    if build not in ("auto", "cpu", "cuda", "none"):
        sys.exit(f"FASTP2P_BUILD: got {build!r}, expected auto, cpu, cuda or none")
    nvcc = cpp_extension.CUDA_HOME is not None and cpp_extension.torch.version.cuda is not None
    if build == "cuda" and not nvcc:
        sys.exit("FASTP2P_BUILD=cuda needs nvcc (CUDA_HOME) and a CUDA build of PyTorch; one of them is missing")
    if build != "auto":
        return build
    if shutil.which(os.environ.get("CXX", "c++").split()[0]) is None:
        print("warning: no C++ compiler (c++, or $CXX): fastp2p installs without its C++ kernels", file=sys.stderr)
        return "none"
    return "cuda" if nvcc else "cpu"


def extensions() -> list[object]:
    """fastp2p._C, or nothing."""
    build = what_to_build()
    if build == "none":
        return []
    folders = ["csrc", "csrc/cpu"] + (["csrc/cuda"] if build == "cuda" else [])
    sources = sorted(str(file) for folder in folders for file in Path(folder).glob("*.c*"))
    extension = cpp_extension.CUDAExtension if build == "cuda" else cpp_extension.CppExtension
    flags = {"cxx": CXX + (["-DUSE_CUDA"] if build == "cuda" else []), "nvcc": NVCC}
    headers = [os.path.abspath("csrc")]
    return [extension("fastp2p._C", sources, include_dirs=headers, extra_compile_args=flags, py_limited_api=True)]


setup(
    ext_modules=extensions(),
    cmdclass={"build_ext": cpp_extension.BuildExtension},
    options={"bdist_wheel": {"py_limited_api": "cp311"}},
)
