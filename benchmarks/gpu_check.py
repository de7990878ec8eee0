"""make gpu-check: the parity suite and the operator benchmarks on a CUDA GPU, written to one JSON file.

    python benchmarks/gpu_check.py [--minutes M] [--only parity|benchmarks] [--out DIR] [--rehearse]

Needs torch, triton, numpy and pillow, and no network; see gpu_machine.py. Writes benchmarks/results/GPU-DATE.json,
whole at every instant, also when it is interrupted or out of time. Exits with 1 when parity or a measurement failed, 2
when the machine is unfit.
"""

import argparse
import datetime
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import gpu_parity
from gpu_machine import Unfit, check_given, prepare
from machine import ROOT, describe, name_of, slug, smi_state
from results import RESULTS, free_path

BEGINNINGS = 8  # of the process that times, after faults
LEAST_SECONDS = 20  # for it to be worth beginning
STEP = "step"  # step_jobs.STEP, which imports torch
WHY_9 = "long enough for everything on an H200, as estimated, not measured"
UNFIT, INTERRUPTED = 2, 130  # exit statuses
NOTES = [
    "ms, first_quartile and third_quartile are milliseconds a call over n samples of `calls` calls each",
    "method graph: replays of a CUDA graph of these calls; stream: launched one by one, launching included",
    "cold: the calls went in turn through `sets` sets of inputs, of which they read 128 MB or more together; not cold: "
    "one set, which the cache may hold. Outputs and what lies between two kernels of a call may stay in it either way",
    "served_by, of provider fastp2p: whose kernel it is, Triton's or the extension's, as the dispatcher knows it",
    "bytes: what the operation must move, so inputs, second reads included (norm_act: for the statistics, then to "
    "normalise), and outputs; input_bytes: distinct ones of a set of inputs, each once",
    "flop: of products, padding counted as pixels",
    "down, up, wgrad: the bare product, without epilogue; eager is cuDNN, channels_last, cudnn.benchmark, and for the "
    "decoder's forward pass includes the concatenation; wgrad writes float32, cuDNN bfloat16",
    "step: a whole training step; fastp2p's as one CUDA graph of its kernels, eager in float32 as upstream has it "
    "(with TF32 where PyTorch's default allows it), bytes those of Adam alone",
    "peak_mem_mib: what PyTorch's allocator had reserved at most in the first call, its inputs included",
    "fastp2p, best of candidates: the tile and SPLIT that were fastest here, of all in `tried`, each timed briefly",
]


class Report:
    """The results so far, rewritten on disk as they grow."""

    def __init__(self, path: Path, head: dict[str, Any]):
        self.path, self.content = path, head | {"rows": [], "errors": [], "not_timed": {}}
        self.written = 0.0

    def write(self, at_most_every_s: float = 0.0) -> None:
        from fastp2p.files import write_atomically

        if time.monotonic() - self.written >= at_most_every_s:
            write_atomically(self.path, json.dumps(self.content, indent=1).encode() + b"\n")
            self.written = time.monotonic()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=9.0, help=f"to end within (default 9: {WHY_9})")
    parser.add_argument(
        "--only", choices=["parity", "benchmarks"], help="one half; without parity nothing is vouched for"
    )
    parser.add_argument("--out", type=Path, help="folder of the JSON file (default benchmarks/results)")
    parser.add_argument("--rehearse", action="store_true", help="the same on the CPU, tiny, with interpreted kernels")
    workers = os.cpu_count() or 1
    parser.add_argument(
        "--workers", type=int, default=workers, help="processes that compile or test at once (default: one a core)"
    )
    args = parser.parse_args()
    begun = time.monotonic()
    signal.signal(signal.SIGTERM, _interrupt)
    site = None
    try:
        check_given(args.rehearse)
        env, site = prepare(needs_pytest=args.only != "benchmarks")
        return check(args, env, begun)
    except Unfit as error:
        print(f"gpu-check: {error}", file=sys.stderr)
        return UNFIT
    finally:
        if site is not None:
            shutil.rmtree(site, ignore_errors=True)


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def check(args: argparse.Namespace, env: dict[str, str], begun: float) -> int:
    sys.path.insert(0, str(ROOT))
    from fastp2p.ops import operators

    names = [name for name in operators() if not name.endswith("_backward")]
    env = (
        env | {"TRITON_INTERPRET": "1"} if args.rehearse else {k: v for k, v in env.items() if k != "TRITON_INTERPRET"}
    )
    head = {"rehearsal": args.rehearse, "complete": False, "date": datetime.datetime.now().astimezone().isoformat()}
    head |= describe(gpu=not args.rehearse) | {"load_average": os.getloadavg(), "notes": NOTES}
    head |= {"clocks": {"before": smi_state()}, "ceilings": None, "parity": None, "jobs_left_for_want_of_time": None}
    report = Report(_results_path(args, head), head)
    report.write()
    end = begun + args.minutes * 60
    try:
        with tempfile.TemporaryDirectory(prefix="fastp2p-gpu-check-") as folder:
            complete = True
            if args.only != "benchmarks":
                share = 1.0 if args.only == "parity" else 0.55
                until = begun + share * (end - begun)
                units = gpu_parity.list_units("cpu" if args.rehearse else "cuda", args.rehearse, Path(folder))
                try:
                    gpu_parity.run(units, env, args.workers, until)
                finally:
                    report.content["parity"] = gpu_parity.summarise(units, names)
                    report.write()
                complete = not any(unit.ended for unit in units)
            if args.only != "parity":
                to_time = _to_time(report, names, args.rehearse)
                complete &= benchmark(report, to_time, args, env, Path(folder), end - 5)
        report.content["complete"], interrupted = complete, False
    except KeyboardInterrupt:
        interrupted = True
    add_speedups(report.content["rows"])
    report.content["clocks"]["after"] = smi_state()
    report.content["seconds"] = round(time.monotonic() - begun, 1)
    report.write()
    print_table(report.content)
    print(f"\nwritten: {report.path}")
    if interrupted:
        return INTERRUPTED
    green = args.only == "benchmarks" or report.content["parity"]["green"]
    return 0 if green and not report.content["errors"] else 1


