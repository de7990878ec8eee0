"""The table that compares, after pytest-benchmark's own."""

import os
from typing import Any

import pytest


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    session = getattr(config, "_benchmarksession", None)
    rows = [b.extra_info for b in session.benchmarks if "speed_up" in b.extra_info] if session else []
    if not rows:
        return
    write = terminalreporter.write_line
    terminalreporter.section("eager float32 (as upstream) and fastp2p, alternating")
    columns = ("batch", 5), ("eager ms", 11), ("ours ms", 10), ("speed-up", 10), ("GB/s", 8), ("of copy", 9)
    write(f"{'part':<36}{'dtype':<10}" + "".join(name.rjust(width) for name, width in columns))
    for row in rows:
        moved = f"{row['gb_per_sec']:8.1f}{row['of_copy_bandwidth']:9.0%}" if "gb_per_sec" in row else ""
        write(
            f"{row['part']:<36}{row['dtype']:<10}{row['batch']:>5}{row['eager_ms']:11.3f}{row['ours_ms']:10.3f}"
            f"{row['speed_up']:9.2f}x{moved}"
        )
    write("of copy: bytes that the part must move, against copying 256 MB; a part that works in place can exceed 100 %")
    busiest, cores = max(row["load_average"] for row in rows), os.cpu_count() or 1
    if busiest > cores:
        write(f"not to be trusted: load average {busiest:.1f} on {cores} cores, so something else ran as well")
