"""What the nodes of a CUDA graph cost on this GPU, and what could take their place: for a step of many small kernels.

    python benchmarks/graph_latency.py [--out FILE]

Each row is one graph, replayed:

- a chain of kernels that wait for one another, with and without programmatic dependent launch (PDL);
- two such chains side by side;
- kernels that read weights, before they wait or after;
- sums merged by a second kernel or by the last program to arrive;
- a barrier across the whole grid in place of a kernel's end.

The script checks each result. It exits with 1 when one is wrong, and with 2 where no GPU has PDL.
"""

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import triton
import triton.language as tl
from harness.machine import describe
from harness.results import Report, Row
from harness.stopwatch import elapsed_ms, quartiles
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from fastp2p.engine.graph import Graphed, joined

NODES = 256
REPLAYS = 50
Spread = tuple[float, float, float]  # quartiles of a replay's microseconds
WEIGHT_PROGRAMS, WEIGHT_COLUMNS, WEIGHT_KIB = 264, 128, (8, 32, 64)


@triton.jit
def add_one(x, PDL: tl.constexpr, BLOCK: tl.constexpr):
    """x[i] += 1."""
    at = x + tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    tl.store(at, tl.load(at) + 1)


@triton.jit
def add_weights(x, weights, ROWS: tl.constexpr, COLUMNS: tl.constexpr, WAIT: tl.constexpr):
    """x[p] += the sum of program p's weights; WAIT: where it waits for x's last writer."""
    program = tl.program_id(0)
    at = weights + program * ROWS * COLUMNS + tl.arange(0, ROWS)[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    if WAIT != "none":
        gdc_launch_dependents()
    if WAIT == "first":
        gdc_wait()
    total = tl.sum(tl.sum(tl.load(at).to(tl.float32), 0), 0)
    if WAIT == "after the weights":
        gdc_wait()
    tl.store(x + program, tl.load(x + program) + total)


@triton.jit
def sum_rows(x, parts, BLOCK: tl.constexpr, C: tl.constexpr):
    """The sums of BLOCK rows of x into parts[program]."""
    program = tl.program_id(0)
    columns = tl.arange(0, C)
    rows = program * BLOCK + tl.arange(0, BLOCK)
    tl.store(parts + program * C + columns, tl.sum(tl.load(x + rows[:, None] * C + columns[None, :]), 0))


@triton.jit
def merge(parts, y, PROGRAMS, BLOCK: tl.constexpr, C: tl.constexpr):
    """y = the sum of all parts, in an order that depends on nothing."""
    columns = tl.arange(0, C)
    total = tl.zeros([BLOCK, C], tl.float32)
    for start in range(0, PROGRAMS, BLOCK):
        rows = start + tl.arange(0, BLOCK)
        at = parts + rows[:, None] * C + columns[None, :]
        total += tl.load(at, mask=rows[:, None] < PROGRAMS, other=0.0, cache_modifier=".cg")
    tl.store(y + columns, tl.sum(total, 0))


@triton.jit
def sum_rows_and_merge(x, parts, y, counter, PROGRAMS, BLOCK: tl.constexpr, C: tl.constexpr):
    """sum_rows, then merge by the last program to arrive, in the same order."""
    sum_rows(x, parts, BLOCK, C)
    tl.debug_barrier()
    if tl.atomic_add(counter, 1, sem="acq_rel") == PROGRAMS - 1:
        merge(parts, y, PROGRAMS, BLOCK, C)
        tl.store(counter, 0)


@triton.jit
def barriers(x, counter, ROUNDS, PROGRAMS):
    """ROUNDS times: x[program, round + 1] = x[the next program, round] + 1, with a barrier of all programs between."""
    program = tl.program_id(0)
    neighbour = (program + 1) % PROGRAMS
    for i in range(ROUNDS):
        value = tl.load(x + i * PROGRAMS + neighbour, cache_modifier=".cg") + 1
        tl.store(x + (i + 1) * PROGRAMS + program, value)
        tl.debug_barrier()
        arrived = tl.atomic_add(counter, 1, sem="acq_rel") + 1
        while arrived < (i + 1) * PROGRAMS:
            arrived = tl.atomic_add(counter, 0, sem="acquire")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="JSON, rewritten with each row")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        parser.exit(2, "graph_latency: PyTorch finds no CUDA GPU here\n")
    if torch.cuda.get_device_capability() < (9, 0):
        name = torch.cuda.get_device_name()
        parser.exit(2, f"graph_latency: {name} has no programmatic dependent launch; an H100 or newer has it\n")
    report = Report(args.out, **describe(gpu=True), replays=REPLAYS, rows=[])
    for row in rows():
        report.row(**row)
        print(json.dumps(row), flush=True)
    wrong = [row for row in report.content["rows"] if not row["ok"]]
    for row in wrong:
        print(f"graph_latency: wrong result: {json.dumps(row)}", file=sys.stderr)
    return 1 if wrong else 0


def rows() -> Iterator[Row]:
    processors = torch.cuda.get_device_properties().multi_processor_count
    for programs in (1, 16, 132, 528):
        for pdl in (False, True):
            yield chain(programs, pdl)
    yield copies()
    for programs in (1, 132):
        yield two_chains(programs)
    for kib in WEIGHT_KIB:
        for wait in ("none", "first", "after the weights"):
            yield weights(kib, wait)
    for programs in (16, 64, 256, 1024):
        for last in (False, True):
            yield sums(programs, last)
    for programs in (16, processors):  # a program without a processor would never arrive
        yield barrier(programs)


