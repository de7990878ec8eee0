"""A picture of throughput by batch size and provider.

python benchmarks/plot.py RESULTS.json [PICTURE.png]
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from harness.machine import name_of

SUITES = {"step": "training step", "epoch": "epoch, data included", "inference": "inference"}


def plot(content: dict[str, Any], path: Path) -> Path | None:
    """Bars of img/s for each suite that has them; None where there are none."""
    rows = [row for row in content["rows"] if row.get("suite") in SUITES]
    if not rows:
        return None
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    suites = [suite for suite in SUITES if any(row["suite"] == suite for row in rows)]
    names = list(dict.fromkeys(row["provider"] for row in rows))
    colors = {name: plt.cm.Greys(0.3 + 0.4 * i / len(names)) for i, name in enumerate(names)}
    ours = [name for name in names if name.startswith("fastp2p")]
    colors |= {name: plt.cm.Oranges(0.75 - 0.25 * i) for i, name in enumerate(ours)}
    figure, axes = plt.subplots(1, len(suites), figsize=(5 * len(suites) + 2, 4), squeeze=False, layout="constrained")
    for axis, suite in zip(axes[0], suites, strict=True):
        mine = [row for row in rows if row["suite"] == suite]
        batches = sorted({row["batch"] for row in mine})
        providers = [name for name in names if any(row["provider"] == name for row in mine)]
        width = 0.8 / len(providers)
        for row in mine:
            x = batches.index(row["batch"]) + (providers.index(row["provider"]) - (len(providers) - 1) / 2) * width
            speed, fastest, slowest = (
                row["batch"] * 1e3 / row[key] for key in ("ms", "first_quartile", "third_quartile")
            )
            axis.bar(x, speed, width * 0.92, color=colors[row["provider"]], label=row["provider"],
                     yerr=[[speed - slowest], [fastest - speed]], ecolor="black", capsize=2)  # fmt: skip
        axis.set_xticks(range(len(batches)), [f"batch {batch}" for batch in batches])
        axis.set_title(SUITES[suite])
        axis.set_ylabel("img/s (median, quartiles)")
        axis.set_ylim(bottom=0)
        axis.spines[["top", "right"]].set_visible(False)
    handles = {
        label: handle for axis in axes[0] for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)
    }
    figure.legend(handles.values(), handles.keys(), loc="outside right center", frameon=False)
    rehearsed = ", a rehearsal" if content.get("rehearsal") else ""
    figure.suptitle(f"{name_of(content)}, torch {content['versions']['torch']}, {content['date'][:10]}{rehearsed}")
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return path


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path)
    parser.add_argument("picture", type=Path, nargs="?", help="default: the same name, .png")
    args = parser.parse_args()
    try:
        content = json.loads(args.results.read_text())
    except (OSError, ValueError) as error:
        print(f"plot: {args.results}: expected results of pytest benchmarks/ --out: {error}", file=sys.stderr)
        return 2
    written = plot(content, args.picture or args.results.with_suffix(".png"))
    print(f"{args.results}: no row has a throughput" if written is None else written)
    return int(written is None)


if __name__ == "__main__":
    sys.exit(main())
