"""What the stages of gpu_first.py do, one a process: each writes its results as they grow.

python benchmarks/gpu_stages.py head|warm|parity|profile|tuner|train --file FILE [--rehearse] ...
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from harness.machine import describe, smi_state
from harness.providers import EAGER, OTHERS, PAPER, TINY, Provider, Scale, engine_step, our_provider, training
from harness.results import Report
from harness.stopwatch import quartiles
from harness.team import FLOAT32, HALF, difference, relative_distance
from harness.worker import images, moments
from torch._C._autograd import DeviceType
from torch.profiler import ProfilerActivity

from fastp2p.commands.info import info
from fastp2p.commands.measure import Spread, Workload
from fastp2p.commands.profile import profile_step
from fastp2p.commands.tune import tune_networks
from fastp2p.count.ceilings import measure_ceilings
from fastp2p.data import Crops
from fastp2p.engine import GraphedStep
from fastp2p.models.pix2pix.options import Pix2PixConfig
from fastp2p.ops import kernel_choices

Content = dict[str, Any]
PRECISIONS = ("bf16", "fp16", "fp32")
STEPS = 3  # that ours and autograd are compared over; a graph is captured in the fourth
REPLAYS = 5  # profiled, of a graph
ADAM = {"lr": 2e-4, "betas": (0.5, 0.999)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    stages = {"head": head, "warm": warm, "once": once, "parity": parity, "profile": profile, "tuner": tuner,
              "train": train}  # fmt: skip
    parser.add_argument("stage", choices=stages)
    parser.add_argument("--file", type=Path, required=True, help="JSON, whole at every instant")
    parser.add_argument("--rehearse", action="store_true", help="tiny, on the CPU")
    parser.add_argument("--artifacts", type=Path, help="folder for what is no JSON")
    parser.add_argument("--data", default="builtin:emoji", help="of train")
    parser.add_argument("--seconds", type=float, help="for train to end within")
    parser.add_argument("--batch", type=int, help="of once")
    parser.add_argument("--precision", choices=PRECISIONS, help="of once")
    args = parser.parse_args()
    args.device = torch.device("cpu" if args.rehearse else "cuda")
    args.scale = TINY if args.rehearse else PAPER
    return stages[args.stage](args)


def head(args: argparse.Namespace) -> int:
    """Versions, clocks, who serves which operator, and what the machine can do."""
    report = Report(args.file, **describe(gpu=not args.rehearse), clocks=[smi_state()], info=info())
    report.set(ceilings=vars(measure_ceilings(args.device, torch.bfloat16)))
    report.content["clocks"].append(smi_state())
    report.set()
    return 0


def warm(args: argparse.Namespace) -> int:
    """The step once in each precision and batch size, in processes at once: what the carried cache lacks compiles."""
    report = Report(args.file)
    cases = [("fp32", 1)] if args.rehearse else [(p, batch) for batch in (1, 4, 16, 64) for p in PRECISIONS]
    command = [sys.executable, __file__, "once", *["--rehearse"] * args.rehearse]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    files = {case: args.file.with_name(f"once-{case[0]}-{case[1]}.json") for case in cases}
    processes = {
        (precision, batch): subprocess.Popen(
            [*command, "--precision", precision, "--batch", str(batch), "--file", str(file)],
            env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for (precision, batch), file in files.items()
    }  # fmt: skip
    failed = 0
    for (precision, batch), process in processes.items():
        output = process.communicate()[0]
        failed += process.returncode != 0
        file = files[precision, batch]
        found = json.loads(file.read_text()) if file.exists() else {}
        report.row(precision=precision, batch=batch, status=process.returncode, **found)
        if process.returncode:
            print(f"{precision}, batch {batch}: status {process.returncode}\n{output[-3000:]}", flush=True)
    return 1 if failed else 0


def once(args: argparse.Namespace) -> int:
    """Two steps; how long they took, and how many programs Triton compiled for them."""
    report, began = Report(args.file), time.perf_counter()
    compiled = _count_compiled()
    provider, nets = our_provider(args.precision, args.device), args.scale.networks(dropout=True)
    step = training(provider, nets, args.device, args.scale).step
    (real_A, real_B), *_ = images(args.scale, args.batch, args.device, torch.channels_last)
    seconds = []
    for _ in range(2):  # fewer than go before the capture of a graph
        losses = [float(loss) for loss in step(real_A, real_B)]
        seconds.append(round(time.perf_counter() - began, 2))
        report.set(seconds=seconds, losses=losses, compiled=dict(compiled))
    return 0


def _count_compiled() -> Counter[str]:
    """Counts, by kernel, what Triton compiles from now on because no cache has it."""
    import triton

    compiled: Counter[str] = Counter()
    if hasattr(triton, "knobs") and hasattr(triton.knobs.compilation, "listener"):

        def listen(*, src: Any, cache_hit: bool, **_: Any) -> None:
            if not cache_hit:
                compiled[src.name] += 1

        triton.knobs.compilation.listener = listen
    return compiled


def parity(args: argparse.Namespace) -> int:
    """Three fused steps against autograd's in float32, TF32 off; then the CUDA graph against the ordinary step."""
    report = Report(args.file, green=False, rows=[])
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    faults = 0
    for batch in (1,) if args.rehearse else (1, 4):  # interpreted kernels take seconds a step
        expected = _three_steps(EAGER, args, batch)
        autocast = next(p for p in OTHERS if p.amp)
        others = [] if args.rehearse else [autocast]  # to see how far off PyTorch's own half precision is
        precisions = ("fp32",) if args.rehearse else ("fp32", "bf16", "fp16")
        mine = [our_provider(precision, args.device) for precision in precisions]
        for provider in (*mine, *others):
            got = _three_steps(provider, args, batch)
            bounds = FLOAT32 if provider.precision == "fp32" else HALF
            found = {
                name: float(f"{relative_distance(got[name], expected[name], each=name.endswith('losses')):.3g}")
                for name in expected
            }
            ok = not difference(got, expected, bounds)
            faults += provider.ours and not ok
            what = f"three steps, {provider.name}, batch {batch}"
            report.row(what=what, ok=ok, found=found, bounds=bounds)
            print(what, "ok" if ok else "WRONG", found, flush=True)
    if args.device.type == "cuda":
        for precision in ("bf16", "fp32", "fp16"):
            found = _graph_is_the_step(args.scale, our_provider(precision, args.device), args.device)
            faults += bool(found)
            report.row(what=f"graph, {precision}, batches of 1 and 4 in one pool", ok=not found, found=found or "equal")
            print(report.content["rows"][-1], flush=True)
    else:
        report.row(what="graph", ok=True, found="not looked at: needs a CUDA GPU")
    report.set(green=not faults)
    return 1 if faults else 0


