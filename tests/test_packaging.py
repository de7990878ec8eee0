"""What is built and installed, from a copy of the checkout into an environment of its own, without the network."""

import importlib.util
import os
import re
import runpy
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest
import torch
from conftest import TINY
from torch.utils import cpp_extension

ROOT = Path(__file__).resolve().parents[1]
PIP = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input"]
OFFLINE = ["--no-index", "--no-deps", "--no-build-isolation"]

pytestmark = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("pip", "setuptools")), reason="needs pip and setuptools"
)
needs_compiler = pytest.mark.skipif(shutil.which("c++") is None, reason="needs a C++ compiler")


def run(*command: object, cwd: Path, code: int = 0, **environment: str | None) -> str:
    """All its output."""
    ours = {"PYTHONPATH": None, "FASTP2P_BUILD": None, "CXX": None, **environment}
    env = {name: value for name, value in {**os.environ, **ours}.items() if value is not None}
    done = subprocess.run([*map(str, command)], cwd=cwd, env=env, capture_output=True, text=True, timeout=900)
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """What is in the repository and could end up in a package."""
    folder = tmp_path / "checkout"
    folder.mkdir()
    for name in ("fastp2p", "kernels", "csrc", "tests", "benchmarks"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "CMakeLists.txt", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    return folder


@pytest.fixture
def python(tmp_path: Path) -> Path:
    """The interpreter of a new environment that sees our dependencies."""
    run(sys.executable, "-m", "venv", "--without-pip", "venv", cwd=tmp_path)
    packages = tmp_path / "venv" / Path(sysconfig.get_path("purelib")).relative_to(sys.prefix)
    theirs = [path for path in sys.path if path.endswith("site-packages")]
    (packages / "dependencies.pth").write_text("\n".join(theirs))
    return tmp_path / "venv" / "bin" / "python"


def install(python: Path, *what: object, cwd: Path, **environment: str | None) -> str:
    return run(*PIP, "--python", python, "install", *OFFLINE, *what, cwd=cwd, **environment)


def info(python: Path, tmp_path: Path, **environment: str | None) -> str:
    """What the installed command says in an empty folder."""
    empty = tmp_path / "empty"
    empty.mkdir()
    return run(python.parent / "fastp2p", "info", cwd=empty, **environment)


def build_sdist(checkout: Path) -> Path:
    """As a build front end asks for it."""
    code = "import setuptools.build_meta; setuptools.build_meta.build_sdist('dist')"
    run(sys.executable, "-c", code, cwd=checkout, FASTP2P_BUILD="none")
    (sdist,) = (checkout / "dist").iterdir()
    return sdist


def build_wheel(source: Path, **environment: str | None) -> Path:
    run(*PIP, "wheel", *OFFLINE, "--wheel-dir", "wheels", source, cwd=source.parent, **environment)
    (wheel,) = (source.parent / "wheels").iterdir()
    return wheel


def package_files() -> set[str]:
    """The modules and data files that belong into a wheel."""
    files = {f"fastp2p/{file.relative_to(ROOT / 'fastp2p')}" for file in (ROOT / "fastp2p").rglob("*.py")}
    files |= {f"fastp2p/kernels/{file.name}" for file in (ROOT / "kernels").glob("*.py")}
    data = "fastp2p/data/builtin/"
    return files | {"fastp2p/py.typed", f"{data}emoji.zip", f"{data}LICENSE-emoji.txt"}


def assert_wheel_holds(wheel: Path, extension: set[str]) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    metadata = {name for name in names if name.startswith("fastp2p-") and ".dist-info/" in name}
    assert names - metadata == package_files() | extension
    assert any(name.endswith("licenses/fastp2p/data/builtin/LICENSE-emoji.txt") for name in metadata)


def test_sdist_to_wheel_without_extension(checkout: Path):
    sdist = build_sdist(checkout)
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    sources = {str(file.relative_to(ROOT)) for file in (ROOT / "csrc").rglob("*.*")}
    assert sources | {"CMakeLists.txt", "setup.py", "kernels/norm_act.py"} <= names
    assert not any(name.startswith(("tests", "benchmarks")) for name in names)
    wheel = build_wheel(sdist, FASTP2P_BUILD="none")
    assert wheel.name.endswith("-py3-none-any.whl")
    assert_wheel_holds(wheel, set())


def test_without_a_compiler(checkout: Path, python: Path, aligned: Path, tmp_path: Path):
    """It installs, says what is missing, what to do, and once, when training, that it is slower; and it works."""
    tools = tmp_path / "tools"
    tools.mkdir()
    (tools / "python3").symlink_to(python)
    said = install(python, "--verbose", checkout, cwd=tmp_path, PATH=str(tools))
    assert said.count("warning: no C++ compiler (c++): fastp2p installs without its C++ kernels") == 1
    why = f"there is no C++ compiler (c++); install one, then: pip install --no-build-isolation {checkout}"
    report = info(python, tmp_path, PATH=str(tools))
    assert f"\nC++ kernels  none: {why}\n" in report
    assert re.search(r"^norm_act +reference \(PyTorch\)$", report, re.MULTILINE) or torch.cuda.is_available()
    train = (python.parent / "fastp2p", "train", *TINY, "--data", aligned, "--max-steps", 1)
    said = run(*train, cwd=tmp_path / "empty", PATH=str(tools))
    assert said.count("C++") == 2
    assert f"\nno C++ kernels, so plain PyTorch serves the operators, more slowly: {why}\n" in said


def test_a_compiler_that_fails_fails_the_installation(checkout: Path, python: Path, tmp_path: Path):
    compiler = tmp_path / "broken-g++"
    compiler.write_text("""#!/bin/sh
case "$*" in
-v) echo COLLECT_GCC=/usr/bin/g++ >&2 ;;
-dump*) echo 12.2.0 ;;
*) echo "fatal error: planted" >&2; exit 1 ;;
esac
""")
    compiler.chmod(0o755)
    arguments = (*PIP, "--python", python, "install", *OFFLINE, checkout)
    said = run(*arguments, cwd=tmp_path, code=1, CXX=str(compiler))
    assert said.index("fatal error: planted") < said.index(
        "FASTP2P_BUILD=none installs fastp2p without its C++ kernels."
    )


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"FASTP2P_BUILD": "gpu"}, "FASTP2P_BUILD: got 'gpu', expected auto, cpu, cuda or none"),
        ({"FASTP2P_BUILD": "cuda"}, "FASTP2P_BUILD=cuda needs a CUDA build of PyTorch and nvcc; CUDA_HOME is "),
        ({"FASTP2P_BUILD": "cpu", "CXX": "no-c++"}, "FASTP2P_BUILD=cpu needs a C++ compiler; no-c++ ($CXX, or c++) is"),
    ],
)
def test_what_cannot_be_built_is_told(checkout: Path, environment: dict[str, str], message: str):
    if environment["FASTP2P_BUILD"] == "cuda" and cpp_extension.CUDA_HOME is not None:
        pytest.skip("here it can be built")
    said = run(sys.executable, "setup.py", "--version", cwd=checkout, code=1, **environment)
    assert message in said.splitlines()[-1]  # PyTorch may say before that it finds no GPU


