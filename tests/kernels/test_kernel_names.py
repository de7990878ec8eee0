"""A kernel's argument means one thing from the first line to the last.

Python forgets what a loop's variable was called before; the compiler leaves such a name undefined after the loop.
"""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

KERNELS = sorted((Path(__file__).resolve().parents[2] / "kernels").glob("*.py"))


def functions(source: str) -> Iterator[ast.FunctionDef]:
    """Those that Triton compiles."""
    for node in ast.walk(ast.parse(source)):
        decorators = [ast.unparse(d) for d in node.decorator_list] if isinstance(node, ast.FunctionDef) else []
        if any("triton.jit" in decorator or decorator.startswith("launched(") for decorator in decorators):
            yield node


def names_in(node: ast.AST) -> set[str]:
    return {name.id for name in ast.walk(node) if isinstance(name, ast.Name)}


def rebound(function: ast.FunctionDef) -> Iterator[str]:
    """Arguments that a loop counts with, or that are assigned what has nothing to do with them."""
    arguments = {arg.arg for arg in function.args.args}
    for node in ast.walk(function):
        if isinstance(node, ast.For):
            yield from names_in(node.target) & arguments
        elif isinstance(node, ast.Assign):
            targets = {name for target in node.targets for name in names_in(target) if isinstance(target, ast.Name)}
            yield from (targets & arguments) - names_in(node.value)


@pytest.mark.parametrize("path", KERNELS, ids=lambda path: path.stem)
def test_no_argument_is_given_another_meaning(path: Path):
    found = [f"{function.name}: {name}" for function in functions(path.read_text()) for name in rebound(function)]
    assert found == []


@pytest.mark.parametrize("line", ["for n in range(4):\n        pass", "n = 4"])
def test_one_that_is_is_found(line: str):
    (function,) = functions(f"@triton.jit\ndef kernel(x, n):\n    {line}\n    x += n\n    n = n * 2\n")
    assert list(rebound(function)) == ["n"]
