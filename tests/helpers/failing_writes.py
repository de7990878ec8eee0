"""Train while the n-th call that writes into the run folder fails, for each n, and resume: run by test_writes.py.

Prints one JSON line for each call: what failed, how the run ended, what it said, and what differs from an unbroken run
after `--resume`. Each run is a forked process, since imports take longer than the run.
"""

import argparse
import contextlib
import ctypes
import errno
import json
import os
import shutil
import sys
import traceback
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure

from fastp2p.cli import main
from fastp2p.models.checkpoint import load_checkpoint, load_generator
from fastp2p.models.pix2pix.model import MODEL as PIX2PIX
from fastp2p.train.recorder import read_stats

SHIM = ctypes.CDLL(None)  # preloaded
SHIM.call_failed.restype = ctypes.c_char_p
MODES = {"kill": 0, "ENOSPC": errno.ENOSPC, "EIO": errno.EIO, "full": errno.ENOSPC}  # full: from there on
OPTIONS = [
    *("--netG", "unet_8", "--ngf", "4", "--netD", "pixel", "--ndf", "4", "--load-size", "36", "--crop-size", "32"),
    *("--batch-size", "2", "--max-steps", "4", "--device", "cpu", "--kernels", "aten", "--dropout", "paper"),
    *("--log-steps", "2", "--panel-steps", "3", "--save-minutes", "0"),
]


def save_lines(figure: Figure, buffer: Any, **_: Any) -> None:
    """In place of Figure.savefig, which takes longer than the run: what is drawn, as numbers."""
    buffer.write(json.dumps([line.get_xydata().tolist() for axes in figure.axes for line in axes.lines]).encode())


def forked(args: list[str], folder: Path, said: Path, mode: str = "kill", call: int = 0) -> tuple[int, str, int]:
    """Run the command line while this call fails, 0 for none: its status, what failed, and how many calls there are."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        status = 70
        try:
            os.dup2(os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 1)
            os.dup2(1, 2)
            SHIM.fail_calls(str(folder).encode(), call, 10**9 if mode == "full" and call else call, MODES[mode])
            status = main(args)
            sys.stdout.flush()
        except BaseException:
            traceback.print_exc()
            sys.stderr.flush()
        finally:
            counted, failed = SHIM.calls_counted(), SHIM.call_failed().decode()
            os.write(writer, json.dumps([failed, counted]).encode())
            os._exit(status)
    os.close(writer)
    _, waited = os.waitpid(child, 0)
    told = os.read(reader, 10**6)
    os.close(reader)
    failed, counted = json.loads(told) if told else ("", 0)
    return os.waitstatus_to_exitcode(waited), failed, counted


def flat(state: Any, name: str = "") -> dict[str, Any]:
    if isinstance(state, dict | list):
        items = state.items() if isinstance(state, dict) else enumerate(state)
        return {key: leaf for k, value in items for key, leaf in flat(value, f"{name}/{k}").items()}
    return {name: state.tolist() if isinstance(state, torch.Tensor) else state}


def content(folder: Path) -> dict[str, Any]:
    """All of a run that does not depend on the clock."""
    stats, damaged = read_stats(folder / "stats.jsonl", PIX2PIX)
    pictures = {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*.png")}
    return {
        "checkpoint": flat(load_checkpoint(folder / "checkpoint.pt")),
        **{name: flat(dict(load_generator(folder / name)[0].state_dict())) for name in NETS},
        **{f"{name}'s step": load_generator(folder / name)[1].step for name in NETS},
        "stats": ([{k: v for k, v in line.items() if k != "img_per_sec"} for line in stats], damaged),
        "config": (folder / "config.json").read_bytes().replace(folder.name.encode(), b""),
        "kernels": (folder / "kernels.json").read_bytes(),
        "leftovers": sorted(str(path.name) for path in folder.rglob(".*")),
        **pictures,
    }


NETS = ("netG.safetensors", "netG_best.safetensors")


def differing(folder: Path, unbroken: dict[str, Any]) -> list[str]:
    found = content(folder)
    return sorted(name for name in found.keys() | unbroken.keys() if found.get(name) != unbroken.get(name))


def walk(data: Path, root: Path, mode: str, part: int, parts: int) -> None:
    folder, said = root / f"{mode}-{part}", root / f"said-{mode}-{part}.txt"
    command = ["train", *OPTIONS, "--data", str(data), "--out", str(folder)]
    Figure.savefig = save_lines
    torch.set_num_threads(1)  # or a fork would wait for threads that it does not have
    with contextlib.redirect_stdout(sys.stderr):
        assert main([*command[:-1], str(root / f"imports-{part}")]) == 0
    status, _, calls = forked(command, folder, said)
    assert status == 0, said.read_text()
    unbroken = content(folder)
    for call in range(1 + part, calls + 1, parts):
        shutil.rmtree(folder)
        status, failed, _ = forked(command, folder, said, mode, call)
        row = {"call": call, "failed": failed, "status": status, "said": said.read_text()}
        if status == 0:
            row["at once"] = differing(folder, unbroken)
        resume = ["train", "--resume", str(folder)] if (folder / "config.json").exists() else command
        row["resumed"], _, _ = forked(resume, folder, said)
        row["resume said"] = said.read_text()
        row["differs"] = differing(folder, unbroken) if row["resumed"] == 0 else []
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", type=Path)
    parser.add_argument("root", type=Path)
    parser.add_argument("mode", choices=MODES)
    parser.add_argument("part", type=int)
    parser.add_argument("parts", type=int)
    arguments = parser.parse_args()
    walk(**vars(arguments))
