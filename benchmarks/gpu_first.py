"""make gpu-first OUT=DIR: the whole evidence from a CUDA GPU in nine minutes, the most important first.

    python benchmarks/gpu_first.py --out DIR [--minutes M] [--data DIR] [--only STAGE ...] [--rehearse]

Needs no network: torch and triton are the machine's, the rest comes from .gpu-cache/ (make gpu-cache). Each stage is a
process of its own with a limit of its own, so a fault or a hang costs that stage alone. Each writes its results as they
grow, into at most eight files that are whole at every instant; first.json says which stages ended how. Exits with 1
when a stage failed, was stopped or found something wrong, 2 when the machine is unfit.
"""

import argparse
import contextlib
import ctypes
import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import gpu_cache
from harness.machine import ROOT
from harness.results import save, tables

BENCHMARKS = ROOT / "benchmarks"
GRACE_S = 3.0  # between asking a stage to end and killing it
RESERVE_S = 8.0  # for the last writes, within --minutes
POLL_S = 0.2
REWRITE_S = 2.0  # between two looks at what a running stage has written
UNFIT, INTERRUPTED = 2, 130  # exit statuses
ARTIFACTS_BYTES = 12 << 20  # at most, since what brings results back may refuse a large file
TAIL = 3000  # characters of a stage's output, kept in first.json
SLOW_TO_COMPILE = ("torch.compile", "torch.compile reduce-overhead", "torch.compile max-autotune")
LAYERS = "fastp2p layers"  # .gpu-cache/ lacks its programs

Content = dict[str, Any]


class Unfit(Exception):
    """The machine cannot do it; the message says what to do."""


@dataclass(frozen=True)
class Stage:
    """One process of the run."""

    name: str
    limit_s: float  # it is stopped after that
    command: tuple[str, ...]  # arguments of Python; the run fills in {file}, {work}, {data} and {seconds}
    file: str = ""  # in --out, that it writes; empty: what it writes becomes part of first.json
    interpreted: bool = False  # in a rehearsal Triton's interpreter serves it, else the C++ kernels do
    tuned: bool = False  # it uses, or makes, the kernels that the tuner has chosen; others go by rule


def _pytest(*args: str) -> tuple[str, ...]:
    return ("-m", "pytest", "-p", "no:cacheprovider", "-q", *args, "--out", "{file}")


def _own(stage: str, *args: str) -> tuple[str, ...]:
    return (str(BENCHMARKS / "gpu_stages.py"), stage, "--file", "{file}", *args)


def _step(*without: str) -> tuple[str, ...]:
    return _pytest("benchmarks/bench_step.py", *(word for name in without for word in ("--without", name)))


_TESTS = (str(BENCHMARKS / "gpu_tests.py"), "--file", "{file}", "--seconds", "{seconds}")
_TRAIN = _own("train", "--seconds", "{seconds}", "--data", "{data}", "--artifacts", "{work}/artifacts")
STAGES = (
    Stage("head", 25, _own("head")),
    Stage("warm", 60, _own("warm"), interpreted=True),
    Stage("parity", 60, _own("parity"), interpreted=True),
    Stage("times", 150, _step(*SLOW_TO_COMPILE, LAYERS), "times.json"),
    Stage("tuner", 100, _own("tuner"), "kernels.json", tuned=True),
    Stage("tuned", 90, _step(*SLOW_TO_COMPILE, LAYERS, "eager, every trick"), "tuned.json", tuned=True),
    Stage("profile", 60, _own("profile", "--artifacts", "{work}/artifacts"), "profile.json", tuned=True),
    Stage("tests", 150, _TESTS, "tests.json", interpreted=True),
    Stage("train", 75, _TRAIN, tuned=True),
    Stage("operators", 60, _pytest("benchmarks/ops", "--quick"), "operators.json"),
)
ARTIFACTS = "artifacts.zip"  # timelines, a run's panel and statistics, every stage's output


