"""The official repository, from a checkout of it, beside ours: the same images, batch sizes and first weights.

    pytest benchmarks/bench_upstream.py --upstream DIR [--data DIR --direction BtoA]

DIR is a clone of pytorch-CycleGAN-and-pix2pix, which needs torchvision besides. Nothing of it is in this repository.
"""

from collections.abc import Iterator
from pathlib import Path

import pytest
from harness.contest import Row
from harness.epochs import PAIRS
from harness.providers import BATCHES
from harness.team import Team, Worker, bounds_of, contest, difference

NAME = "upstream"


@pytest.fixture(scope="module")
def upstream(pytestconfig: pytest.Config, rehearse: bool, request: pytest.FixtureRequest) -> Iterator[Worker]:
    checkout: Path | None = pytestconfig.getoption("upstream")
    if checkout is None:
        pytest.skip("needs --upstream DIR, a clone of pytorch-CycleGAN-and-pix2pix")
    if not (checkout / "models" / "pix2pix_model.py").is_file():
        pytest.fail(f"--upstream: got {checkout}, which has no models/pix2pix_model.py; expected a clone of "
                    "pytorch-CycleGAN-and-pix2pix")  # fmt: skip
    if rehearse:
        pytest.skip("the official U-Nets have no tiny size")
    pytest.importorskip("torchvision", reason="the official repository needs torchvision: pip install torchvision")
    team: Team = request.getfixturevalue("team")  # not begun where this is skipped
    worker = Worker(
        NAME, "upstream_worker", str(checkout.resolve()), "--device", team.device.type, "--scale", team.scale.name
    )
    yield worker
    worker.close()


@pytest.mark.parametrize("batch_size", BATCHES)
def bench_upstream(
    benchmark, upstream: Worker, team: Team, data: Path, pytestconfig: pytest.Config, tmp_path: Path, batch_size: int
):
    """Its loader and its optimize_parameters(), and our trainer's; what either prints and saves is left out."""
    weights = str(tmp_path / "weights.pt")
    expected = upstream.ask("check", batch=batch_size, data=str(data), weights=weights)
    ours = [name for name, provider in team.members.items() if provider.ours]
    for name in ours:
        got = team.workers[name].ask("check", what="step", batch=batch_size, weights=weights)
        wrong = difference(got, expected, bounds_of(team.members[name], "step", team.device))
        assert not wrong, f"{name} is wrong, so nothing is timed: {wrong}"

    workers = [upstream, *(team.workers[name] for name in ours)]
    request = {"batch": batch_size, "data": str(data), "direction": pytestconfig.getoption("direction")}
    try:
        prepared = {worker.name: worker.ask("prepare", what="epoch", **request) for worker in workers}
        rows: list[Row] = contest(benchmark, workers, prepared, ours[0], "epoch", batch_size,
                                  on_gpu=team.device.type == "cuda", quick=team.quick, images=PAIRS)  # fmt: skip
    finally:
        for worker in workers:
            worker.ask("release")
    for row in rows:
        row |= {
            "suite": "upstream",
            "case": f"upstream, batch {batch_size}",
            "what": f"{team.scale.describe('epoch')}, {data.name}",
        }
        row["settings"] = "as it is" if row["provider"] == NAME else team.members[row["provider"]].settings
    benchmark.extra_info["rows"] = rows
