"""Pickles of tensors that no program should walk through are refused in a sentence."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from fastp2p.commands.convert import convert
from fastp2p.errors import InputError
from fastp2p.models.checkpoint import load_checkpoint


def in_itself() -> list[Any]:
    value: list[Any] = []
    value.append(value)
    return value


def nested(depth: int) -> Any:
    value: Any = ()
    for _ in range(depth):
        value = (value,)
    return value


def doubled(times: int) -> Any:
    """A small file, and 2 ** times entries to walk through."""
    value: Any = [0, 0]
    for _ in range(times):
        value = [value, value]
    return value


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (in_itself(), "one that contains itself; expected a dict of tensors"),
        (nested(3000), "more than 32 deep.*; expected a dict of tensors"),
        ({nested(3000): 1}, "more than 32 deep.*; expected a dict of tensors"),
        ({nested(3000)}, "more than 32 deep.*; expected a dict of tensors"),
        (doubled(60), "more than 1,000,000 entries in all.*; expected a dict of tensors"),
        (torch.ones(2, dtype=torch.complex64).conj(), "a torch.complex64 tensor whose .*, expected a plain one; call"),
        (
            torch.ones(2, dtype=torch.complex64).conj().imag,
            "a torch.float32 tensor whose .*, expected a plain one; call",
        ),
    ],
    ids=["in itself", "deep", "deep key", "deep set", "doubled", "conjugate", "negative"],
)
def test_pickles_that_cannot_be_walked_through(tmp_path: Path, content: Any, expected: str):
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(100_000)  # to write it
    try:
        for name in ("checkpoint.pt", "a.pth"):
            torch.save({"format": 2, "x": content}, tmp_path / name)
    finally:
        sys.setrecursionlimit(limit)
    with pytest.raises(InputError, match=rf"checkpoint\.pt: holds .*{expected}"):
        load_checkpoint(tmp_path / "checkpoint.pt", say=lambda line: None)
    with pytest.raises(InputError, match=rf"a\.pth: holds .*{expected}"):
        convert(tmp_path / "a.pth", tmp_path / "b.safetensors")


@pytest.mark.parametrize("version", [torch.ones(2), 2.0, True, None])
def test_a_format_that_is_no_whole_number(tmp_path: Path, version: Any):
    torch.save({"format": version}, tmp_path / "checkpoint.pt")
    with pytest.raises(InputError, match="is no checkpoint of this version of fastp2p"):
        load_checkpoint(tmp_path / "checkpoint.pt", say=lambda line: None)