def _results_path(args: argparse.Namespace, head: dict[str, Any]) -> Path:
    """A name that is free: an earlier run of the day stays."""
    if args.out is None and args.rehearse:
        folder = Path(tempfile.mkdtemp(prefix="fastp2p-gpu-rehearsal-"))
    else:
        folder = args.out or RESULTS
    return free_path(folder, f"{'rehearsal' if args.rehearse else slug(head['gpu'])}-{head['date'][:10]}")


def _to_time(report: Report, names: list[str], rehearse: bool) -> list[str]:
    """The operators whose tests are green, and the step where all are. Why not, goes into the report."""
    if report.content["parity"] is None:
        return [*names, STEP]
    verdicts = report.content["parity"]["operators"]
    if rehearse:  # of which most operators' tests are left out
        verdicts = {name: "" if why.startswith("none") else why for name, why in verdicts.items()}
    report.content["not_timed"] = {name: why for name, why in verdicts.items() if why}
    for name, why in report.content["not_timed"].items():
        print(f"{name}: not timed: {why}", flush=True)
    timed = [name for name in names if not verdicts[name]]
    if len(timed) == len(names):
        timed.append(STEP)
    return timed


def benchmark(
    report: Report, operators: list[str], args: argparse.Namespace, env: dict[str, str], folder: Path, end: float
) -> bool:
    """Compile in many processes, then time in one; after a fault begin another for the rest. Whether all is done."""
    if not operators:
        return True
    done_file, done = folder / "done.json", []
    command = [sys.executable, str(ROOT / "benchmarks" / "gpu_rows.py"), "--operators", ",".join(operators)]
    command += ["--done", str(done_file)] + ["--rehearse"] * args.rehearse
    _compile(command, args, env, end)
    for _ in range(BEGINNINGS):
        done_file.write_text(json.dumps(done))
        seconds = end - time.monotonic()
        if seconds < LEAST_SECONDS:
            return False
        status, current = _time(report, [*command, "--seconds", f"{seconds - 10:.0f}"], env, done, seconds)
        if status == 0:
            return report.content["jobs_left_for_want_of_time"] == 0
        if current not in done:
            report.content["errors"].append({"job": current, "error": f"its process ended with status {status}"})
            done.append(current)
    return False


def _compile(command: list[str], args: argparse.Namespace, env: dict[str, str], end: float) -> None:
    """Fill the caches of Triton and inductor, within a third of the time."""
    seconds = (end - time.monotonic()) / 3
    workers = min(args.workers, 2) if args.rehearse else args.workers
    print(f"compiling in {workers} processes", flush=True)
    env = env | {"OMP_NUM_THREADS": "1", "TORCHINDUCTOR_COMPILE_THREADS": "1"}
    shards = [
        subprocess.Popen(
            [*command, "--seconds", f"{seconds:.0f}", "--shard", f"{i}/{workers}"], cwd=ROOT, env=env,
            stdout=subprocess.DEVNULL,
        )
        for i in range(1, workers + 1)
    ]  # fmt: skip
    limit = time.monotonic() + seconds + 15
    try:
        statuses = [shard.wait(timeout=max(0.1, limit - time.monotonic())) for shard in shards]
        if any(statuses):
            print(f"{sum(map(bool, statuses))} of {workers} compiling processes failed, as told above", flush=True)
    except subprocess.TimeoutExpired:
        print("compiling took too long; what is not compiled will be while it is timed", flush=True)
    finally:
        for shard in shards:
            shard.kill()
            shard.wait()


