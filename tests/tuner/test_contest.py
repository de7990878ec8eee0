"""The tuner: it knows what the step calls, chooses among what computes it, and keeps what it has measured."""

import importlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers.nets import Trained, batches, small_nets
from torch.utils._python_dispatch import TorchDispatchMode

from fastp2p.models.pix2pix.networks import PixelDiscriminator
from fastp2p.ops import kernel_choices
from fastp2p.ops.extension import INTERPRETED
from fastp2p.ops.kernel_choices import Measured, Problem, problem_of
from fastp2p.tuner import contest as tuner
from fastp2p.tuner.contest import Contest, tune
from fastp2p.tuner.operations import Noise, Operation, Trial, operations

SIZE = (16, 32)
OPERATORS = ("conv", "conv_transpose", "conv_wgrad", "conv_wgrad_adam")
pytestmark = pytest.mark.usefixtures("own_cache")


@pytest.fixture
def place() -> kernel_choices.Place:
    found = kernel_choices.place_of(torch.get_default_device())
    reason = tuner.why_not(torch.get_default_device(), torch.float32)
    if reason is not None or found.device_type == "triton-interpreted":
        pytest.skip("there is nothing to choose from here")
    return found


class Calls(TorchDispatchMode):
    """The first call of each problem: what follows the product, and the images' sides."""

    def __init__(self) -> None:
        super().__init__()
        self.found: dict[Problem, tuple[Any, ...]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        namespace, _, name = func.name().partition("::")
        if namespace == "fastp2p" and name in OPERATORS:
            self.found.setdefault(problem_of(name, args), described(name, args))
        return func(*args, **(kwargs or {}))


def described(operator: str, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """What of a call is not in its problem."""
    if operator.startswith("conv_wgrad"):
        window = args[11:13] if operator == "conv_wgrad_adam" else args[5:7]
        return operator, tuple(args[0].shape), tuple(args[2].shape), window[1]
    tensors = args[:1] if operator == "conv" else args[:2]
    bias, gate, _, padding, *rest = args[len(tensors) + 1 :]
    rest = rest[: 3 if operator == "conv" else 5]  # a norm that a gradient flows on into is timed as a gate
    activation, slope, groups = rest[-3:]
    slope = slope if activation == 2 else None  # others do not look at it
    shapes = [None if t is None else tuple(t.shape) for t in tensors]
    return operator, shapes, bias is not None, gate is not None, padding, *rest[:-3], activation, slope, groups


def calls_of(nets: Trained, n: int, size: tuple[int, int], dtype: torch.dtype, **options: Any) -> None:
    step = nets.fused(size, dtype, **options)
    wanted = operations(step, n)
    with Calls() as calls:
        step(*next(batches(n, size, torch.float32)))
    noise = Noise(torch.get_default_device())
    expected = {o.problem: described(o.operator, o.operands(noise)) for o in wanted}
    assert len(expected) == len(wanted)
    assert expected == calls.found


@pytest.mark.parametrize("norm", ["batch", "instance", "none"])
@pytest.mark.parametrize(("dtype", "n"), [(torch.float32, 1), (torch.bfloat16, 3), (torch.float16, 2)])
def test_operations_are_what_the_step_calls(norm: str, dtype: torch.dtype, n: int):
    """Padded by G; float16 gathers its gradients."""
    calls_of(small_nets(levels=4, norm=norm, dtype=torch.float32), n, (20, 30), dtype)


def test_operations_of_other_networks():
    """Dead taps in and out; D of single pixels; other channels."""
    for options in ({}, {"skip_dead_taps": False}):
        calls_of(small_nets(levels=4, n_layers=2, dtype=torch.float32), 2, (16, 16), torch.float32, **options)
    nets = small_nets(levels=2, dtype=torch.float32)
    calls_of(Trained(nets.netG, PixelDiscriminator(ndf=4)), 2, SIZE, torch.bfloat16)


def some_operations(dtype: torch.dtype) -> list[Operation]:
    return operations(small_nets(dtype=torch.promote_types(dtype, torch.float32)).fused(SIZE, dtype), 1)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_every_candidate_is_within_its_tolerance(dtype: torch.dtype, place: kernel_choices.Place):
    """With all that follows a convolution; most stay well below."""
    noise, errors = Noise(torch.get_default_device()), []
    for operation in some_operations(dtype):
        trial = Trial(operation, noise)
        if tuner.why_not(torch.get_default_device(), dtype) is not None:
            continue
        for choice in tuner.candidates_of(operation, trial.args):
            run = tuner.run_with(operation, choice, torch.get_default_device())
            errors += [trial.error(run), trial.error(run)]
    assert all(error <= 1 for error in errors), max(errors)


def faults(operator: str) -> list[Callable[[Any], None]]:
    """Ways to spoil a result in place: a value too large, a missing one, NaN; statistics; a weight that stays."""

    def one_off(t: torch.Tensor) -> None:
        t.view(-1)[0] = t.view(-1)[0] + 0.25 * t.abs().max()

    def scaled(t: torch.Tensor) -> None:
        t.mul_(1.1)

    def nan(t: torch.Tensor) -> None:
        t.view(-1)[-1] = torch.nan

    if operator == "conv_wgrad_adam":
        return [
            *(lambda args, f=f: f(args[4].permute(0, 2, 3, 1)) for f in (one_off, scaled, nan)),
            lambda args: args[5].zero_(),
            lambda args: args[3].add_(1e-4),
            lambda args: args[13].zero_() if args[13] is not None else args[3].zero_(),
        ]
    if operator == "conv_wgrad":
        return [lambda result, f=f: f(result.permute(0, 2, 3, 1)) for f in (one_off, scaled, nan)]
    return [lambda result, f=f: f(result[0].permute(0, 2, 3, 1)) for f in (one_off, scaled, nan)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_wrong_results_are_outside(dtype: torch.dtype, place: kernel_choices.Place):
    seen = set()
    for operation in some_operations(dtype):
        operator = operation.operator
        trial = Trial(operation, Noise(torch.get_default_device()))
        right = getattr(torch.ops.fastp2p, operator)

        def spoiled(args: Any, fault: Any, right: Any = right, operator: str = operator) -> Any:
            result = right(*args)
            fault(args if operator == "conv_wgrad_adam" else result)
            return result

        ways = faults(operator)
        if operation.stat_groups and operator in ("conv", "conv_transpose"):
            ways += [lambda result: result[1].add_(0.5), lambda result: result[2].mul_(2).add_(0.5)]
            seen.add("statistics")
        for number, fault in enumerate(ways):
            error = trial.error(lambda args, fault=fault: spoiled(args, fault))
            assert not error <= 1, f"{operation.name}, fault {number}"
        seen.add(operator)
    assert {"conv", "conv_transpose", "statistics"} < seen


def test_tuned_choices(place: kernel_choices.Place):
    """One for each problem, from all that was measured, in the file; the progress counts them."""
    wanted, ticks, said = some_operations(torch.float32), [], []
    table = tune(wanted, place, report=said.append, tick=lambda: ticks.append(1))
    assert said == []
    assert len(ticks) == len(wanted)
    assert list(table) == [operation.problem for operation in wanted]
    for measured in table.values():
        chosen = measured.ms[kernel_choices.name_of(measured.choice)]
        rule = measured.ms[measured.rule]
        assert chosen == rule or chosen <= (1 - tuner.MARGIN) * rule + 1e-3  # they are rounded
        assert min(measured.ms.values()) >= (1 - tuner.MARGIN) * chosen - 1e-3
    assert kernel_choices.read_cache(place) == table


@pytest.mark.parametrize(
    "fault",
    [lambda out: out[0].mul_(1.5), lambda out: out[0].fill_(torch.nan), lambda out: torch.zeros(2) + torch.zeros(3)],
)
def test_a_wrong_candidate_is_never_chosen(place: kernel_choices.Place, monkeypatch: pytest.MonkeyPatch, fault: Any):
    """However fast it is: here every candidate but the first of each `conv` and `conv_transpose` is spoiled."""
    wanted = [o for o in some_operations(torch.float32) if o.operator in ("conv", "conv_transpose")][:6]
    run_with, good = tuner.run_with, {}

    def injected(operation: Operation, choice: Any, device: torch.device) -> Any:
        run = run_with(operation, choice, device)
        if good.setdefault(operation.problem, choice) == choice:
            return run

        def faulty(args: Any) -> Any:
            out = run(args)
            fault(out)
            return out

        return faulty

    monkeypatch.setattr(tuner, "run_with", injected)
    said: list[str] = []
    table = tune(wanted, place, report=said.append, tick=lambda: None)
    assert {problem: measured.choice for problem, measured in table.items()} == good
    assert all(list(measured.ms) == [kernel_choices.name_of(measured.choice)] for measured in table.values())
    assert len(said) >= len(wanted)
    assert all("is left out: it" in line for line in said)


def test_without_a_right_candidate_the_rule_serves(place: kernel_choices.Place, monkeypatch: pytest.MonkeyPatch):
    wanted, said = some_operations(torch.float32)[:2], []
    monkeypatch.setattr(Trial, "error", lambda self, run: float("nan") if self.operation is wanted[0] else 0.0)
    monkeypatch.setattr(tuner, "LONG_MS", float("inf"))
    table = tune(wanted, place, report=said.append, tick=lambda: None)
    assert list(table) == [wanted[1].problem]
    assert said[-1].endswith("no candidate computes what the reference does; it goes by rule")


@pytest.mark.skipif(INTERPRETED, reason="the interpreter compiles nothing")
def test_what_the_compiler_and_the_assembler_refuse_is_left_out(monkeypatch: pytest.MonkeyPatch):
    """However it is refused. A real refusal of the assembler, and Triton's own errors, each from one candidate."""
    errors = pytest.importorskip("triton.compiler.errors", reason="needs triton")
    runtime = importlib.import_module("triton.runtime.errors")
    compile_check = importlib.import_module("fastp2p.kernels.compile_check")
    case = next(case for case in compile_check.all_cases() if case.name == "running_stats")
    refusals = [
        lambda args: compile_with_an_unknown_flag(compile_check, case),
        lambda args: raise_(runtime.OutOfResources(300_000, 232_448, "shared memory")),
        lambda args: raise_(errors.CompilationError(None, None)),
        lambda args: raise_(errors.CompileTimeAssertionFailure(None, None)),
        lambda args: raise_(errors.UnsupportedLanguageConstruct(None, None)),
        lambda args: raise_(RuntimeError("PassManager::run failed")),
    ]
    operation, said = some_operations(torch.float32)[0], []
    right = getattr(torch.ops.fastp2p, operation.operator)
    runs: dict[str, Any] = {"rule": lambda args: right(*args)} | {f"refused {i}": run for i, run in enumerate(refusals)}
    monkeypatch.setattr(tuner, "candidates_of", lambda operation, args: list(runs))
    monkeypatch.setattr(tuner, "run_with", lambda operation, choice, device: runs[choice])
    trial = Trial(operation, Noise(torch.get_default_device()))
    _, computed = tuner._contest(trial, torch.device("cuda"), said.append)
    assert list(computed) == ["rule"]
    assert len(said) == len(refusals)
    assert "PTXASError" in said[0]
    assert all("is left out: it fails with" in line for line in said)


def raise_(error: Exception) -> None:
    raise error


def compile_with_an_unknown_flag(compile_check: Any, case: Any) -> None:
    """Raises what Triton makes of the assembler's refusal; no GPU is needed."""
    signature = {name: case.types.get(name, "constexpr") for name in case.kernel.arg_names}
    source = compile_check.ASTSource(fn=case.kernel, signature=signature, constexprs={"BLOCK": 128})
    target = compile_check.GPUTarget("cuda", 90, 32)
    compile_check.triton.compile(source, target=target, options={"ptx_options": "--no-such-flag"})


def contest(**samples: list[float]) -> Measured:
    made = Contest(some_operations(torch.float32)[0], "rule", {name: name for name in samples}, min)
    for name, list_ in samples.items():
        for ms in list_:
            made.add(name, ms)
    return made.winner()


def test_the_rule_s_choice_stays_unless_another_is_faster_by_more_than_the_margin():
    assert contest(rule=[1.0, 1.2], other=[0.96, 5.0]).choice == "rule"
    assert contest(rule=[1.0, 1.2], other=[0.94, 5.0]).choice == "other"
    assert contest(other=[9.0]).choice == "other"  # the rule's own was dropped
    assert contest(rule=[2.0], other=[1.0], third=[0.99]) == Measured(
        "third", "rule", {"rule": 2, "other": 1, "third": 0.99}
    )


def test_hopeless_candidates_get_no_further_turns():
    made = Contest(some_operations(torch.float32)[0], "a", {}, min, first={"a": 30.0, "b": 200.0, "c": 90.0, "d": 3.0})
    assert [made.hopeful(name) for name in "abcd"] == [True, False, False, True]  # the rule's has its turns anyhow
    made.first = {"a": 30.0, "b": 100.0}
    assert made.hopeful("b")
    for name, ms in (("a", 10.0), ("b", 25.0), ("a", 10.0), ("b", 15.0)):
        assert made.hopeful(name)
        made.add(name, ms)
    assert made.hopeful("b")  # once was enough
    made.samples["b"] = [25.0, 25.0, 1.0]
    assert not made.hopeful("b")


def test_what_was_measured_before_an_interruption_is_kept(place: kernel_choices.Place):
    wanted, ticks = some_operations(torch.float32), []

    def tick() -> None:
        ticks.append(1)
        if len(ticks) == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tune(wanted, place, report=print, tick=tick)
    assert list(kernel_choices.read_cache(place)) == [operation.problem for operation in wanted[:5]]


def test_groups_of_operands_that_no_cache_holds(monkeypatch: pytest.MonkeyPatch):
    wanted = some_operations(torch.float32)
    assert [*tuner._groups(wanted)] == [wanted]  # small networks stay in the cache in a step, too
    monkeypatch.setattr(tuner, "COLD_BYTES", 50_000)
    groups = [*tuner._groups(wanted)]
    assert [operation for group in groups for operation in group] == wanted
    sizes = [sum(operation.n_bytes for operation in group) for group in groups]
    assert len(groups) > 2
    assert all(size >= 50_000 for size in sizes[:-1])
