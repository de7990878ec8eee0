"""Rows of measurements: the tables to read after a run, and the JSON file that is kept."""

import datetime
import json
from pathlib import Path
from typing import Any

from harness.machine import TOLERATED_SHARE, describe, name_of

NOTES = [
    "ms, first_quartile and third_quartile are milliseconds a unit of work (a step, a batch of an epoch, a call) over "
    "n samples; providers took turns, each in a process of its own; an operator's in one process",
    "img_per_sec is of the median; s_per_epoch that many images of the data set at this speed",
    "first_s: the first unit of work, in which torch.compile compiles, cold but in --quick, and cuDNN is tried out",
    "peak_mem_mib: on a GPU what PyTorch's allocator had reserved at most; on a CPU the process's resident memory "
    "at its peak after the first unit of work, less what it was before the networks were made; what a compiler keeps "
    "in the process is in it, a loader's processes are not. Of an operator, what a call takes beyond its inputs",
    "strangers_cores: how many cores were busy with what is not ours, on average while it was measured",
    "tuned_convolutions: how many ours has a measured choice of kernel for on this machine (fastp2p tune); 0: by rule",
    "each provider's first step or output was compared with eager float32's before; another one that is off is not "
    "timed; ours is, and wrong says by how much it is off",
]

Row = dict[str, Any]


def head(*, gpu: bool, rehearsal: bool) -> Row:
    import torch

    from fastp2p.ops import kernel_choices

    facts = {"rehearsal": rehearsal, "date": datetime.datetime.now().astimezone().isoformat(timespec="seconds")}
    tuned = len(kernel_choices.read_cache(kernel_choices.place_of(torch.device("cuda" if gpu else "cpu"))))
    return facts | describe(gpu=gpu) | {"tuned_convolutions": tuned, "notes": NOTES}


def new_path(content: Row, folder: Path) -> Path:
    """MACHINE-DATE.json in the folder, which is made if need be; an earlier run of the day stays."""
    from fastp2p.environment import slug

    folder.mkdir(parents=True, exist_ok=True)
    stem = f"{slug(name_of(content))}-{content['date'][:10]}"
    names = (folder / f"{stem}{suffix}.json" for suffix in ["", *(f"-{i}" for i in range(2, 1000))])
    return next(path for path in names if not path.exists())


def save(content: Row, path: Path) -> None:
    """Write results; the file is whole at every instant."""
    from fastp2p.files import write_atomically

    write_atomically(path, json.dumps(content, indent=1).encode() + b"\n")


class Report:
    """Results that are rewritten on disk with each addition.

    Args:
        path: where they go; None to keep them in memory alone.
        content: what they begin with.
    """

    def __init__(self, path: Path | None, **content: Any):
        self.path, self.content = path, content
        self.set()

    def set(self, **content: Any) -> None:
        self.content |= content
        if self.path is not None:
            save(self.content, self.path)

    def row(self, **row: Any) -> None:
        self.content.setdefault("rows", []).append(row)
        self.set()


def tables(content: Row) -> list[str]:
    """Lines to print: a table of providers for each suite, one line a case for operators, and a verdict."""
    lines: list[str] = []
    rows = content["rows"]
    suites = dict.fromkeys(row["suite"] for row in rows)
    for suite in suites:
        mine = [row for row in rows if row["suite"] == suite]
        lines += ["", *(_providers_table(suite, mine) if "img_per_sec" in mine[0] else _cases_table(suite, mine))]
    lines += [f"left out: {name}: {why}" for name, why in content["left_out"].items()]
    if content["rehearsal"]:
        lines.append("a rehearsal: its times mean nothing")
    return lines + distrust(content)


def distrust(content: Row) -> list[str]:
    """What speaks against these figures."""
    tolerated = TOLERATED_SHARE * (content["cpu_cores"] or 1)
    busy = [row for row in content["rows"] if (row.get("strangers_cores") or 0.0) > tolerated]
    if not busy:
        return []
    most = max(row["strangers_cores"] for row in busy)
    cases = ", ".join(dict.fromkeys(row["case"] for row in busy))
    return [f"NOT TO BE TRUSTED: other programs kept up to {most:.1f} cores busy during {cases}"]