def _time(
    report: Report, command: list[str], env: dict[str, str], done: list[str], seconds: float
) -> tuple[int, str | None]:
    """Follow a timing process: its results into the report, its jobs into `done`. Returns its status and last job."""
    process = subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, text=True)
    timer = threading.Timer(seconds, process.kill)
    timer.start()
    content, current = report.content, None
    try:
        for line in process.stdout:
            if not line.startswith('{"'):
                print(line, end="")  # of a library
                continue
            message = json.loads(line)
            if "start" in message:
                current = message["start"]
            elif "ceilings" in message:
                content["ceilings"] = message["ceilings"]
                done.append("ceilings")
            elif "row" in message:
                row = message["row"]
                content["rows"].append(row)
                done.append(current)
                print(f"{current:<72} {row['ms']:10.4f} ms", flush=True)
            elif "failed" in message:
                content["errors"].append({"job": message["failed"], "error": message["error"]})
                done.append(current)
                print(f"{current}: {message['error'][:300]}", flush=True)
            elif "left" in message:
                content["jobs_left_for_want_of_time"] = message["left"]
            report.write(at_most_every_s=2)
        return process.wait(), current
    finally:
        timer.cancel()
        process.kill()
        process.wait()


def add_speedups(rows: list[dict[str, Any]]) -> None:
    """Into each row of a case that eager PyTorch has a time for: how many times as fast it is."""
    eager = {row["case"]: row["ms"] for row in rows if row["provider"] == "eager"}
    for row in rows:
        if row["case"] in eager:
            row["speedup_over_eager"] = round(eager[row["case"]] / row["ms"], 3)


def print_table(content: dict[str, Any]) -> None:
    """One line a case, in microseconds; in brackets the best of the candidates; rate and speed-up of our fastest."""
    result = content["parity"]
    print(f"\n{name_of(content)}, torch {content['versions']['torch']}, triton {content['versions']['triton']}")
    if result is None:
        print("parity: not run")
    else:
        print("parity:", ", ".join(f"{n} {what}" for what, n in result["total"].items()))
        for failure in result["failures"]:
            print(f"  {failure['test']}")
    if content["ceilings"]:
        print("ceilings: {bf16_tflops:.0f} TFLOP/s bf16, {copy_gb_per_s:.0f} GB/s copy".format(**content["ceilings"]))
    for name, why in content["not_timed"].items():
        print(f"{name}: not timed: {why}")
    if not content["complete"]:
        left = content["jobs_left_for_want_of_time"]
        print("not complete: interrupted or out of time" + (f", {left} measurements left" if left else ""))
    for error in content["errors"]:
        print(f"error in {error['job']}: {error['error'].strip().splitlines()[-1][:150]}")
    cases: dict[str, dict[str, dict[str, Any]]] = {}
    for row in content["rows"]:
        cases.setdefault(row["case"], {})[row["provider"]] = row
    if content["rehearsal"]:
        print("a rehearsal: its times mean nothing")
    if cases:
        print(f"{'µs':<38}{'eager':>9}{'compile':>9}{'ours':>9}{'(best)':>10} {'rate':>12}{'speed-up':>9}")
    for case, rows in cases.items():
        us = {provider: f"{row['ms'] * 1000:.1f}" for provider, row in rows.items()}
        ours = [row for provider, row in rows.items() if provider.startswith("fastp2p")]
        fastest = min(ours, key=lambda row: row["ms"], default={})
        rate = f"{fastest['tflops']:.1f} TFLOP/s" if fastest.get("tflops") else f"{fastest.get('gb_per_s', 0):.0f} GB/s"
        best = f"({us['fastp2p, best of candidates']})" if "fastp2p, best of candidates" in us else ""
        columns = f"{us.get('eager', ''):>9}{us.get('torch.compile', ''):>9}{us.get('fastp2p', ''):>9}{best:>10}"
        print(f"{case:<38}{columns} {rate:>12}{fastest.get('speedup_over_eager', ''):>9}")


if __name__ == "__main__":
    sys.exit(main())
