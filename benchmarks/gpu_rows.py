"""The device's side of gpu_check.py: does the jobs that are left and prints each result as a line of JSON.

A process of its own, since a kernel's fault takes the CUDA context with it: gpu_check.py then starts another for the
rest. With --shard it times nothing but compiles its share, so that many processes fill Triton's and inductor's caches.
"""

import argparse
import contextlib
import json
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from fastp2p.kernels.candidates import CANNOT
from gemm_jobs import gemm_jobs, wgrad_adam_jobs
from jobs import BEST, COMPILED, OURS, Config, Job
from peak_memory import Peak
from pointwise_jobs import pointwise_jobs
from step_jobs import STEP, step_jobs
from timing import COLD_BYTES, Timing, input_sets, measure

from fastp2p.ops import served_by

SEARCH_SECONDS = 0.02  # for each configuration


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rehearse", action="store_true", help="tiny shapes on the CPU")
    parser.add_argument("--operators", required=True, help="those to time, by commas")
    parser.add_argument("--done", type=Path, required=True, help="a JSON list of what is not to be done again")
    parser.add_argument("--seconds", type=float, required=True, help="after which no job is begun")
    parser.add_argument("--shard", help="I/N: compile every N-th configuration, from the I-th, and time none")
    args = parser.parse_args()

    device = torch.device("cpu" if args.rehearse else "cuda")
    end = time.monotonic() + args.seconds
    torch.set_default_device(device)
    torch.manual_seed(0)
    torch.backends.cudnn.benchmark = True
    # No job runs on the default stream: autograd replays a forward pass's stream, and no capture may touch the default
    with torch.cuda.stream(torch.cuda.Stream()) if device.type == "cuda" else contextlib.nullcontext():
        jobs = list_jobs(device, args.rehearse, set(args.operators.split(",")))
        if args.shard:
            compile_share(jobs, args.shard, end)
        else:
            do_jobs(jobs, json.loads(args.done.read_text()), device, end)


def list_jobs(device: torch.device, rehearse: bool, operators: set[str]) -> list[Job]:
    """What is known to be quick first, then torch.compile's, then the search for the best configurations."""
    jobs = [*step_jobs(device, rehearse), *pointwise_jobs(rehearse)]
    jobs += [*gemm_jobs(device, rehearse), *wgrad_adam_jobs(rehearse)]
    order = {COMPILED: 1, BEST: 2}
    return sorted((job for job in jobs if job.operator in operators), key=lambda job: order.get(job.provider, 0))


def do_jobs(jobs: list[Job], done: list[str], device: torch.device, end: float) -> None:
    if "ceilings" not in done:
        say(start="ceilings")
        say(ceilings=ceilings(device))
    left = [job for job in jobs if job.name not in done]
    for i, job in enumerate(left):
        if time.monotonic() > end:
            say(left=len(left) - i)
            return
        say(start=job.name)
        try:
            say(row=do(job, device, end))
        except Exception as error:  # into the results, and the end: a fault may spoil what comes after it
            say(failed=job.name, error=f"{type(error).__name__}: {error}"[:2000])
            raise
    say(left=0)


def do(job: Job, device: torch.device, end: float) -> dict[str, Any]:
    """Time a job; of several configurations each briefly, then the best."""
    peak = Peak(device)
    peak.begin()
    runners = [job.make()]
    runners[0](None)
    peak_mem_mib = peak.mib()
    sets = input_sets(job.input_bytes, device)
    runners += [job.make() for _ in range(sets - 1)]

    def timed(config: Config | None, seconds: float) -> Timing:
        calls = [partial(runner, config) for runner in runners]
        return measure(calls, device, capturable=job.capturable, seconds=seconds)

    config, tried = None, []
    for candidate in job.configs:
        try:
            tried.append({"config": candidate, "ms": timed(candidate, SEARCH_SECONDS).ms})
        except CANNOT as error:
            tried.append({"config": candidate, "error": f"{type(error).__name__}: {error}"[:200]})
        if time.monotonic() > end:
            break
    if job.configs:
        able = [candidate for candidate in tried if "ms" in candidate]
        if not able:
            raise RuntimeError(f"none of {len(tried)} configurations runs; the first: {tried[0]['error']}")
        config = min(able, key=lambda candidate: candidate["ms"])["config"]
    timing = timed(config, 0.15)
    row = {"case": job.case, "operator": job.operator, "provider": job.provider, **job.facts, **vars(timing)}
    if job.provider == OURS and job.operator != STEP:
        row["served_by"] = served_by(job.operator, device.type)
    row |= {"peak_mem_mib": peak_mem_mib, "sets": sets, "cold": sets * job.input_bytes >= COLD_BYTES}
    row |= {"bytes": job.n_bytes, "input_bytes": job.input_bytes, "flop": job.flop}
    row |= {"gb_per_s": job.n_bytes / timing.ms / 1e6, "tflops": job.flop / timing.ms / 1e9 or None}
    return row | ({"config": config, "tried": tried, "candidates": len(job.configs)} if job.configs else {})


def compile_share(jobs: list[Job], shard: str, end: float) -> None:
    """Call each of this shard's (job, configuration) once. What fails here fails again when it is timed."""
    first, every = (int(number) for number in shard.split("/"))
    jobs = [job for job in jobs if job.provider in (OURS, COMPILED, BEST)]
    calls = [(job, config) for job in jobs for config in job.configs or [None]]
    mine = calls[first - 1 :: every]
    for job, config in mine:
        if time.monotonic() > end:
            return
        with contextlib.suppress(*CANNOT):  # said when it is timed
            job.make()(config)
            if torch.cuda.is_initialized():
                torch.cuda.synchronize()


def ceilings(device: torch.device) -> dict[str, Any]:
    """What the machine can do: a large product of random bfloat16 matrices, and a copy (bytes read and written)."""
    side, n_bytes = (8192, 1 << 31) if device.type == "cuda" else (256, 1 << 20)
    a, b = (torch.randn(side, side, dtype=torch.bfloat16) for _ in range(2))
    product = measure([lambda: a @ b], device)
    source = torch.randint(0, 256, (n_bytes,), dtype=torch.uint8)
    target = torch.empty_like(source)
    copy = measure([lambda: target.copy_(source)], device)
    return {
        "bf16_tflops": 2 * side**3 / product.ms / 1e9,
        "copy_gb_per_s": 2 * n_bytes / copy.ms / 1e6,
        "matmul": {"side": side, **vars(product)},
        "copy": {"bytes": n_bytes, **vars(copy)},
    }


def say(**message: Any) -> None:
    print(json.dumps(message), flush=True)


if __name__ == "__main__":
    main()