def test_linking_asks_for_nothing_of_the_toolkit(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """nvcc on PATH may be a script that calls one elsewhere: no library lies beside it. PyTorch brings libcudart."""
    made: list[dict] = []
    monkeypatch.setattr("setuptools.setup", lambda **arguments: made.append(arguments))
    monkeypatch.setattr(cpp_extension, "CUDA_HOME", str(tmp_path))
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setenv("FASTP2P_BUILD", "cuda")
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "9.0")
    monkeypatch.chdir(ROOT)
    runpy.run_path("setup.py")
    (extension,) = made[0]["ext_modules"]
    assert "csrc/cuda/adam.cu" in extension.sources
    assert set(extension.libraries) <= {"c10", "torch", "torch_cpu", "c10_cuda", "torch_cuda"}


def pins(file: str) -> dict[str, str]:
    lines = [line for line in (ROOT / file).read_text().splitlines() if not line.startswith("#")]
    return dict(line.split("==") for line in lines)


def test_the_floor_is_the_oldest_that_is_supported():
    """And otherwise what the other tests run with, so that a difference has one of these causes."""
    floor, usual = pins("constraints-floor.txt"), pins("constraints.txt")
    required = " ".join(tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"])
    for name in ("torch", "triton"):
        (oldest,) = re.findall(rf"\b{name}>=([\d.]+)", required)
        assert f"{floor[name]}.".startswith(f"{oldest}."), name
    major, minor, _ = map(int, floor["torch"].split("."))
    assert f"-DTORCH_TARGET_VERSION=0x{major:02x}{minor:02x}000000000000" in (ROOT / "setup.py").read_text()
    differ = {name for name in floor.keys() & usual.keys() if floor[name] != usual[name]}
    assert differ == {"torch", "triton", "numpy", "setuptools"}
    only = {name for name in floor.keys() - usual.keys() if not name.startswith(("nvidia-", "cuda-"))}
    assert not only


def assert_cpp_serves(report: str) -> None:
    assert re.search(r"^C\+\+ kernels  CPU ", report, re.MULTILINE)
    assert re.search(r"^norm_act +C\+\+$", report, re.MULTILINE) or torch.cuda.is_available()


@pytest.mark.slow
@needs_compiler
def test_sdist_to_wheel_to_installation(checkout: Path, python: Path, tmp_path: Path):
    wheel = build_wheel(build_sdist(checkout), FASTP2P_BUILD="cpu")
    assert "-cp311-abi3-" in wheel.name
    assert_wheel_holds(wheel, {"fastp2p/_C.abi3.so"})
    install(python, wheel, cwd=tmp_path)
    shutil.rmtree(checkout)
    assert_cpp_serves(info(python, tmp_path))


@pytest.mark.slow
@needs_compiler
@pytest.mark.parametrize("options", [[], ["--editable"]])
def test_installation_from_the_checkout(checkout: Path, python: Path, tmp_path: Path, options: list[str]):
    install(python, *options, ".", cwd=checkout, FASTP2P_BUILD="cpu")
    assert_cpp_serves(info(python, tmp_path))
    package = run(python, "-c", "import fastp2p; print(fastp2p.__path__[0])", cwd=tmp_path).strip()
    assert Path(package).is_relative_to(checkout if options else python.parents[1])
