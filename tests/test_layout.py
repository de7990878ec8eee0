"""The file tree tells the story: imports follow a partial order of folders, and each operator has its files."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from fastp2p import ops
from fastp2p.ops.library import file_of

ROOT = Path(__file__).resolve().parents[1]

# What the modules of each folder, and each module beside them, may import, besides their own folder.
BASE = ("errors", "environment", "files", "terminal", "conv_shape", "norm_gate", "config", "device")
ENGINE = (*BASE, "kernels", "ops", "nn", "data", "engine")
TRAIN = (*ENGINE, "count", "tuner", "models")
MAY_IMPORT: dict[str, tuple[str, ...]] = {
    **{name: BASE[:number] for number, name in enumerate(BASE)},
    "kernels": BASE,
    "ops": (*BASE, "kernels"),
    "nn": (*BASE, "kernels", "ops"),
    "data": (*BASE, "ops"),
    "engine": ENGINE[:-1],
    "count": ENGINE,
    "tuner": (*ENGINE, "count"),
    "models": (*ENGINE, "count"),
    "train": TRAIN,
    "commands": (*TRAIN, "train"),
    "cli": (*TRAIN, "train", "commands"),
    "__main__": ("cli",),
}
MODULES = sorted([*(ROOT / "fastp2p").rglob("*.py"), *(ROOT / "kernels").rglob("*.py")])


def layer(module: str) -> str:
    return module.removeprefix("fastp2p.").split(".")[0]


def imported_modules(path: Path) -> list[str]:
    """The fastp2p modules that a file imports, at its top or inside a function."""
    names = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names += [f"fastp2p.{alias.name}" for alias in node.names] if node.module == "fastp2p" else [node.module]
    return [name for name in names if name.startswith("fastp2p.")]


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_follow_the_order(path: Path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    own = parts[0] if parts[0] == "kernels" else parts[1]
    if own == "__init__":
        return  # the package itself gathers names from everywhere
    assert own in MAY_IMPORT, f"{path}: give the new folder or module its line in MAY_IMPORT"
    for name in imported_modules(path):
        target = layer(name)
        allowed = target == own or target in MAY_IMPORT[own]
        assert allowed, f"{path} imports {name}, which lies below it"


def test_the_order_is_partial():
    """Nothing that a folder may import may import that folder."""
    for name, allowed in MAY_IMPORT.items():
        assert all(name not in MAY_IMPORT[other] for other in allowed), name


@pytest.mark.parametrize("op", ops.operators())
def test_each_operator_has_its_files(op: str):
    folders = ("fastp2p/ops/", "kernels/", "tests/ops/test_", "benchmarks/ops/bench_")
    for path in (f"{folder}{file_of(op)}.py" for folder in folders):
        assert (ROOT / path).is_file(), f"operator {op} lacks {path}"
    assert (ROOT / f"csrc/cpu/{file_of(op)}.cpp").is_file(), f"operator {op} lacks its C++"
    assert hasattr(ops, file_of(op))
    assert hasattr(ops, f"{op}_ref")


def test_no_file_is_a_hall():
    files = [*MODULES, *(ROOT / "csrc").rglob("*.*")]
    long = [path for path in files if len(path.read_text().splitlines()) > 400]
    assert not long, f"over 400 lines: {long}"


def test_core_needs_torch_numpy_and_pillow_alone():
    """Networks, operators, losses, step and data run where nothing else can be installed."""
    optional = ["safetensors", "torchmetrics", "tensorboard", "matplotlib", "tqdm", "tyro"]
    code = f"""
import sys
for name in {optional}:
    sys.modules[name] = None
import fastp2p, fastp2p.data, fastp2p.ops, fastp2p.kernels, fastp2p.engine, fastp2p.count.memory
import fastp2p.models.metrics, fastp2p.models.pix2pix.reference, fastp2p.models.pix2pix.step
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_kernels_package_is_ours():
    import fastp2p.kernels

    assert Path(fastp2p.kernels.__file__) == ROOT / "kernels" / "__init__.py"
