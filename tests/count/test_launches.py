"""The launches that are counted are those that are made, and a step has no more of them than it had."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastp2p.count.cost import count_step
from fastp2p.count.launches import MAIN, Launch, LaunchCount, count_launches
from fastp2p.engine.branch import Branch
from fastp2p.engine.layers import LayersStep
from fastp2p.errors import InputError
from fastp2p.models.pix2pix.networks import PatchDiscriminator, UnetGenerator
from fastp2p.models.pix2pix.step import FusedStep

ahead = pytest.importorskip("fastp2p.kernels.ahead", reason="needs triton")
done = pytest.importorskip("helpers.launches_done", reason="needs triton")
launch_facts = pytest.importorskip("fastp2p.kernels.launch_facts")
launches = pytest.importorskip("fastp2p.kernels.launches", reason="needs triton")

# The paper's step in bfloat16 on an H100, by batch size: nodes, and the longest chain of them, at the most
MOST = {1: (120, 98), 16: (120, 98), 64: (120, 98)}


def paper_step(dtype: torch.dtype = torch.bfloat16) -> FusedStep:
    with torch.device("meta"):
        nets = (UnetGenerator(), PatchDiscriminator())
        optimizers = [torch.optim.Adam(net.parameters(), betas=(0.5, 0.999)) for net in nets]
        return FusedStep(*nets, *optimizers, size=(256, 256), dtype=dtype)


@pytest.fixture(scope="module")
def step() -> FusedStep:
    return paper_step()


@pytest.mark.parametrize("images", MOST)
def test_no_more_launches_than_there_were(step: FusedStep, images: int):
    found = count_launches(step, images)
    count = LaunchCount.of(found)
    nodes, longest = MOST[images]
    assert count.nodes <= nodes
    assert count.longest <= longest
    assert count.main + count.beside == count.nodes == len(found)


@pytest.mark.parametrize(("images", "serial", "merges"), [(1, 64, 8), (16, 256, 32), (64, 256, 32)])
def test_weight_gradients_fill_the_gpu(step: FusedStep, images: int, serial: int, merges: int):
    """No layer has fewer programs than an H100 has processors, less four, or a longer loop than this."""
    found = [launch for launch in count_launches(step, images) if "conv_wgrad" in launch.kernel]
    assert len(found) == 21  # a launch for each layer of both networks
    assert min(launch.programs for launch in found) >= 128
    assert max(launch.iterations for launch in found) <= serial
    assert max(launch.merges for launch in found) <= merges


def test_each_product_is_counted_once(step: FusedStep):
    """The FLOPs are those of the step's operators, call by call."""
    by_launches = [launch.flop for launch in count_launches(step, 1) if launch.flop]
    assert by_launches == [cost.flop for cost in count_step(step, 1) if cost.flop]


def test_operators_are_launched_in_their_order(step: FusedStep):
    found, names = count_launches(step, 1), []
    for launch in found:
        if launch.name and (not names or names[-1] != launch.name):
            names.append(launch.name)
    expected = []
    for cost in count_step(step, 1):
        if not expected or expected[-1] != cost.call.name:
            expected.append(cost.call.name)
    assert names == expected
    assert found[0].part == "augment"


def small_launches() -> list[Any]:
    """Kernel launches of the interpreter's small step, noted on tensors without values."""
    with torch.device("cpu"):
        step = done.step_of(torch.bfloat16).on_meta()
        batch = {name: torch.empty_like(x, device="meta") for name, x in done.batch().items()}
    noted: list[Any] = []
    target = ahead.Target(90, done.PROCESSORS, done.SHARED_BYTES)

    class Launch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func.namespace != "fastp2p":
                return func(*args, **(kwargs or {}))
            from fastp2p.ops import library

            return library.launch(func._schema.name.partition("::")[2], None, args)

    with launches.noting(target, noted.append), Launch():
        step.launch(batch)
    return noted


@pytest.fixture(scope="module")
def interpreted() -> list[dict[str, Any]]:
    """What a process really launches in a small step."""
    script = Path(done.__file__)
    result = subprocess.run(
        [sys.executable, script], env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True, check=True
    )
    return json.loads(result.stdout)


