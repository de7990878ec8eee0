"""Builds fastp2p._C from csrc/ on PyTorch's stable ABI; everything else is in pyproject.toml.

FASTP2P_BUILD=cpu; cuda, the CUDA kernels too (for TORCH_CUDA_ARCH_LIST, or with no GPU here sm_75 to sm_120); none; or
auto: cuda with nvcc and a CUDA build of PyTorch, else cpu; without a C++ compiler none, with a warning (see pip -v)."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import errors, setup
from torch.utils import cpp_extension

STABLE_ABI = ["-DTORCH_TARGET_VERSION=0x020b000000000000"]  # torch 2.11's; Python's comes with py_limited_api
QUIET = ["-g0", "-Wall", "-Wno-maybe-uninitialized"]  # the last is a false alarm of gcc 12 within std::optional
CXX = ["-std=c++20", "-O3", "-fno-math-errno", "-fno-trapping-math", "-fvisibility=hidden", *QUIET, *STABLE_ABI]
NVCC = ["-std=c++20", "-O3", "--expt-relaxed-constexpr", "-Xcompiler=-fvisibility=hidden", "-DUSE_CUDA", *STABLE_ABI]


def what_to_build() -> str:
    build = os.environ.get("FASTP2P_BUILD", "auto")
    if build not in ("auto", "cpu", "cuda", "none"):
        sys.exit(f"FASTP2P_BUILD: got {build!r}, expected auto, cpu, cuda or none")
    nvcc = cpp_extension.CUDA_HOME is not None and cpp_extension.torch.version.cuda is not None
    if build == "cuda" and not nvcc:
        sys.exit(f"FASTP2P_BUILD=cuda needs a CUDA build of PyTorch and nvcc; CUDA_HOME is {cpp_extension.CUDA_HOME}")
    compiler = cpp_extension.get_cxx_compiler().split()[0]
    if build != "none" and shutil.which(compiler) is None:
        if build != "auto":
            sys.exit(f"FASTP2P_BUILD={build} needs a C++ compiler; {compiler} ($CXX, or c++) is not on PATH")
        if any("wheel" in word for word in sys.argv):  # once: the metadata are another call
            print(f"warning: no C++ compiler ({compiler}): fastp2p installs without its C++ kernels", file=sys.stderr)
        return "none"
    return build if build != "auto" else "cuda" if nvcc else "cpu"


class Build(cpp_extension.BuildExtension):
    def build_extensions(self) -> None:
        try:
            super().build_extensions()
        except (RuntimeError, OSError, subprocess.SubprocessError, errors.CompileError, errors.LinkError) as error:
            sys.exit(f"{error}: the reason is above. FASTP2P_BUILD=none installs fastp2p without its C++ kernels.")


def extensions() -> list[object]:
    if (build := what_to_build()) == "none":
        return []
    if (cuda := build == "cuda") and not cpp_extension.torch.cuda.is_available():
        os.environ.setdefault("TORCH_CUDA_ARCH_LIST", "7.5;8.0;8.6;8.9;9.0;10.0;12.0+PTX")
    sources = sorted(str(f) for kind in (["cpp", "cu"] if cuda else ["cpp"]) for f in Path("csrc").rglob(f"*.{kind}"))
    flags = {"cxx": CXX + (["-DUSE_CUDA"] if cuda else []), "nvcc": NVCC}
    options = {"include_dirs": [os.path.abspath("csrc")], "extra_compile_args": flags, "py_limited_api": True}
    make = cpp_extension.CUDAExtension if cuda else cpp_extension.CppExtension
    made = make("fastp2p._C", sources, **options)
    made.libraries = [name for name in made.libraries if name != "cudart"]  # PyTorch brings it; a wrapped nvcc hides it
    return [made]


setup(ext_modules=extensions(), cmdclass={"build_ext": Build}, options={"bdist_wheel": {"py_limited_api": "cp311"}})
