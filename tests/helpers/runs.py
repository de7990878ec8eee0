"""Tiny training runs: started, resumed, compared."""

import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from conftest import TINY

from fastp2p.cli import parse
from fastp2p.models.checkpoint import load_checkpoint
from fastp2p.models.pix2pix.options import Pix2PixConfig
from fastp2p.train.loop import train
from fastp2p.train.run_folder import read_config


def config(data: Path, out: Path, *options: str) -> Pix2PixConfig:
    """The tiny run's configuration, through the command line's own parser."""
    return parse(["train", *TINY, "--data", str(data), "--out", str(out), "--log-steps", "2", *options]).config


def resume(folder: Path, say: Callable[[str], object] = print, **changes: Any) -> None:
    train(replace(read_config(folder), **changes), resume=True, say=say)


def flat(state: Any) -> dict[str, Any]:
    """Nested dicts and lists as one dict of paths."""
    if isinstance(state, dict | list):
        items = state.items() if isinstance(state, dict) else enumerate(state)
        return {f"{key}/{name}": leaf for key, value in items for name, leaf in flat(value).items()}
    return {"": state}


def assert_same_state(one: Path, other: Path) -> None:
    """Every tensor and number of the two folders' checkpoints is the same, bit for bit."""
    assert_equal(load_checkpoint(one / "checkpoint.pt"), load_checkpoint(other / "checkpoint.pt"))


def assert_equal(one: Any, other: Any) -> None:
    """Every tensor and number of two nested containers is the same, bit for bit."""
    a, b = flat(one), flat(other)
    assert a.keys() == b.keys()
    for name, value in a.items():
        same = torch.equal(value, b[name]) if isinstance(value, torch.Tensor) else value == b[name]
        assert same, f"{name} differs"


def start(data: Path, out: Path, *options: str) -> subprocess.Popen[str]:
    """A long tiny run in a process of its own."""
    command = [sys.executable, "-m", "fastp2p", "train", *TINY, "--data", str(data), "--out", str(out), *options]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def wait_for(path: Path, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 60
    while not path.exists():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline, f"{path} did not appear"
        time.sleep(0.005)