@dataclass
class Run:
    """The stages of one run, and what is known of them so far."""

    out: Path
    work: Path
    end: float  # time.monotonic() at which all must be written
    rehearse: bool
    data: str
    env: dict[str, str]
    content: Content = field(default_factory=dict)
    artifacts: dict[Path, float] = field(default_factory=dict)  # packed so far, with the time of their last change

    def write(self) -> None:
        save(self.content, self.out / "first.json")

    def run(self, stage: Stage) -> None:
        """Run a stage to its end, its limit or that of the whole run; keep what it has written in any case."""
        left = self.end - RESERVE_S - time.monotonic()
        limit = min(stage.limit_s, left - GRACE_S)
        told: Content = {"status": "not begun: out of time", "seconds": 0.0, "limit_s": round(limit, 1)}
        self.content["stages"][stage.name] = told
        if limit < 1:
            return
        embedded = self.work / f"{stage.name}.json"
        file = self.out / stage.file if stage.file else embedded
        log = self.work / "artifacts" / f"{stage.name}.log"
        places = {"file": file, "work": self.work, "data": self.data, "seconds": int(limit - GRACE_S)}
        command = [sys.executable, *(word.format(**places) for word in stage.command)]
        command += ["--rehearse"] * self.rehearse
        print(f"{stage.name}: at most {limit:.0f} s", flush=True)
        began = time.monotonic()
        with open(log, "wb") as output:
            process = subprocess.Popen(
                command, cwd=ROOT, env=self._env_of(stage), stdout=output, stderr=subprocess.STDOUT,
                start_new_session=True,
            )  # fmt: skip
            told |= {"status": "running", "pid": process.pid}
            self.write()
            try:
                stopped = self._wait(process, stage, embedded, began + limit)
            except KeyboardInterrupt:
                told |= {"status": "interrupted", "seconds": round(time.monotonic() - began, 1)}
                raise
            finally:
                _kill(process, signal.SIGKILL)  # whatever it has begun, too
                process.wait()
                del told["pid"]
        status = process.returncode
        ended = "stopped at its limit" if stopped else "done" if status == 0 else f"ended with status {status}"
        told |= {"status": ended, "seconds": round(time.monotonic() - began, 1)}
        text = log.read_text(errors="replace")
        told["output"] = text[-TAIL:]
        self._take_in(stage, embedded)
        self.pack()
        self.write()
        print(text[-TAIL:] if status or stopped else "", f"{stage.name}: {ended}, {told['seconds']} s", flush=True)

    def _wait(self, process: "subprocess.Popen[bytes]", stage: Stage, embedded: Path, until: float) -> bool:
        """Whether it had to be stopped."""
        looked = time.monotonic()
        while process.poll() is None:
            if time.monotonic() > until:
                _kill(process, signal.SIGTERM)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(timeout=GRACE_S)
                return True
            if time.monotonic() - looked > REWRITE_S:
                self._take_in(stage, embedded)
                self.write()
                looked = time.monotonic()
            time.sleep(POLL_S)
        return False

    def _take_in(self, stage: Stage, embedded: Path) -> None:
        """What a stage without a file of its own has written, into first.json."""
        if not stage.file and embedded.exists():
            self.content["stages"][stage.name]["results"] = json.loads(embedded.read_text())

    def _env_of(self, stage: Stage) -> dict[str, str]:
        env = dict(self.env)
        env.pop("TRITON_INTERPRET", None)
        if self.rehearse and stage.interpreted:
            env["TRITON_INTERPRET"] = "1"
        choices = self.work / ("tuned" if stage.tuned else "by-rule")
        return env | {"FASTP2P_CACHE": str(choices), "PYTHONUNBUFFERED": "1"}

    def pack(self) -> None:
        """All artifacts so far, into one file."""
        files = {path: path.stat().st_mtime for path in sorted((self.work / "artifacts").rglob("*")) if path.is_file()}
        if files == self.artifacts:
            return
        self.artifacts = files
        temporary = self.work / ARTIFACTS
        left_out = {}
        with zipfile.ZipFile(temporary, "w", zipfile.ZIP_DEFLATED) as archive:
            for path in sorted(files, key=lambda path: path.stat().st_size):
                name, size = str(path.relative_to(self.work / "artifacts")), path.stat().st_size
                packed = sum(info.compress_size for info in archive.infolist())
                if packed + size > ARTIFACTS_BYTES:  # were it not compressed at all
                    left_out[name] = size
                else:
                    archive.write(path, name)
        if left_out:
            self.content["artifacts_left_out"] = left_out  # with their bytes
        # Not os.replace: the work folder may lie on another disk
        beside = self.out / f".{ARTIFACTS}"
        beside.write_bytes(temporary.read_bytes())
        os.replace(beside, self.out / ARTIFACTS)


