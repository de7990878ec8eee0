"""Two files of results side by side: what became faster or slower, and by how much.

python benchmarks/compare.py BEFORE.json AFTER.json
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from harness.machine import name_of
from harness.results import distrust

Row = dict[str, Any]
SAME = 0.05  # quotients nearer to 1 are not called a change, nor are medians that lie in each other's quartiles


def compare(before: Row, after: Row) -> list[str]:
    """Lines to print."""
    lines = [f"{title}: {_describe(content)}" for title, content in (("before", before), ("after", after))]
    lines += [f"  {field}: {a} before, {b} after" for field, a, b in _differences(before, after)]
    rows = [{_key(row): row for row in content["rows"]} for content in (before, after)]
    shared = [key for key in rows[0] if key in rows[1]]
    if not shared:
        return [*lines, "no measurement is in both files"]
    width = max(len(_name(key)) for key in shared)
    lines.append(f"{'':<{width}}{'before ms':>12}{'after ms':>12}{'after is':>11}")
    for key in shared:
        a, b = rows[0][key], rows[1][key]
        lines.append(f"{_name(key):<{width}}{a['ms']:12.3f}{b['ms']:12.3f}{a['ms'] / b['ms']:10.2f}x{_word(a, b)}")
    for title, mine, other in (("before", rows[0], rows[1]), ("after", rows[1], rows[0])):
        lines += [f"{title} alone: {_name(key)}" for key in mine if key not in other]
    return lines + [f"{title}: {line}" for title, content in (("before", before), ("after", after))
                    for line in distrust(content)]  # fmt: skip


def _key(row: Row) -> tuple[str, ...]:
    return row["case"], row["provider"], row.get("dtype", ""), row.get("what", "")


def _name(key: tuple[str, ...]) -> str:
    return ", ".join(filter(None, key[:3]))


def _word(a: Row, b: Row) -> str:
    """Faster, slower, or nothing where the samples do not tell."""
    within = (
        a["first_quartile"] <= b["ms"] <= a["third_quartile"] or b["first_quartile"] <= a["ms"] <= b["third_quartile"]
    )
    if within or abs(a["ms"] / b["ms"] - 1) < SAME:
        return ""
    return "  faster" if b["ms"] < a["ms"] else "  SLOWER"


def _describe(content: Row) -> str:
    commit = f"{(content['commit'] or 'unknown')[:10]}{' and changes' if content['dirty'] else ''}"
    rehearsed = ", a rehearsal: its times mean nothing" if content["rehearsal"] else ""
    return f"{name_of(content)}, {content['date'][:16]}, commit {commit}{rehearsed}"


def _differences(before: Row, after: Row) -> list[tuple[str, object, object]]:
    """What differs in hardware and versions; nothing, where two figures are of the same machine."""
    pairs = [
        ("machine", name_of(before), name_of(after)),
    ]
    pairs += [(name, before.get(name), after.get(name)) for name in ("driver", "threads", "cpu_capability")]
    pairs += [(name, before["versions"].get(name), after["versions"].get(name)) for name in before["versions"]]
    return [(name, a, b) for name, a, b in pairs if a != b]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before", type=Path)
    parser.add_argument("after", type=Path)
    args = parser.parse_args()
    contents = []
    for path in (args.before, args.after):
        try:
            contents.append(json.loads(path.read_text()))
            for field in ("rows", "versions", "commit", "dirty", "date", "rehearsal", "cpu_cores"):
                contents[-1][field]
        except (OSError, ValueError, KeyError, TypeError) as error:
            print(f"compare: {path}: expected results of pytest benchmarks/ --out: {error!r}",
                  file=sys.stderr)  # fmt: skip
            return 2
    print("\n".join(compare(*contents)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
