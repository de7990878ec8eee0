"""The tests of operators, layers and the engine on a GPU, by many pytest processes at once; results as each one ends.

    python benchmarks/gpu_tests.py --file FILE --seconds S [--rehearse]

Most of their time goes into compiling kernels, one core each, and a kernel's fault ends its process: so every file runs
in processes of its own, several at a time.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ET
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness.machine import ROOT
from harness.results import save

SHARDS = 4  # parts of each file of operator tests
MOST_FAILURES, MOST_CHARACTERS = 100, 4000  # kept in the results: of failures, and of each one's text


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--file", type=Path, required=True, help="JSON, whole at every instant")
    parser.add_argument("--seconds", type=float, required=True, help="what runs longer is stopped and counted")
    parser.add_argument("--rehearse", action="store_true", help="a few tests, on the CPU")
    args = parser.parse_args()
    end = time.monotonic() + args.seconds
    with tempfile.TemporaryDirectory(prefix="fastp2p-gpu-tests-") as folder:
        units = list_units("cpu" if args.rehearse else "cuda", args.rehearse, Path(folder))
        run(units, os.cpu_count() or 1, end, lambda: save(summarise(units), args.file))
        return 0 if summarise(units)["green"] else 1


@dataclass
class Unit:
    """A part of a test file's tests, and the process that runs it."""

    file: Path
    shard: str
    options: list[str]
    xml: Path
    log: Path
    process: subprocess.Popen[bytes] | None = None
    ended: str = "not begun: out of time"  # empty when it ran to its end

    @property
    def name(self) -> str:
        return f"{self.file.relative_to(ROOT)} {self.shard}"

    def start(self, threads: int) -> None:
        command = [sys.executable, "-m", "pytest", str(self.file), "--shard", self.shard, "-m", "not slow", "-q"]
        command += ["--no-header", "-p", "no:cacheprovider", f"--junitxml={self.xml}", *self.options]
        env = os.environ | {"OMP_NUM_THREADS": str(threads)}
        with open(self.log, "wb") as log:
            self.process = subprocess.Popen(command, cwd=ROOT, env=env, stdout=log, stderr=subprocess.STDOUT)

    def finish(self, ended: str = "") -> None:
        status = self.process.returncode
        text = self.log.read_text(errors="replace")
        if not ended and status not in (0, 1, 5):  # all passed, some failed, none in this shard
            ended = f"pytest ended with status {status}: {text.strip()[-MOST_CHARACTERS:]}"
        self.ended = ended
        last = text.strip().splitlines()[-1:] or [""]
        print(f"{self.name:<48} {ended[:200] or last[0]}", flush=True)
        if status == 1:
            print(text[-3000:], flush=True)


def run(units: list[Unit], workers: int, end: float, tell: Callable[[], object]) -> None:
    """Run them, so many at once, until they are done or time.monotonic() is `end`; tell when one has ended."""
    waiting, running = list(units), []
    threads = max(1, (os.cpu_count() or 1) // workers)
    tell()
    try:
        while waiting or running:
            while waiting and len(running) < workers and time.monotonic() < end:
                running.append(waiting.pop(0))
                running[-1].start(threads)
            for unit in [unit for unit in running if unit.process.poll() is not None]:
                running.remove(unit)
                unit.finish()
                tell()
            if time.monotonic() > end:
                break
            time.sleep(0.05)
    finally:
        for unit in running:
            unit.process.kill()
            unit.process.wait()
            unit.finish("stopped before its end")
        tell()


def list_units(device: str, rehearse: bool, folder: Path) -> list[Unit]:
    """The suite, in parts; a folder for their reports."""
    options = ["--device", device]
    files = dict.fromkeys(sorted((ROOT / "tests" / "ops").glob("test_*.py")), SHARDS)
    for name in ("nn", "engine"):
        files |= dict.fromkeys(sorted((ROOT / "tests" / name).glob("test_*.py")), 1)
    files[ROOT / "tests" / "tuner" / "test_contest.py"] = 1
    if rehearse:
        files = {ROOT / "tests" / "ops" / f"test_{name}.py": 2 for name in ("adam", "on_gpu")}
        options += ["-k", "bad_input or every_operator or slices or bits"]
    # The largest first, so that none is left running alone at the end
    shards = [(path, i, n) for path, n in files.items() for i in range(1, n + 1)]
    shards.sort(key=lambda shard: -shard[0].stat().st_size / shard[2])
    stems = [folder / f"{path.parent.name}-{path.stem}-{i}" for path, i, _ in shards]
    return [
        Unit(path, f"{i}/{n}", options, stem.with_suffix(".xml"), stem.with_suffix(".log"))
        for (path, i, n), stem in zip(shards, stems, strict=True)
    ]


def summarise(units: list[Unit]) -> dict[str, Any]:
    """Counts in all and by file, and failures with their text."""
    files: dict[str, Counter[str]] = {}
    failures = []
    for unit in units:
        counts = files.setdefault(str(unit.file.relative_to(ROOT)), Counter(passed=0, failed=0, skipped=0))
        for name, outcome, text in _outcomes(unit.xml):
            counts[outcome] += 1
            if outcome == "failed":
                failures.append({"test": f"{unit.file.name}::{name}", "text": text[-MOST_CHARACTERS:]})
        if unit.ended:
            counts["unfinished"] += 1
            failures.append({"test": unit.name, "text": unit.ended})
    total = sum(files.values(), Counter(passed=0, failed=0, skipped=0))
    return {
        "green": not failures and total["passed"] > 0,
        "total": total,
        "files": files,
        "failures": failures[:MOST_FAILURES],
    }


def _outcomes(xml: Path) -> list[tuple[str, str, str]]:
    """(name, passed or failed or skipped, text) of each test in a JUnit file; none where it was never written."""
    if not xml.exists():
        return []
    outcomes = []
    for case in ET.parse(xml).iter("testcase"):
        faults = [child for child in case if child.tag in ("failure", "error")]
        text = "\n".join(f"{child.get('message', '')}\n{child.text or ''}" for child in faults)
        outcome = "failed" if faults else "skipped" if case.find("skipped") is not None else "passed"
        outcomes.append((case.get("name", ""), outcome, text))
    return outcomes


if __name__ == "__main__":
    sys.exit(main())