def _kill(process: "subprocess.Popen[bytes]", number: int) -> None:
    """Signal a stage and all that it has begun."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, number)


def main() -> int:
    names = [stage.name for stage in STAGES]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for the results")
    parser.add_argument("--minutes", type=_minutes, default=9.0, help="it ends within; default 9")
    parser.add_argument("--data", default="builtin:emoji", help="pairs to train on, label photos as B; facades, say")
    parser.add_argument("--only", nargs="+", choices=names, default=names, metavar="STAGE", help=", ".join(names))
    parser.add_argument(
        "--limit", nargs="+", type=_limit, default=[], metavar="STAGE=SECONDS", help="instead of its own"
    )
    parser.add_argument("--rehearse", action="store_true", help="every stage on a CPU, tiny: times mean nothing")
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, _interrupt)
    end = time.monotonic() + args.minutes * 60
    with tempfile.TemporaryDirectory(prefix="fastp2p-gpu-first-") as work:
        try:
            return first_minutes(args, Path(work), end)
        except (Unfit, gpu_cache.Stale) as error:
            print(f"gpu-first: {error}", file=sys.stderr)
            return UNFIT


def _minutes(text: str) -> float:
    """A number above 0."""
    if not text.replace(".", "", 1).isdigit() or float(text) == 0:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected a number of minutes above 0, such as 9")
    return float(text)


def _limit(text: str) -> tuple[str, float]:
    """STAGE=SECONDS."""
    name, _, seconds = text.partition("=")
    if name not in {stage.name for stage in STAGES} or not seconds.replace(".", "", 1).isdigit():
        raise argparse.ArgumentTypeError(
            f"got {text!r}, expected the name of a stage, =, and seconds, such as tests=60"
        )
    return name, float(seconds)


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def first_minutes(args: argparse.Namespace, work: Path, end: float) -> int:
    data = args.data if args.data.startswith("builtin:") else str(Path(args.data).resolve())
    if data != args.data and not Path(data).exists():
        raise Unfit(
            f"--data: got {args.data}, which is not there; expected a folder or .zip of pairs, or builtin:emoji"
        )
    try:
        args.out.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=args.out).close()
    except OSError as error:
        raise Unfit(f"--out: cannot write to {args.out}: {error}; choose another folder") from error
    if not args.rehearse:
        _find_gpu()
    (work / "artifacts").mkdir()
    run = Run(args.out.resolve(), work, end, args.rehearse, data, _environment(work, args.rehearse))
    run.content = {"rehearsal": args.rehearse, "complete": False, "minutes": args.minutes, "stages": {}}
    interrupted, limits = False, dict(args.limit)
    try:
        for stage in STAGES:
            if stage.name in args.only:
                run.run(replace(stage, limit_s=limits.get(stage.name, stage.limit_s)))
        run.content["complete"] = all(told["status"] == "done" for told in run.content["stages"].values())
    except KeyboardInterrupt:
        interrupted = True
    run.pack()
    run.content["seconds"] = round(time.monotonic() - (end - args.minutes * 60), 1)
    run.write()
    for line in report(run.content, run.out):
        print(line)
    return INTERRUPTED if interrupted else 0 if run.content["complete"] else 1


def _find_gpu() -> None:
    """Ask the driver itself, since importing PyTorch takes seconds. Raises Unfit where there is none."""
    try:
        error = ctypes.CDLL("libcuda.so.1").cuInit(0)
    except OSError:
        raise Unfit("no CUDA driver (libcuda.so.1) on this machine; --rehearse runs every stage on a CPU") from None
    if error:
        raise Unfit(f"no CUDA GPU: the driver's cuInit gives error {error}; --rehearse runs every stage on a CPU")


def _environment(work: Path, rehearse: bool) -> dict[str, str]:
    """Variables for the stages: where fastp2p is, and what is compiled already."""
    env = dict(os.environ)
    if rehearse:
        if importlib.util.find_spec("fastp2p") is None:
            raise Unfit(f"{sys.executable} lacks fastp2p; make gpu-rehearse takes the floor's Python (make floor)")
        paths = [str(BENCHMARKS), str(BENCHMARKS / "ops"), *filter(None, [env.get("PYTHONPATH")])]
        env["PYTHONPATH"] = os.pathsep.join(paths)
    else:
        missing = [name for name in ("torch", "triton", "numpy") if importlib.util.find_spec(name) is None]
        if missing:
            raise Unfit(f"{sys.executable} lacks {', '.join(missing)}; choose another Python with PYTHON=...")
        env |= gpu_cache.unpack(gpu_cache.FOLDER, work / "cache")
        sys.path += env["PYTHONPATH"].split(os.pathsep)  # this process writes files by it, too
    return env


def report(content: Content, out: Path) -> Iterator[str]:
    """What came of it, to read. No time of ours is compared with another's unless the parity stage is green."""
    parity = content["stages"].get("parity", {})
    results = parity.get("results", {})
    wrong = "" if parity.get("status") == "done" and results.get("green") else "the parity stage is not green"
    for row in results.get("rows", []):
        yield f"parity: {'ok   ' if row['ok'] else 'WRONG'} {row['what']}: {row['found']}"
    for name in ("times.json", "tuned.json", "operators.json"):
        if (out / name).exists():
            measured = json.loads((out / name).read_text())
            for row in measured["rows"]:
                if row.get("ours"):
                    row["wrong"] = row.get("wrong") or wrong
            yield ""
            yield f"== {name}"
            yield from tables(measured)
    yield ""
    for name, told in content["stages"].items():
        yield f"{name:<10} {told['status']}, {told['seconds']} s"
    if content["rehearsal"]:
        yield "a rehearsal: its times mean nothing"
    yield f"written: {out}"


if __name__ == "__main__":
    sys.exit(main())