def test_what_is_noted_is_what_is_launched(interpreted: list[dict[str, Any]]):
    """Launch by launch: the kernel, its programs, its numbers, constants and tensors."""
    noted = [json.loads(json.dumps(done.told(launch))) for launch in small_launches()]
    real = [
        {name: value for name, value in launch.items() if name not in ("iterations", "merges")}
        for launch in interpreted
    ]
    assert len(real) > 50
    assert noted == real


def test_loops_have_the_iterations_that_are_told(interpreted: list[dict[str, Any]]):
    """A kernel that does its work once has no loop, which is told as one iteration."""
    noted = small_launches()
    told = [(one.name, one.facts.iterations(one.arguments), one.facts.merges(one.arguments)) for one in noted]
    assert told == [(one["kernel"], max(1, one["iterations"]), one["merges"]) for one in interpreted]
    convolutions = {"conv._conv_kernel", "conv_transpose._conv_transpose_kernel"}
    assert {kernel for kernel, n, _ in told if n > 1} >= {*convolutions, "conv_wgrad_adam._conv_wgrad_adam_kernel"}
    assert {kernel for kernel, _, n in told if n > 0} >= convolutions
    assert max(n for _, _, n in told) > 1


def test_the_count_s_kernels_are_those_of_the_programs(step: FusedStep, monkeypatch: pytest.MonkeyPatch):
    """As Triton's own hook sees the launches, which is called for each as long as nothing is compiled."""
    from fastp2p.tuner.ahead import MetaStep

    seen = []
    twin = MetaStep(step, lambda operator: True)
    with ahead.recording(ahead.H100):
        note = ahead.triton.knobs.runtime.jit_cache_hook

        def hook(*, fn: Any, **told: Any) -> bool:
            seen.append(f"{fn.module.rpartition('.')[2]}.{fn.jit_function.fn.__name__}")
            return note(fn=fn, **told)

        monkeypatch.setattr(ahead.triton.knobs.runtime, "jit_cache_hook", hook)
        twin.launch_augment(1, 256, 256)
        twin.launch(1)
        monkeypatch.undo()
    assert seen == [launch.kernel for launch in count_launches(step, 1) if not launch.kernel.startswith("aten::")]


def test_every_kernel_tells_of_its_launches():
    """Each that a file compiles."""
    from fastp2p.kernels.compile_check import all_cases

    kernels = {(case.kernel.fn.__module__, case.kernel.fn.__name__) for case in all_cases()}
    assert len(kernels) >= 12
    for module, kernel in kernels:
        facts = launch_facts.facts_of(module, kernel)
        (function,) = {case.kernel for case in all_cases() if case.kernel.fn.__name__ == kernel
                       and case.kernel.fn.__module__ == module}  # fmt: skip
        assert {*facts.updates, *facts.only_with, *facts.only_with.values()} <= set(function.arg_names)


def test_a_kernel_that_tells_nothing_is_found(step: FusedStep, monkeypatch: pytest.MonkeyPatch):
    from fastp2p.kernels import norm_act

    monkeypatch.delitem(norm_act.LAUNCH_FACTS, "_norm_act_kernel")
    with pytest.raises(LookupError, match=r"kernels.norm_act: LAUNCH_FACTS tells nothing of _norm_act_kernel"):
        count_launches(step, 1)


