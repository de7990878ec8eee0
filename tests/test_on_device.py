"""The tests that --device moves to a GPU say nowhere "the CPU": found in their source, for a machine without a GPU."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers.on_device import FOLDERS

TESTS = Path(__file__).resolve().parent
HELPERS = [TESTS / "helpers" / f"{name}.py" for name in ("comparing", "gemm_shapes", "nets", "plain_models")]
FOUND = [TESTS / name for name in FOLDERS]
FILES = sorted({file for path in FOUND for file in (path.glob("*.py") if path.is_dir() else [path])} | {*HELPERS})


def faults(source: str) -> Iterator[str]:
    """What holds on the CPU alone, by line."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef):
            if "scope=" in "".join(map(ast.unparse, node.decorator_list)):
                yield f"{node.lineno}: {node.name} is older than a test's device; leave its scope out"
            for decorator in map(ast.unparse, node.decorator_list):
                if "skipif" in decorator and ("served_by(" in decorator or "WHY_ABSENT" in decorator):
                    yield f"{node.lineno}: {node.name} asks who serves the CPU; use the fixture cpp_serves"
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func)
        if name == "torch.Generator" and not node.args:
            yield f"{node.lineno}: a generator of the CPU; use on_device.generator"
        if name in ("torch.get_rng_state", "torch.set_rng_state"):
            yield f"{node.lineno}: {name} is the CPU's; use on_device.rng_state"
        if name == "torch.autocast" and isinstance(node.args[0], ast.Constant):
            yield f"{node.lineno}: autocast of one device; take that of a tensor"
        threads = name.rpartition(".")[2] in ("ThreadPoolExecutor", "Thread")
        if threads and "torch.set_default_device" not in map(ast.unparse, (k.value for k in node.keywords)):
            yield f"{node.lineno}: threads do not inherit the default device; give them torch.set_default_device"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(TESTS)))
def test_runs_on_either_device(path: Path):
    assert list(faults(path.read_text())) == []


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("torch.randn(3, generator=torch.Generator().manual_seed(1))", "1: a generator"),
        ('with torch.autocast("cpu", torch.bfloat16):\n    pass', "1: autocast"),
        ("with ThreadPoolExecutor(2) as pool:\n    pass", "1: threads"),
        ("@pytest.fixture(scope='module')\ndef cases(): ...", "2: cases is older"),
        ("state = torch.get_rng_state()", "1: torch.get_rng_state"),
        ('@pytest.mark.skipif(served_by("conv", "cpu") != "C++")\ndef test(): ...', "2: test asks"),
    ],
)
def test_each_fault_is_found(source: str, said: str):
    (found,) = faults(source)
    assert found.startswith(said)
