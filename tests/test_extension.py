"""fastp2p._C: what it asks of PyTorch and shows of itself, and what happens where it is missing or does not load."""

import importlib.util
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from numpy.random import mtrand

from fastp2p.ops import extension

ROOT = Path(__file__).resolve().parents[1]
IN_TORCH_2_11 = """
AOTI_TORCH_SUCCESS STABLE_TORCH_LIBRARY_IMPL STD_CUDA_KERNEL_LAUNCH_CHECK TORCH_ABI_VERSION TORCH_BOX
TORCH_ERROR_CODE_CHECK aoti_torch_get_current_cuda_stream torch_call_dispatcher
BFloat16 DeviceGuard Half HeaderOnlyArrayRef MemoryFormat ScalarType Tensor
contiguous copy_ empty empty_like from get_num_threads narrow parallel_for to toString
"""
FORCED = ("__bss_start", "_edata", "_end", "_init", "_fini")  # the linker exports them from every library


@pytest.fixture(scope="module")
def symbols() -> list[tuple[str, str]]:
    """(type, demangled name) of the dynamic symbols."""
    spec = importlib.util.find_spec("fastp2p._C")
    if spec is None or spec.origin is None:
        pytest.skip(f"no extension: {extension.WHY_ABSENT}")
    if shutil.which("nm") is None:
        pytest.skip("no nm on PATH")
    lines = subprocess.run(["nm", "-DC", spec.origin], check=True, capture_output=True, text=True).stdout.splitlines()
    return [(line[17], line[19:]) for line in lines]


def test_needs_the_stable_abi_alone(symbols: list[tuple[str, str]]):
    """The C functions of PyTorch's shim; the C++ ones change from release to release."""
    needed = [name for kind, name in symbols if kind in "Uw"]
    assert any(name.startswith("aoti_torch_") for name in needed)
    unstable = [name for name in needed if re.search(r"\b(at|c10|caffe2|torch)::", name)]
    assert not unstable


def words_of_pytorch() -> set[str]:
    """Names of PyTorch's headers in csrc/, less what is declared weak there: only a newer PyTorch has that."""
    text = "\n".join(file.read_text() for file in sorted((ROOT / "csrc").rglob("*.*")))
    text = re.sub(r"//.*", "", text)
    optional = set(re.findall(r"__attribute__\(\(weak\)\) [^;]*?(\w+)\(", text))
    scoped = re.findall(r"\btorch::(?:stable|headeronly)(?:::\w+)*::(\w+)", text)
    return {*scoped, *re.findall(r"\b(?:[A-Z]+_)?TORCH_\w+|\bSTD_\w+|\b(?:aoti_)?torch_\w+", text)} - optional


def test_the_oldest_pytorch_has_what_the_sources_use():
    """Compiling with a newer PyTorch does not show it: of the macros, not all are hidden from an older target."""
    used, oldest = words_of_pytorch(), set(IN_TORCH_2_11.split())
    assert used - oldest == set(), "not known to be in PyTorch 2.11: look there, then add it to IN_TORCH_2_11"
    assert oldest - used == set(), "no longer used"
    include = Path(torch.__file__).parent / "include" / "torch"
    folders = ("csrc/stable", "headeronly", "csrc/inductor/aoti_torch")
    files = [file for folder in folders for file in (include / folder).rglob("*.h")]
    known = set(re.findall(r"\w+", "\n".join(file.read_text() for file in files)))
    assert used - known == set(), f"not in PyTorch {torch.__version__}"


def test_exports_its_entry_alone(symbols: list[tuple[str, str]]):
    """And what of the C++ library's templates is compiled into everybody."""
    exported = {name for kind, name in symbols if kind not in "Uw" and not re.match(r"(\w+ )*std::", name)}
    exported = {name for name in exported if not re.match(r"(typeinfo|typeinfo name|vtable) for std::", name)}
    assert exported - set(FORCED) == {"PyInit__C"}


def copied_package(folder: Path) -> None:
    """fastp2p without its extension, as an installation lays it out."""
    ignored = shutil.ignore_patterns("*.so", "__pycache__")
    shutil.copytree(ROOT / "fastp2p", folder / "fastp2p", ignore=ignored)
    shutil.copytree(ROOT / "kernels", folder / "fastp2p" / "kernels", ignore=ignored)


