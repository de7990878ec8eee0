"""The machine under gpu_check.py: what it lacks and how it gets that without a network, and what it is."""

import importlib.metadata
import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
WHEELS = ROOT / ".gpu-wheels"
GIVEN = {"torch": "torch", "triton": "triton", "numpy": "numpy", "PIL": "pillow"}  # module: package
SMI_FIELDS = (
    "name,driver_version,pstate,clocks.sm,clocks.mem,clocks.max.sm,clocks.max.mem,"
    "temperature.gpu,power.draw,power.limit,utilization.gpu,memory.used,memory.total"
)


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


def describe(rehearse: bool) -> dict[str, Any]:
    """GPU and versions, for the head of the results."""
    import torch

    smi = smi_state()
    facts = {
        "gpu": "none: rehearsed on the CPU" if rehearse else torch.cuda.get_device_name(),
        "driver": None if rehearse or smi is None else smi.get("driver_version"),
        "cpu_cores": os.cpu_count(),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "triton": importlib.metadata.version("triton"),
            "numpy": importlib.metadata.version("numpy"),
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
            "fastp2p": importlib.metadata.version("fastp2p"),
        },
        "platform": platform.platform(),
    }
    return facts | commit()


def slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def smi_state() -> dict[str, str] | None:
    """Clocks, temperature, power and load of the first GPU as nvidia-smi tells them; None where it is not there."""
    if shutil.which("nvidia-smi") is None:
        return None
    command = ["nvidia-smi", f"--query-gpu={SMI_FIELDS}", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except subprocess.TimeoutExpired:
        return {"error": "nvidia-smi did not answer within 20 s"}
    if done.returncode or not done.stdout.strip():
        return {"error": (done.stderr or done.stdout).strip()[-300:]}
    values = (value.strip() for value in done.stdout.splitlines()[0].split(","))
    return dict(zip(SMI_FIELDS.split(","), values, strict=False))


def commit() -> dict[str, Any]:
    """The commit and whether files differ from it; without a repository FASTP2P_COMMIT, with -dirty if they do.

    Where there is a repository that variable is not looked at: an old one would put its name to other code's results.
    """
    if not (ROOT / ".git").exists():
        given = os.environ.get("FASTP2P_COMMIT")
        if not given:
            return {"commit": None, "dirty": None}
        return {"commit": given.removesuffix("-dirty"), "dirty": given.endswith("-dirty")}
    if shutil.which("git") is None:
        return {"commit": None, "dirty": None}
    git = ["git", "-C", str(ROOT)]
    head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True)
    status = subprocess.run([*git, "status", "--porcelain"], capture_output=True, text=True)
    if head.returncode or status.returncode:
        return {"commit": None, "dirty": None}
    return {"commit": head.stdout.strip(), "dirty": bool(status.stdout.strip())}