def _three_steps(provider: Provider, args: argparse.Namespace, batch: int) -> dict[str, list[float]]:
    """Losses of the first step and of the last, and both networks' gradients in the first."""
    device, scale = args.device, args.scale
    step, nets, optimizers = training(provider, scale.networks(dropout=False), device, scale)
    torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic = False, True
    pairs = images(scale, batch, device, torch.channels_last)
    result: dict[str, list[float]] = {"losses": [float(loss) for loss in step(*pairs[0])]}
    result |= moments(nets, optimizers)
    for pair in pairs[1:STEPS]:
        result["later losses"] = [float(loss) for loss in step(*pair)]
    return result


def _graph_is_the_step(scale: Scale, provider: Provider, device: torch.device) -> str:
    """What differs between a GraphedStep and the ordinary step, with dropout; empty if not a bit does."""
    players = [[net.to(device) for net in scale.networks(dropout=True)] for _ in range(2)]
    adams = [[torch.optim.Adam(net.parameters(), **ADAM) for net in nets] for nets in players]
    ordinary, other = (engine_step(provider, *each, scale) for each in zip(players, adams, strict=True))
    graphed = GraphedStep(other)
    random = torch.Generator().manual_seed(0)
    side = scale.load_size
    pairs = torch.randint(256, (8, side, side, 6), dtype=torch.uint8, generator=random).to(device)
    for number in range(16):
        n = 4 if number % 2 else 1
        index = torch.randint(8, (n,), generator=random)
        offset = torch.randint(side - scale.size + 1, (n, 2), generator=random)
        flip = torch.rand(n, generator=random) < 0.5
        crops = Crops(pairs, index.to(device), offset.to(device), flip.to(device), scale.size, 3)
        expected, got = (tuple(x.values()) for x in (ordinary.train(crops.cut(device)), graphed(crops)))
        if not torch.equal(torch.stack(expected), torch.stack(got)):
            return f"losses of step {number}, batch {n}: {[*map(float, got)]}, expected {[*map(float, expected)]}"
    for net, (one, two) in enumerate(zip(*players, strict=True)):
        for name, value in one.state_dict().items():
            if not torch.equal(value, two.state_dict()[name]):
                return f"net {net}: {name} after 16 steps"
    return ""


def profile(args: argparse.Namespace) -> int:
    """Where the time of a replay goes, kernel by kernel in order, and of an ordinary step, call by call."""
    choices = kernel_choices.read_cache(kernel_choices.place_of(args.device))
    report = Report(args.file, tuned_convolutions=len(choices))  # 0: by rule
    batches = (1, 4) if args.rehearse else (1, 16)
    for batch in batches:
        workload = Workload(_config(args, batch))
        workload.warm_up()
        found: Content = {"step": vars(Spread.of(workload.seconds(50)))}
        report.set(**{f"batch {batch}": found})
        if args.device.type == "cuda":
            report.set(**{f"batch {batch}": found | _replayed(workload)})
        del workload
    for batch in batches:
        trace = args.artifacts / f"trace-batch-{batch}.json.gz"
        result = profile_step(_config(args, batch), trace=trace, steps=3, overwrite=True)
        report.set(**{f"calls, batch {batch}": result.as_dict()})
        print(result.table(), flush=True)
    return 0


