"""Two calls in this process in turn: eager PyTorch and one of our operators, after their results were compared."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from harness.contest import take_turns
from harness.peak_memory import Peak
from harness.stopwatch import elapsed_ms

EAGER, OURS = "eager", "fastp2p"
SAMPLE_SECONDS = 0.02  # at least, so that neither the clock nor a hiccup of the system weighs much


@dataclass(frozen=True)
class Caller:
    """A contestant that is called here: an operator is too short to be asked for over a pipe."""

    name: str
    call: Callable[[], object]
    device: torch.device
    session: int | None = None  # none but this one

    def sample(self, calls: int) -> float:
        return elapsed_ms(self.call, self.device, calls=calls) / calls


def compare_calls(
    benchmark: Any,
    case: str,
    *,
    suite: str,
    eager: Callable[[], object],
    ours: Callable[[], object],
    check: Callable[[], None],
    device: torch.device,
    dtype: torch.dtype,
    rounds: int,
    n_bytes: int = 0,
    copy_gb_per_sec: float | None = None,
    **facts: Any,
) -> None:
    """Time two ways to do the same; the rows go into pytest-benchmark's extra_info.

    Args:
        case: what is done, such as "conv e4, batch 1".
        suite: which table it belongs to.
        eager, ours: do it once.
        check: raises AssertionError when ours has another result; called first.
        dtype: ours.
        n_bytes: that ours must move; 0 where it is arithmetic that counts.
        copy_gb_per_sec: of this machine.
        facts: for the rows.
    """
    check()
    callers = [Caller(EAGER, eager, device), Caller(OURS, ours, device)]
    peaks, calls = {}, {}
    for caller in callers:
        caller.sample(1)  # compiles, chooses, allocates
        peak = Peak(device)
        peak.begin()
        once = caller.sample(1)
        peaks[caller.name] = peak.mib()
        calls[caller.name] = max(1, round(SAMPLE_SECONDS * 1e3 / once))
    samples = take_turns(benchmark, callers, OURS, rounds=rounds, calls=calls)
    rows = samples.rows(suite=suite, case=case, dtype=str(dtype).removeprefix("torch."), **facts)
    for row in rows:
        row |= {"peak_mem_mib": peaks[row["provider"]], "calls": calls[row["provider"]]}
        if n_bytes and row["provider"] == OURS:
            row["gb_per_sec"] = n_bytes / row["ms"] / 1e6
            row["of_copy_bandwidth"] = row["gb_per_sec"] / copy_gb_per_sec if copy_gb_per_sec else None
    benchmark.extra_info["rows"] = rows