def _providers_table(suite: str, rows: list[Row]) -> list[str]:
    title = f"{suite}: {rows[0]['what']}"
    has_epochs = "s_per_epoch" in rows[0]
    lines = [title, f"{'batch':<7}{'provider':<31}{'ms':>10}{'quartiles':>20}{'img/s':>9}"
             + ("  s/epoch" if has_epochs else "") + f"{'ours is':>9}{'peak MiB':>10}{'first s':>9}"]  # fmt: skip
    for batch in dict.fromkeys(row["batch"] for row in rows):
        of_batch = [row for row in rows if row["batch"] == batch]
        ours = next(row for row in of_batch if row["ours"])
        for i, row in enumerate(sorted(of_batch, key=lambda row: -row["ms"])):
            spread = f"{row['first_quartile']:.2f} to {row['third_quartile']:.2f}"
            peak = "" if row["peak_mem_mib"] is None else f"{row['peak_mem_mib']:.0f}"
            epoch = f"{row['s_per_epoch']:9.1f}" if has_epochs else ""
            ratio = "" if row is ours or ours.get("wrong") else f"{row['ms'] / ours['ms']:.2f}x"
            lines.append(
                f"{batch if i == 0 else '':<7}{row['provider']:<31}{row['ms']:10.2f}{spread:>20}"
                f"{row['img_per_sec']:9.2f}{epoch}{ratio:>9}{peak:>10}{row['first_s']:9.1f}"
            )
        lines.append(_verdict(ours, of_batch))
    return lines


def _verdict(ours: Row, rows: list[Row]) -> str:
    """Whether ours is ahead, by medians, and whether quartiles overlap; no comparison where ours is wrong."""
    if ours.get("wrong"):
        return f"       {ours['provider']} is WRONG, so its time claims nothing: {ours['wrong']}"
    others = [row for row in rows if not row["provider"].startswith("fastp2p")]
    if not others:
        return f"       {ours['provider']}: nobody to compare with"
    best = min(others, key=lambda row: row["ms"])
    gap = best["ms"] / ours["ms"]
    apart = ours["third_quartile"] < best["first_quartile"] or best["third_quartile"] < ours["first_quartile"]
    clear = "" if apart else ", but their quartiles overlap"
    if gap <= 1:
        return f"       {ours['provider']} is BEHIND {best['provider']}, {gap:.2f}x{clear}"
    return f"       {ours['provider']} is ahead of all; of the next, {best['provider']}, by {gap:.2f}x{clear}"


def _cases_table(suite: str, rows: list[Row]) -> list[str]:
    columns = ("eager ms", 11), ("ours ms", 10), ("speed-up", 10), ("GB/s", 8), ("of copy", 9), ("peak MiB", 10)
    lines = [f"{suite}: {rows[0]['what']}"]
    lines.append(f"{'case':<44}{'dtype':<10}" + "".join(name.rjust(width) for name, width in columns))
    for case in dict.fromkeys((row["case"], row["dtype"]) for row in rows):
        by_provider = {row["provider"]: row for row in rows if (row["case"], row["dtype"]) == case}
        eager, ours = by_provider["eager"], by_provider["fastp2p"]
        moved = f"{ours['gb_per_sec']:8.1f}{ours['of_copy_bandwidth']:9.0%}" if "gb_per_sec" in ours else " " * 17
        peak = "" if ours["peak_mem_mib"] is None else f"{ours['peak_mem_mib']:10.1f}"
        lines.append(f"{case[0]:<44}{case[1]:<10}{eager['ms']:11.3f}{ours['ms']:10.3f}"
                     f"{eager['ms'] / ours['ms']:9.2f}x{moved}{peak}")  # fmt: skip
    return [*lines, "of copy: bytes that it must move, to copying 256 MB; in place, or in a cache, it can exceed 100 %"]
