"""Each call by which a run writes may fail or be its last: nothing is lost, and --resume comes to the same end."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

HELPERS = Path(__file__).resolve().parents[1] / "helpers"
PARTS = 2  # processes


@pytest.fixture(scope="module")
def shim(tmp_path_factory: pytest.TempPathFactory) -> Path:
    library = tmp_path_factory.mktemp("shim") / "failing_calls.so"
    compiler = os.environ.get("CC", "cc")
    subprocess.run(
        [compiler, "-shared", "-fPIC", "-O1", "-o", library, HELPERS / "failing_calls.c", "-ldl"], check=True
    )
    return library


def walk(mode: str, shim: Path, data: Path, root: Path) -> list[dict[str, Any]]:
    environment = os.environ | {"LD_PRELOAD": str(shim), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, HELPERS / "failing_writes.py", data, root, mode]
    options: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "env": environment}
    processes = [subprocess.Popen([*command, str(part), str(PARTS)], **options) for part in range(PARTS)]
    rows = []
    for process in processes:
        output, errors = process.communicate()
        assert process.returncode == 0, errors
        rows += [json.loads(line) for line in output.splitlines()]
    return rows


# What a run may end without, with a warning; where all calls fail, a temporary file cannot be deleted either
EXTRAS = ("panel", "losses.png", "leftovers")


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["kill", "ENOSPC", "EIO", "full"])
def test_every_call_that_writes_may_fail(mode: str, shim: Path, aligned: Path, tmp_path: Path):
    rows = walk(mode, shim, aligned, tmp_path)
    assert len(rows) > 100
    reason = {"ENOSPC": "No space left on device", "full": "No space left on device", "EIO": "Input/output error"}
    for row in rows:
        text = json.dumps(row, indent=1)
        assert "Traceback" not in row["said"] + row["resume said"], text
        assert row["resumed"] == 0, text
        if mode == "kill":
            assert row["status"] == -9, text
            assert row["differs"] == [], text
            continue
        assert row["status"] in (0, 1), text
        if row["status"] == 1:
            assert reason[mode] in row["said"], text
            assert str(tmp_path) in row["said"], text
            assert row["differs"] == [] or all(name.startswith("panel/") for name in row["differs"]), text
        else:
            lost = [name for name in row["at once"] if not name.startswith(EXTRAS)]
            assert lost == [], text
            assert row["at once"] == [] or "cannot be written" in row["said"], text
