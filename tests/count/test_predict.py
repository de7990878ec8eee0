"""Predicted times: each term by hand, the machine code that they go by, and the path through a step."""

from typing import Any

import pytest

from fastp2p.count import predict as model
from fastp2p.count.ceilings import Ceilings
from fastp2p.count.launches import MAIN, Launch
from fastp2p.count.predict import GPUS, LATENCY, MERGE, NODE, predict, predict_step

compile_check = pytest.importorskip("fastp2p.kernels.compile_check", reason="needs triton")
CEILINGS = Ceilings("a GPU", 800e12, 4e12)
TILE = {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 64, "num_warps": 4, "num_stages": 4, "SPLIT": 1}


def launch(kernel: str = "conv._conv_kernel", **told: Any) -> Launch:
    nothing: dict[str, Any] = {"part": "", "name": "", "operator": "", "flop": 0, "chain": MAIN, "depth": 1}
    counts: dict[str, Any] = {"programs": 1, "iterations": 1, "merges": 0, "n_bytes": 0, "after": ()}
    return Launch(kernel=kernel, **nothing | counts | {"config": {}, "gathers": False, "sums": False} | told)


def test_a_launch_that_does_next_to_nothing_takes_a_node():
    assert predict(launch("aten::add", programs=None, iterations=None, merges=None), CEILINGS).total == NODE


def test_bytes_and_merges_come_on_top():
    found = predict(launch("norm_act._norm_act_kernel", programs=1000, merges=2, n_bytes=4_000_000), CEILINGS)
    assert found.total == pytest.approx(NODE + 1e-6 + 2 * MERGE)
    assert found.bound_by == "node"


def test_few_programs_do_not_reach_the_memory_s_rate():
    found = predict(launch("norm_act._norm_act_kernel", programs=2, n_bytes=4_000_000), CEILINGS)
    assert found.total == pytest.approx(NODE + 4e6 / (2 * model.LOADED_PER_SEC))
    assert found.bound_by == "bytes"


def test_a_lone_program_waits_for_each_block():
    """Three loads are under way. A product of 64 cubed, and 68 + 4 x 20 + 4 x 7 instructions of each of 4 warps."""
    block = LATENCY / 3 + 64**3 / (400e12 / 132) + (68 + 80 + 28) / 1.755e9
    found = predict(launch(config=TILE, iterations=10), CEILINGS)
    assert found.total == pytest.approx(NODE + 10 * block)
    assert found.bound_by == "serial"


def test_programs_of_a_processor_share_it():
    """A processor holds three such programs: 4000 of them are ten waves of 396, and one of 40."""
    busy = predict(launch(config=TILE, iterations=10, programs=4000), CEILINGS)
    loads = (10 * 3 + 1) * 10 * 128 * 64 * 2 / model.LOADED_PER_SEC
    assert busy.work["loads"] == pytest.approx(loads)
    assert busy.work["serial"] > loads
    assert busy.total < 1.1 * (NODE + loads)


def test_sums_after_a_product_take_time_of_their_own():
    """64 x 64 elements over 128 threads are 32 each; 4000 programs are eleven waves, and one is the last to arrive."""
    for programs, waves in ((1, 1), (4000, 11)):
        told: dict[str, Any] = {"config": TILE, "iterations": 10, "programs": programs}
        plain, summed = (predict(launch(**told, sums=sums), CEILINGS) for sums in (False, True))
        assert summed.work["serial"] - plain.work["serial"] == pytest.approx(waves * 32 * model.SUMS)
        assert summed.merges - plain.merges == pytest.approx(model.LAST)


def test_elements_gathered_one_by_one_take_longer():
    tile = TILE | {"BLOCK_K": 32, "num_stages": 3}
    whole, single = (predict(launch(config=tile, programs=512, gathers=gathers), CEILINGS) for gathers in (False, True))
    assert single.total - NODE > 1.5 * (whole.total - NODE)


def test_adam_after_a_product_reads_more_slowly_than_a_copy():
    told: dict[str, Any] = {"config": TILE, "programs": 2048, "n_bytes": 200_000_000}
    adam = predict(launch("conv_wgrad_adam._conv_wgrad_adam_kernel", **told), CEILINGS)
    alone = predict(launch("conv_wgrad._conv_wgrad_kernel", **told), CEILINGS)
    assert adam.total == pytest.approx(NODE + 2e8 / model.ADAM_PER_SEC)
    assert alone.total == pytest.approx(NODE + 2e8 / 4e12)


def test_a_step_is_its_longest_path():
    """The second and third launch wait for the first, side by side; the fourth waits for both."""
    sizes, after = (4_000_000, 40_000_000, 8_000_000, 4_000_000), ((), (0,), (0,), (2, 1))
    found = [
        launch("adam._adam_kernel", programs=1000, n_bytes=n, after=a, flop=10**9)
        for n, a in zip(sizes, after, strict=True)
    ]
    step = predict_step(found, CEILINGS)
    assert step.on_path == [0, 1, 3]
    assert step.path == step.total == pytest.approx(3 * NODE + 12e-6)
    assert step.bytes == pytest.approx(14e-6)
    assert step.matrix == pytest.approx(5e-6)
    assert step.bound_by == "path"
    terms = {name: seconds for name, seconds in step.terms().items() if seconds}
    assert terms == pytest.approx({"bytes": 12e-6, "node": 3 * NODE})


def test_a_step_takes_no_less_than_its_bytes():
    """Side by side, as many launches as fill the memory's rate."""
    found = [launch("adam._adam_kernel", programs=1000, n_bytes=40_000_000) for _ in range(10)]
    step = predict_step(found, CEILINGS)
    assert step.bound_by == "bytes"
    assert step.total == pytest.approx(100e-6)
    assert predict_step([], CEILINGS).total == 0


# Kernel and layer of compile_check's cases -> the tile's (M, N, K), its warps
COMPILED = {
    "conv e4 bf16": [(64, 64, 64), (16, 64, 64)],
    "conv e1 bf16": [(64, 64, 32)],
    "conv_transpose d4 bf16": [(64, 64, 64)],
    "conv_wgrad e4 bf16": [(64, 64, 64), (32, 64, 64)],
}


def test_instructions_and_programs_are_those_of_the_machine_code():
    """Within a quarter: the formula knows a tile's sizes, not what the compiler makes of each layer."""
    cases = {case.name: case for case in compile_check.all_cases() if case.name in COMPILED}
    chosen = [
        (case, next(c for c in case.configs if tile == tuple(c[f"BLOCK_{side}"] for side in "MNK")), 90, True)
        for name, case in cases.items()
        for tile in COMPILED[name]
    ]
    assert len(chosen) == 6
    for (case, config, *_), row in zip(chosen, compile_check.compile_programs(chosen), strict=True):
        kernel = f"{case.kernel.fn.__module__.rpartition('.')[2]}.{case.kernel.fn.__name__}"
        told = launch(kernel, config=config, gathers=not config.get("WHOLE_BLOCKS", True))
        loop = row.loops[0]
        assert model.instructions(told) == pytest.approx(loop.instructions / loop.blocks(config), rel=0.25), row
        assert abs(model._held(told) - row.programs) <= 1, row


def test_the_gpus_are_those_of_the_count():
    from fastp2p.kernels.ahead import H100

    assert set(GPUS) == {"H100", "H200"}
    assert (H100.capability, H100.processors) == (model.CAPABILITY, model.PROCESSORS)