def _replayed(workload: Workload) -> Content:
    """Some replays of a step's graph: sums by kernel, and every kernel of the last replay in order.

    A kernel is [name, stream, microseconds from the first one's start, microseconds].
    """
    with torch.profiler.profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        for _ in range(REPLAYS):
            workload.trained(workload.crops)
        torch.cuda.synchronize()
    events = sorted(
        (e for e in profiler.events() if e.device_type == DeviceType.CUDA), key=lambda e: e.time_range.start
    )
    spans = [(e.name, e.device_resource_id, e.time_range.start, e.time_range.elapsed_us()) for e in events]
    sums: dict[str, list[float]] = {}
    for name, _, _, us in spans:
        of_name = sums.setdefault(name, [0, 0.0])
        of_name[0] += 1 / REPLAYS
        of_name[1] += us / REPLAYS
    last = spans[-(len(spans) // REPLAYS) :]
    first = last[0][2] if last else 0.0
    by_kernel = [[name, round(calls, 2), round(us, 2)] for name, (calls, us) in sums.items()]
    return {
        "nodes": len(spans) / REPLAYS,
        "by_kernel": sorted(by_kernel, key=lambda row: -row[2]),
        "last": [[name, stream, round(start - first, 2), round(us, 2)] for name, stream, start, us in last],
    }


def tuner(args: argparse.Namespace) -> int:
    """Which kernel is the fastest for each convolution, at each batch size that is timed."""
    report = Report(args.file)
    for batch in (1,) if args.rehearse else (1, 4, 16, 64):
        began = time.perf_counter()
        table = tune_networks(_config(args, batch), again=False)
        place = kernel_choices.place_of(args.device)
        path = kernel_choices.cache_path(place)
        assert path is not None, "the stages run with FASTP2P_CACHE"
        measured = json.loads(path.read_text())
        report.set(
            **{f"batch {batch}": {"seconds": round(time.perf_counter() - began, 1), "table": table.splitlines()}}
        )
        report.set(measured=measured)
        print(table, flush=True)
    return 0


def _config(args: argparse.Namespace, batch: int) -> Pix2PixConfig:
    """The paper's networks; in a rehearsal small ones."""
    precision = "fp32" if args.rehearse else "bf16"
    return Pix2PixConfig(batch_size=batch, precision=precision, device=args.device.type, **args.scale.options)


def train(args: argparse.Namespace) -> int:
    """fastp2p train as a user runs it, as long as there is time: throughput, and the scores of validation."""
    folder = args.artifacts / "run"
    limit_s = args.seconds - 30  # for two Pythons to start, the tuner where it has not been, the last scores and files
    report = Report(args.file)
    command = [sys.executable, "-P", "-m", "fastp2p", "train", "--data", args.data, "--out", str(folder)]
    command += ["--max-minutes", f"{max(1.0, limit_s) / 60:.3f}", "--seed", "0"]
    if args.data != "builtin:emoji":
        command += ["--direction", "BtoA"]
    if args.rehearse:
        command += ["--device", "cpu", "--netG", "unet_32", "--ngf", "4", "--ndf", "4", "--netD", "pixel"]
        command += ["--load-size", "36", "--crop-size", "32", "--max-steps", "20"]
    began = time.perf_counter()
    done = subprocess.run(command, cwd=args.artifacts, capture_output=True, text=True)
    report.set(command=command[3:], status=done.returncode, seconds=round(time.perf_counter() - began, 1))
    report.set(stdout=done.stdout[-4000:], stderr=done.stderr[-4000:])
    print(done.stdout[-2000:], done.stderr[-2000:], flush=True)
    statistics = folder / "stats.jsonl"
    if statistics.exists():
        report.set(**_summary([json.loads(line) for line in statistics.read_text().splitlines()]))
    # The weights have 200 MB each, and old panels, which TensorBoard's events hold too, are many: they stay there
    many = ("checkpoint.pt", "*.safetensors", "panel/*", "tensorboard/*")
    for path in (path for pattern in many for path in folder.glob(pattern)):
        path.unlink()
    return done.returncode


def _summary(lines: Sequence[Content]) -> Content:
    """The last line of each kind, and the spread of throughput."""
    speeds = [line["img_per_sec"] for line in lines if "img_per_sec" in line]
    scores = [line for line in lines if "val_L1" in line]
    return {
        "lines": len(lines),
        "last": lines[-1:],
        "scores": scores[-3:],
        "img_per_sec": [*quartiles(speeds)] if speeds else None,
    }


if __name__ == "__main__":
    sys.exit(main())
