"""The machine that results are of: what it is, its clocks, and what else keeps it busy."""

import math
import os
import platform
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
SMI_FIELDS = (
    "name,driver_version,pstate,clocks.sm,clocks.mem,clocks.max.sm,clocks.max.mem,"
    "temperature.gpu,power.draw,power.limit,utilization.gpu,memory.used,memory.total"
)

TOLERATED_SHARE = 0.05  # the cores' share that other things may keep busy while we measure


def describe(*, gpu: bool) -> dict[str, Any]:
    """Hardware, versions and commit, for the head of results. gpu: they are a GPU's, not the CPU's."""
    import torch

    from fastp2p.commands.info import version_of

    smi = smi_state() if gpu else None
    facts = {
        "gpu": torch.cuda.get_device_name() if gpu else None,
        "driver": None if smi is None else smi.get("driver_version"),
        "cpu": _cpu_name(),
        "cpu_cores": os.cpu_count(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "versions": {
            "python": platform.python_version(),
            "torch": version_of("torch"),
            "triton": version_of("triton"),
            "numpy": version_of("numpy"),
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version() if gpu else None,
            "fastp2p": version_of("fastp2p"),
        },
        "platform": platform.platform(),
        "programmatic_dependent_launch": os.environ.get("FASTP2P_PDL", "") == "1",  # kernels/dependent.py
    }
    return facts | commit()


def name_of(head: dict[str, Any]) -> str:
    """The GPU, or how many cores of which CPU."""
    return head["gpu"] or f"{head['cpu_cores']} cores of {head['cpu']}"


def _cpu_name() -> str:
    """With its generation: virtual machines often hide the model, but not that."""
    from fastp2p.environment import cpu_fields

    fields = cpu_fields()
    generation = f" family {fields['cpu family']} model {fields['model']}" if "cpu family" in fields else ""
    return fields.get("model name", platform.processor() or platform.machine()) + generation


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
        if given := os.environ.get("FASTP2P_COMMIT"):
            return {"commit": given.removesuffix("-dirty"), "dirty": given.endswith("-dirty")}
    elif shutil.which("git") is not None:
        commands = (["rev-parse", "HEAD"], ["status", "--porcelain"])
        done = [subprocess.run(["git", "-C", str(ROOT), *each], capture_output=True, text=True) for each in commands]
        if not any(command.returncode for command in done):
            return {"commit": done[0].stdout.strip(), "dirty": bool(done[1].stdout.strip())}
    return {"commit": None, "dirty": None}


class Strangers:
    """How many cores' worth of work is not ours while we measure: other processes, and what a hypervisor takes away.

    Args:
        sessions: of processes that are ours, beside this one. Linux alone tells, in a container of the whole machine.
    """

    def __init__(self, sessions: set[int]):
        self.knows = Path("/proc/stat").exists()
        self.sessions = sessions
        self.intervals, self.wall, self.seconds = 0, 0.0, 0.0  # seconds: of CPU, in all intervals

    def begin(self) -> None:
        if self.knows:
            self._before = self._now()

    def end(self) -> None:
        """An interval is over."""
        if not self.knows:
            return
        after = self._now()
        wall, machine, ours = (b - a for a, b in zip(self._before, after, strict=True))
        self.intervals += 1
        self.wall += wall
        self.seconds += machine - ours

    def cores(self) -> float | None:
        """Their mean number of busy cores over all intervals, at least; None where nobody tells.

        Linux counts in ticks of 10 ms, so of some intervals a few ticks, times the root of their number, may be the
        clock's.
        """
        if not self.wall:
            return None
        unsure = 3 * math.sqrt(self.intervals) / os.sysconf("SC_CLK_TCK")
        return max(0.0, self.seconds - unsure) / self.wall

    def _now(self) -> tuple[float, float, float]:
        """Wall clock, CPU seconds of the whole machine, and ours."""
        tick = os.sysconf("SC_CLK_TCK")
        user, nice, system, _, _, irq, softirq, steal = map(int, Path("/proc/stat").read_text().split()[1:9])
        ours = 0
        for path in Path("/proc").glob("[0-9]*/stat"):
            try:
                fields = path.read_text().rpartition(")")[2].split()  # from the state on: names may hold blanks
            except (FileNotFoundError, ProcessLookupError):
                continue  # it has ended
            if path.parent.name == str(os.getpid()) or int(fields[3]) in self.sessions:
                ours += sum(map(int, fields[11:15]))  # its own, and that of its children that have ended
        machine = user + nice + system + irq + softirq + steal
        return time.monotonic(), machine / tick, ours / tick