@pytest.mark.parametrize(
    "content",
    [b"", b"\x7fELF" + bytes(60), Path(mtrand.__file__).read_bytes()],
    ids=["empty", "damaged", "another module"],
)
def test_a_module_that_does_not_load_is_told_once_and_pytorch_serves(tmp_path: Path, content: bytes):
    copied_package(tmp_path)
    (tmp_path / "fastp2p" / "_C.abi3.so").write_bytes(content)
    code = """
import torch
from fastp2p import ops
from fastp2p.ops.extension import describe_extension
print(describe_extension())
print(ops.served_by("norm_stats", "cpu"), *ops.norm_stats(torch.ones(1, 1, 2, 2), stat_groups=1))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stderr.count("UserWarning: ") == 1
    assert "UserWarning: fastp2p's C++ kernels: it does not load with torch " in done.stderr
    assert "; build it again: pip install --no-build-isolation " in done.stderr
    extension, served = done.stdout.splitlines()
    assert extension.startswith("none: it does not load with torch ")
    assert served == "reference (PyTorch) tensor([[1.]]) tensor([[0.]])"


@pytest.mark.parametrize(
    ("compiler", "words"),
    [
        ("python", "they were not built (FASTP2P_BUILD=none, or no C++ compiler at the time); to build them: "),
        ("no-c++", "there is no C++ compiler (no-c++); install "),
    ],
)
def test_why_it_is_missing_and_what_to_do(monkeypatch: pytest.MonkeyPatch, compiler: str, words: str):
    monkeypatch.setattr(extension, "INTERPRETED", False)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(shutil, "which", {"python": "/bin/python"}.get)
    monkeypatch.setenv("CXX", compiler)
    why = extension._load()
    assert why is not None
    assert why.startswith(words)
    assert re.search(r": pip install --no-build-isolation (--editable )?\S+$", why)


@pytest.mark.parametrize(
    ("origin", "command"),
    [
        ({"url": "file:///home/a%20b/fastp2p", "dir_info": {"editable": True}}, "--editable '/home/a b/fastp2p'"),
        ({"url": "file:///home/fastp2p", "dir_info": {}}, "/home/fastp2p"),
        ({"url": "file:///home/fastp2p-0.1.0-py3-none-any.whl", "archive_info": {}}, "SOURCE_FOLDER"),
        (None, "SOURCE_FOLDER"),
    ],
)
def test_the_command_that_installs_it_again(monkeypatch: pytest.MonkeyPatch, origin: dict | None, command: str):
    class Distribution:
        def read_text(self, name: str) -> str | None:
            assert name == "direct_url.json"
            return None if origin is None else json.dumps(origin)

    monkeypatch.setattr(extension.importlib.metadata, "distribution", lambda name: Distribution())
    assert extension._reinstall() == f"pip install --no-build-isolation {command}"


def test_cmake_compiles_what_setup_py_does(tmp_path: Path):
    """The same sources with the same flags, then the sanitizers'."""
    if shutil.which("cmake") is None or shutil.which("c++") is None:
        pytest.skip("needs cmake and a C++ compiler")
    options = [f"-DPython_EXECUTABLE={sys.executable}", "-DFASTP2P_SANITIZE=address,undefined"]
    subprocess.run(["cmake", "-S", ROOT, "-B", tmp_path, *options], check=True, capture_output=True)
    flags: dict[str, list[str]] = {}
    lines = (ROOT / "setup.py").read_text().splitlines()
    exec("\n".join(line for line in lines if line.startswith(("STABLE_ABI = ", "QUIET = ", "CXX = "))), flags)
    commands = json.loads((tmp_path / "compile_commands.json").read_text())
    for command in commands:
        given = command["command"].split()
        assert set(flags["CXX"]) <= set(given)
        assert given.index("-O1") > given.index("-O3")
        assert {"-DFASTP2P_SANITIZED", "-fsanitize=address,undefined", "-fno-omit-frame-pointer"} <= set(given)
    sources = {*(ROOT / "csrc").glob("*.cpp"), *(ROOT / "csrc" / "cpu").glob("*.cpp")}
    assert {Path(command["file"]) for command in commands} == sources
