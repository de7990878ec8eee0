"""The machine under gpu_check.py: what it lacks, and how it gets that without a network."""

import importlib.metadata
import importlib.util
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from machine import ROOT

WHEELS = ROOT / ".gpu-wheels"
GIVEN = {"torch": "torch", "triton": "triton", "numpy": "numpy", "PIL": "pillow"}  # module: package


class Unfit(Exception):
    """The machine cannot do it; the message says what to do."""


def check_given(rehearse: bool) -> None:
    """Raise Unfit without what nobody can bring along: PyTorch and its company, and a GPU."""
    missing = [package for module, package in GIVEN.items() if importlib.util.find_spec(module) is None]
    if missing:
        raise Unfit(
            f"{sys.executable} lacks {', '.join(missing)}; choose another Python with make gpu-check PYTHON=..."
        )
    if rehearse:
        versions = [importlib.metadata.version(package).split(".") for package in ("triton", "numpy")]
        triton, numpy = ((int(major), int(minor)) for major, minor, *_ in versions)
        if triton < (3, 7) and numpy >= (2, 4):
            raise Unfit("the interpreter of Triton before 3.7 fails with numpy 2.4 or later; compiled kernels do not")
        return
    import torch

    if not torch.cuda.is_available():
        reason = "is a build for the CPU" if torch.version.cuda is None else "finds no usable CUDA GPU"
        raise Unfit(f"PyTorch {torch.__version__} {reason}; make gpu-rehearse runs the same path on a CPU")


def prepare(needs_pytest: bool) -> tuple[dict[str, str], Path | None]:
    """Make pytest and fastp2p importable by child processes.

    Returns:
        Their environment, and the temporary folder in it, which is the caller's to delete.

    Raises:
        Unfit: when something is missing here and not in .gpu-wheels/.
    """
    env, site = dict(os.environ), None
    lacks_pytest = needs_pytest and importlib.util.find_spec("pytest") is None
    installed = _checkout_installed(env)
    if lacks_pytest or not installed:
        wheels = sorted(map(str, WHEELS.glob("*.whl")))
        if lacks_pytest and not wheels:
            raise Unfit(
                f"pytest is not installed and {WHEELS.name}/ holds no wheels: where there is a network, run make "
                "gpu-wheels in this checkout and bring the folder along, or do without by --only benchmarks"
            )
        if wheels:
            site = Path(tempfile.mkdtemp(prefix="fastp2p-gpu-check-"))
            _pip("install", "--no-index", "--no-deps", "--no-compile", "--target", str(site), *wheels, env=env)
            env["PYTHONPATH"] = os.pathsep.join(filter(None, [str(site), env.get("PYTHONPATH")]))
    if not installed:
        print(f"fastp2p is not installed: pip install -e {ROOT}", flush=True)
        install = ("install", "--no-deps", "--no-build-isolation", "--no-index", "-e", str(ROOT))
        try:
            _pip(*install, env=env)
        except Unfit as error:  # Triton's kernels can be checked all the same; the rows say who served
            print(f"{error}\nonce more without C++ and CUDA kernels: FASTP2P_BUILD=none", flush=True)
            _pip(*install, env=env | {"FASTP2P_BUILD": "none"})
        if not _checkout_installed(env):
            raise Unfit(f"pip install -e {ROOT} went through, yet {sys.executable} does not find fastp2p")
    return env, site


def _checkout_installed(env: dict[str, str]) -> bool:
    """Whether fastp2p is installed; Unfit if it is another checkout's."""
    code = "import fastp2p, fastp2p.kernels; print(fastp2p.kernels.__file__)"
    with tempfile.TemporaryDirectory() as elsewhere:  # here the folder fastp2p/ would be found without its kernels
        found = subprocess.run([sys.executable, "-c", code], cwd=elsewhere, env=env, capture_output=True, text=True)
    if found.returncode:
        return False
    if Path(found.stdout.strip()).resolve().parent != ROOT / "kernels":
        raise Unfit(
            f"the fastp2p that is installed is {found.stdout.strip()}; run pip install -e {ROOT}, or uninstall it"
        )
    return True


def _pip(*args: str, env: dict[str, str]) -> None:
    command = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", *args]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    if done.returncode:
        hint = "make gpu-wheels, where there is a network, fetches setuptools and pytest for it"
        raise Unfit(f"{' '.join(command)} failed ({hint}): {done.stderr.strip().splitlines()[-1:]}")
