"""Plain words: a comment begins with its noun, and so does a docstring."""

import ast
import itertools
import re
import tokenize
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("fastp2p", "kernels", "tests", "benchmarks")


def files() -> list[Path]:
    found = [ROOT / "setup.py", *(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))]
    return sorted(found)


def comments(path: Path) -> list[tuple[int, str]]:
    """Where the comments of a file begin: each with its line, without the sign."""
    found, before = [], -1
    with tokenize.open(path) as stream:
        for token in tokenize.generate_tokens(stream.readline):
            if token.type == tokenize.COMMENT:
                # One that goes on from the line above does not begin
                alone = token.line.lstrip().startswith("#")
                if not (alone and before == token.start[0] - 1):
                    found.append((token.start[0], token.string.lstrip("# ")))
                before = token.start[0] if alone else -1
    return found


def docstrings(path: Path) -> list[tuple[int, str]]:
    """The docstrings of a file, each with its line; the texts under fields too."""
    nodes = ast.walk(ast.parse(path.read_text()))
    return [
        (node.lineno, node.value.value)
        for node in nodes
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
    ]


def test_comments_and_docstrings_begin_with_their_noun():
    wrong = [
        f"{path.relative_to(ROOT)}:{line}: {text.strip():.60}"
        for path in files()
        for line, text in comments(path) + docstrings(path)
        if re.match(r"\s*[Oo]f\b", text)
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("x = 1  # a sum\n", [(1, "a sum")]),
        ("# The sum\n# and the rest\n", [(1, "The sum")]),
        ("x = 1  # a sum\n# The rest\n", [(1, "a sum"), (2, "The rest")]),
    ],
)
def test_comments_are_found(tmp_path: Path, source: str, expected: list[tuple[int, str]]):
    (tmp_path / "code.py").write_text(source)
    assert comments(tmp_path / "code.py") == expected


@pytest.mark.parametrize("path", sorted((ROOT / "csrc").rglob("*.*")), ids=lambda path: path.name)
def test_comments_in_cpp_begin_with_their_noun(path: Path):
    assert not re.findall(r"(?<!/)// ?[Oo]f .*", _beginnings(path.read_text()))


def _beginnings(text: str) -> str:
    """A C++ file without the lines of comments that go on from the line above."""
    lines = ["", *text.splitlines()]
    goes_on = [all(line.strip().startswith("//") for line in pair) for pair in itertools.pairwise(lines)]
    return "\n".join(line for line, goes in zip(lines[1:], goes_on, strict=True) if not goes)
