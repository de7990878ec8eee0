"""A benchmark's results as its file holds them, with figures of a test's own."""

from typing import Any


def row(provider: str, ms: float, **facts: Any) -> dict[str, Any]:
    spread = {"first_quartile": ms * 0.95, "third_quartile": ms * 1.05, "n": 9, "strangers_cores": 0.0}
    step = {"suite": "step", "case": "step, batch 1", "what": "a step", "batch": 1, "img_per_sec": 1e3 / ms}
    about = {"ours": provider == "fastp2p bf16", "peak_mem_mib": 100.0, "first_s": 1.0}
    return {"provider": provider, "ms": ms} | spread | step | about | facts


def content(*rows: dict[str, Any], **facts: Any) -> dict[str, Any]:
    head = {"gpu": None, "cpu": "A CPU", "cpu_cores": 2, "versions": {"torch": "2.13"}, "rehearsal": False}
    return (
        head
        | {"date": "2026-11-20T12:00:00", "commit": "0123456789ab", "dirty": False, "left_out": {}, "rows": [*rows]}
        | facts
    )