class TwoBranches:
    """A step that adds on the main chain and on two branches."""

    dtype, image_dtypes = torch.float32, dict[str, torch.dtype]()

    def __init__(self) -> None:
        self.networks, self.arenas = {"net": self}, dict[str, Any]()
        self.shapes = {"A": (1, 2, 4)}  # no square: nothing is cut

    def on_meta(self) -> "TwoBranches":
        return self

    def launch(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        x, first, second = batch["A"], Branch(torch.device("meta")), Branch(torch.device("meta"))
        x.add_(1)
        with first.beside(x):
            x + 1
            x + 2
            with second.beside(x):
                x + 3
        x.add_(2)
        with first.beside(x):
            x + 4
        second.join()
        x.add_(3)
        first.join()
        x.add_(4)
        return {}


def test_depths_follow_forks_and_joins():
    step: Any = TwoBranches()
    found = [(launch.kernel, launch.chain, launch.depth, launch.after) for launch in count_launches(step, 1)]
    assert found == [
        ("aten::add_", MAIN, 1, ()),
        ("aten::add", "branch 1", 2, (0,)),
        ("aten::add", "branch 1", 3, (1,)),
        ("aten::add", "branch 2", 4, (2,)),
        ("aten::add_", MAIN, 2, (0,)),
        ("aten::add", "branch 1", 4, (2, 4)),
        ("aten::add_", MAIN, 5, (4, 3)),
        ("aten::add_", MAIN, 6, (6, 5)),
    ]


class Copies(TwoBranches):
    """A step of what ATen launches, and of what it does not."""

    def launch(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        x = batch["A"]  # (1, 1, 2, 4) float32, 32 bytes
        x.to(torch.float32).contiguous().view(8)[2:].detach()  # nothing
        x[0] += 1  # the sum; Python's assignment of it to itself copies nothing
        x.to(torch.bfloat16)
        torch.empty_like(x).copy_(x)
        torch.cat([x, x])
        x.new_empty(0).zero_()  # it has no elements
        return {}


def test_views_and_allocations_are_no_launches():
    step: Any = Copies()
    found = [(launch.kernel, launch.n_bytes) for launch in count_launches(step, 1)]
    assert found == [
        ("aten::add_", 64),
        ("aten::_to_copy", 32 + 16),
        ("aten::copy_", 64),
        ("aten::cat", 32 + 64),
    ]


def bytes_of(found: list[Launch], name: str, kernel: str) -> list[int]:
    return [launch.n_bytes for launch in found if (launch.name, launch.kernel) == (name, kernel)]


def test_bytes_by_hand(step: FusedStep):
    """netG e1: 6 bytes an element of (1, 64, 128, 128) pass through its activations. The last Adam updates 3 numbers of
    4 bytes and reads a gradient of 4.
    """
    found = count_launches(step, 1)
    small = 2 * 4 * 64 + 16  # for statistics and the like
    (n_bytes,) = bytes_of(found, "netG e1 norm and activation", "norm_act._norm_act_kernel")
    assert 0 <= n_bytes - 3 * 2 * 64 * 128 * 128 <= small
    rest = sum(p.numel() for p in step.netG.arena.biases_and_norms)
    (n_bytes,) = bytes_of(found, "netG Adam of the rest", "adam._adam_kernel")
    assert n_bytes == (6 + 1) * 4 * rest + 4 + 16  # and the learning rate and the betas' powers


def test_wrong_steps_are_refused(step: FusedStep, monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(InputError, match="launches: got 0 images, expected 1 or more"):
        count_launches(step, 0)
    with pytest.raises(InputError, match="launches: got a step in float64"):
        count_launches(_float64_step(), 1)
    net: dict[str, nn.Module] = {"net": nn.Conv2d(3, 3, 3, padding=1)}
    optimizers = {"optimizer": torch.optim.Adam(net["net"].parameters())}
    layers = LayersStep(lambda *args: {}, net, optimizers, shapes={"A": (3, 8, 8)}, dtype=torch.float32)
    with pytest.raises(InputError, match="launches: got a step in autograd, expected a fused one"):
        count_launches(layers, 1)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InputError, match="launches: Triton is not installed"):
        count_launches(step, 1)


def _float64_step() -> FusedStep:
    with torch.device("meta"):
        nets = [net.double() for net in (UnetGenerator(levels=3, ngf=4), PatchDiscriminator(ndf=4, n_layers=1))]
        optimizers = [torch.optim.Adam(net.parameters(), betas=(0.5, 0.999)) for net in nets]
        return FusedStep(*nets, *optimizers, size=(16, 16), dtype=torch.float64)