def replayed(record: Callable[[], None], reset: Callable[[], object]) -> Spread:
    """Quartiles of a replay's microseconds; `record` queues the work, `reset` puts its state back.

    The main chain's stream has the priority of a branch's, unlike a step's: what is measured is their nodes alone.
    """
    graph = Graphed(record, stream=torch.cuda.Stream(), warm_up=1)
    samples = []
    with joined(graph.stream):
        graph()  # compiles
        for _ in range(REPLAYS + 5):
            reset()
            samples.append(elapsed_ms(graph, graph.stream.device, hide_launch=True) * 1e3)
    return quartiles(samples[5:])


def as_row(what: str, spread: Spread, nodes: int, ok: bool, **more: Any) -> Row:
    us = [round(value / nodes, 3) for value in spread]
    return {"what": what, **more, "nodes": nodes, "us_a_node": us[1], "quartiles": [us[0], us[2]], "ok": ok}


def chain(programs: int, pdl: bool) -> Row:
    x = torch.zeros(programs * 128, device="cuda")

    def record() -> None:
        for _ in range(NODES):
            add_one[programs,](x, PDL=pdl, BLOCK=128, num_warps=4, launch_pdl=pdl)

    spread = replayed(record, x.zero_)
    return as_row("chain", spread, NODES, bool((x == NODES).all()), programs=programs, pdl=pdl)


def copies() -> Row:
    """What copy_ of 512 bytes between two buffers costs: a memcpy node."""
    x, y = torch.ones(128, device="cuda"), torch.zeros(128, device="cuda")

    def record() -> None:
        for _ in range(NODES // 2):
            y.copy_(x)
            x.copy_(y)

    return as_row("chain of copies", replayed(record, x.zero_), NODES, bool((y == 0).all()))


def two_chains(programs: int) -> Row:
    """NODES on the main stream and NODES on a branch. us_a_node is one branch's: a chain's, if both run at once."""
    x, y = torch.zeros(2, programs * 128, device="cuda")
    branch = torch.cuda.Stream()

    def record() -> None:
        main = torch.cuda.current_stream()
        branch.wait_stream(main)
        for _ in range(NODES):
            add_one[programs,](x, PDL=False, BLOCK=128, num_warps=4)
            with torch.cuda.stream(branch):
                add_one[programs,](y, PDL=False, BLOCK=128, num_warps=4)
        main.wait_stream(branch)

    spread = replayed(record, lambda: (x.zero_(), y.zero_()))
    ok = bool((x == NODES).all() and (y == NODES).all())
    return as_row("two chains", spread, NODES, ok, programs=programs)


def weights(kib: int, wait: str) -> Row:
    """A chain of kernels of 264 programs, each of which reads that many KiB of bfloat16 weights of its own."""
    programs, columns, nodes = WEIGHT_PROGRAMS, WEIGHT_COLUMNS, weight_nodes()
    shape = (nodes, programs, kib * 1024 // 2 // columns, columns)
    w = torch.randint(-1, 2, shape, dtype=torch.int8, device="cuda").to(torch.bfloat16)
    x = torch.zeros(programs, device="cuda")

    def record() -> None:
        for layer in w:
            add_weights[programs,](
                x, layer, ROWS=shape[2], COLUMNS=columns, WAIT=wait, num_warps=8, launch_pdl=wait != "none"
            )

    spread = replayed(record, x.zero_)
    ok = torch.equal(x, w.sum((0, 2, 3), dtype=torch.float32))  # whole numbers below 2^24: exact in any order
    mib = w[0].nbytes / 2**20
    rate = round(w.nbytes / spread[1] * 1e-3)
    return as_row("weights", spread, nodes, ok, mib_a_node=mib, wait=wait, gb_per_s=rate)


def weight_nodes() -> int:
    """How many nodes read weights: twice the L2 cache in all at the smallest size, and as many at each."""
    l2 = torch.cuda.get_device_properties().L2_cache_size
    return -(-2 * l2 // (WEIGHT_PROGRAMS * min(WEIGHT_KIB) * 1024))


def sums(programs: int, last: bool) -> Row:
    """Sums of 64 channels over programs x 32 rows, 64 times one after the other.

    us_a_node is of one sum: of one kernel where the last program to arrive merges, of two where a second kernel does.
    """
    block, c = 32, 64
    x = torch.randint(-8, 8, (programs * block, c), device="cuda").float()
    parts, y = torch.empty(programs, c, device="cuda"), torch.empty(c, device="cuda")
    counter = torch.zeros(1, dtype=torch.int32, device="cuda")
    sizes = {"BLOCK": block, "C": c}

    def record() -> None:
        for _ in range(64):
            if last:
                sum_rows_and_merge[programs,](x, parts, y, counter, programs, **sizes)
            else:
                sum_rows[programs,](x, parts, **sizes)
                merge[1,](parts, y, programs, **sizes)

    spread = replayed(record, lambda: (parts.fill_(torch.nan), y.fill_(torch.nan)))
    ok = torch.equal(y, x.sum(0)) and int(counter) == 0
    return as_row("sums", spread, 64, ok, programs=programs, by="the last to arrive" if last else "a second kernel")


def barrier(programs: int) -> Row:
    """Rounds of one kernel that has a processor for each program; us_a_node is of one round."""
    rounds = 200
    x = torch.zeros(rounds + 1, programs, device="cuda")
    counter = torch.zeros(1, dtype=torch.int32, device="cuda")

    def reset() -> Tensor:
        counter.zero_()
        return x.zero_()

    def record() -> None:
        barriers[programs,](x, counter, rounds, programs)

    spread = replayed(record, reset)
    return as_row("barrier in a kernel", spread, rounds, bool((x[-1] == rounds).all()), programs=programs)


if __name__ == "__main__":
    sys.exit(main())
