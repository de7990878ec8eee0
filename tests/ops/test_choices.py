"""The table of measured choices: it reaches C++ and the launchers, and its file survives what files meet."""

import functools
import importlib
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.gemm_shapes import convolution_on_the_cpu, random

from fastp2p import ops
from fastp2p.commands.info import info
from fastp2p.errors import WriteError
from fastp2p.ops import kernel_choices
from fastp2p.ops.extension import INTERPRETED
from fastp2p.ops.kernel_choices import Measured, Place, Problem, problem_of
from fastp2p.ops.library import launch

TILE = {"BLOCK_M": 16, "BLOCK_N": 16, "BLOCK_K": 32, "SPLIT": 3, "num_warps": 2, "num_stages": 3}
pytestmark = pytest.mark.usefixtures("own_cache")
in_cpp = pytest.mark.usefixtures("cpp_serves")


def arguments(
    operator: str,
    *,
    dtype: torch.dtype = torch.float32,
    epilogue: bool = False,
    inner: int = 40,
    size: tuple[int, int] = (8, 6),
) -> tuple[Any, ...]:
    """A k4 convolution's of stride 2 between (2, inner, *size) and (2, 36 + 7, *size / 2); always the same numbers."""
    half = (size[0] // 2, size[1] // 2)
    small, small2, large = (random(2, *shape, dtype=dtype) for shape in ((36, *half), (7, *half), (inner, *size)))
    weight = random(43, inner, 4, 4, dtype=dtype)
    after = (2, 0.2, 2) if epilogue else (0, 0.0, 0)
    if operator == "conv":
        return large, weight[:36], random(36) if epilogue else None, None, 2, 1, *after
    if operator == "conv_transpose":
        gate = random(2, inner, *size, dtype=dtype, scale=2.0) if epilogue else None
        return small, small2, weight, None, gate, 2, 1, *size, *after
    if operator == "conv_wgrad":
        return small, small2, large, 4, 4, 2, 1, torch.float32
    param, lr, powers = random(43, inner, 4, 4), torch.tensor(2e-4), torch.tensor([0.5, 0.999], dtype=torch.float64)
    moments = torch.zeros_like(param), torch.zeros_like(param)
    low = param.to(dtype) if dtype != torch.float32 else None
    return small, small2, large, param, *moments, lr, powers, 0.5, 0.999, 1e-8, 2, 1, low


def results(operator: str, args: tuple[Any, ...], run: Any = None) -> list[torch.Tensor]:
    """What a call returns, or for conv_wgrad_adam changes."""
    returned = (run or getattr(torch.ops.fastp2p, operator))(*args)
    if operator == "conv_wgrad_adam":
        return [t for t in (*args[3:6], args[13]) if t is not None]
    return [returned] if operator == "conv_wgrad" else list(returned)


def same(one: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
    return all(map(torch.equal, one, other))


def test_keys():
    for operator, shape in (
        ("conv", "24px 36+0-40"),
        ("conv_transpose", "24px 36+7-40"),
        ("conv_wgrad_adam", "24px 36+7-40"),
    ):
        problem = problem_of(operator, arguments(operator, dtype=torch.bfloat16))
        assert problem.key == f"{operator} bfloat16 {shape} 4x4s2"
        assert Problem.parse(problem.key) == problem
        assert hash(tuple(problem)) == hash(problem)  # a call looks it up by a plain tuple
    for key in ("", "conv float33 1px 1+0-1 4x4s2", "conv float32 1px 1-1 4x4s2", "adam float32 1px 1+0-1 4x4s2"):
        with pytest.raises(ValueError, match="is no problem"):
            Problem.parse(key)


def test_files_of_earlier_versions_are_read():
    """The operators were named down, up, wgrad and wgrad_adam."""
    names = {"down": "conv", "up": "conv_transpose", "wgrad": "conv_wgrad", "wgrad_adam": "conv_wgrad_adam"}
    for before, now in names.items():
        problem = Problem.parse(f"{before} float32 24px 36+0-40 4x4s2")
        assert problem.operator == now
        assert problem.key == f"{now} float32 24px 36+0-40 4x4s2"


@in_cpp
@pytest.mark.parametrize("operator", ["conv", "conv_transpose", "conv_wgrad", "conv_wgrad_adam"])
def test_a_choice_reaches_cpp(operator: str):
    """The two algorithms round differently, so the bits tell which one has served.

    They do so where a sum has some hundred terms: on AVX2, MKL sums fewer in the same order as the direct gradient.
    """
    forced, make = {}, functools.partial(arguments, operator, size=(32, 24))
    for choice in ("gemm", "direct"):
        with convolution_on_the_cpu(choice):
            forced[choice] = results(operator, make())
    assert not same(forced["gemm"], forced["direct"])
    place, problem = kernel_choices.place_of(torch.device("cpu")), problem_of(operator, make())
    for choice in ("gemm", "direct"):
        kernel_choices.install(place, {problem: Measured(choice)})
        assert same(results(operator, make()), forced[choice])
    extension = importlib.import_module("fastp2p._C")
    rule = extension.convolution_by_rule(operator, "float32", *problem[2:])
    for change in ({"pixels": 385}, {"outer": 35}, {"outer2": 1}, {"inner": 39}, {"stride": 1}, {"kernel_width": 3}):
        kernel_choices.install(place, {problem._replace(**change): Measured("gemm" if rule == "direct" else "direct")})
        assert same(results(operator, make()), forced[rule]), f"{change} is another problem"


@in_cpp
def test_the_file_serves_from_import_on():
    """For each number of threads its own; what is written later counts from the next process on, or after forget."""
    args, problem = arguments("conv"), problem_of("conv", arguments("conv"))
    forced = {}
    for choice in ("gemm", "direct"):
        with convolution_on_the_cpu(choice):
            forced[choice] = results("conv", args)
    n_threads = torch.get_num_threads()
    try:
        for choice, threads in (("gemm", 1), ("direct", 2)):
            kernel_choices.add_to_cache(Place("cpu", threads), {problem: Measured(choice, "gemm", {"gemm": 1.5})})
        kernel_choices.forget()
        for choice, threads in (("gemm", 1), ("direct", 2), ("gemm", 1)):
            torch.set_num_threads(threads)
            assert same(results("conv", args), forced[choice])
        kernel_choices.add_to_cache(Place("cpu", 1), {problem: Measured("direct")})
        assert same(results("conv", args), forced["gemm"])
        kernel_choices.forget()
        assert same(results("conv", args), forced["direct"])
    finally:
        torch.set_num_threads(n_threads)


def test_a_file_is_added_to():
    place = Place("cpu", 3)
    first, second = (problem_of(operator, arguments(operator)) for operator in ("conv", "conv_transpose"))
    assert kernel_choices.read_cache(place) == {}
    kernel_choices.add_to_cache(place, {first: Measured("gemm", "direct", {"gemm": 0.25, "direct": 1.0})})
    kernel_choices.add_to_cache(place, {second: Measured("direct")})
    found = kernel_choices.read_cache(place)
    assert found == {
        first: Measured("gemm", "direct", {"gemm": 0.25, "direct": 1.0}),
        second: Measured("direct"),
    }
    assert "3-threads-torch" in kernel_choices.cache_path(place).name
    assert kernel_choices.read_cache(Place("cpu", 4)) == {}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda content: b"", "Expecting value"),
        (lambda content: content[:-20], "cannot be used"),
        (lambda content: b"[]", "it is no file of kernel choices"),
        (lambda content: content.replace(b'"format": 1', b'"format": 2'), "it is of format 2, this version reads 1"),
        (lambda content: content.replace(b"3-threads", b"8-threads"), "it is for .*8-threads.*, this is .*3-threads"),
        (lambda content: content.replace(b'"gemm"', b'"fast"'), "has the choice 'fast'"),
        (lambda content: content.replace(b"4x4s2", b"4x4"), "is no problem"),
        (lambda content: content.replace(b'"choice"', b'"chosen"'), "it is damaged"),
        (
            lambda content: content.replace(b'"format": 1', b'"format": true'),
            "it is of format True, this version reads 1",
        ),
        (
            lambda content: content.replace(b'"environment": "', b'"environment": 1, "": "'),
            "its environment is 1, expected",
        ),
        *(
            (
                lambda content, ms=ms: content.replace(b'"ms": {}', b'"ms": {"gemm": %s}' % ms),
                "expected milliseconds of 0",
            )
            for ms in (b"-1.5", b"NaN", b"Infinity", b"true", b"1" + b"0" * 400)
        ),
    ],
)
def test_a_damaged_or_foreign_file_is_said_once_and_written_anew(change: Any, said: str):
    place, problem = Place("cpu", 3), problem_of("conv", arguments("conv"))
    kernel_choices.add_to_cache(place, {problem: Measured("gemm")})
    path = kernel_choices.cache_path(place)
    path.write_bytes(change(path.read_bytes()))
    with pytest.warns(UserWarning, match=said) as warned:
        assert kernel_choices.table(place) == {}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert kernel_choices.table(place) == {}
        kernel_choices.add_to_cache(place, {problem: Measured("direct")})
    assert len(warned) == 1
    assert kernel_choices.read_cache(place) == {problem: Measured("direct")}


def test_a_user_without_a_home_folder_has_no_cache(monkeypatch: pytest.MonkeyPatch):
    """A uid without a passwd entry and without HOME, as in many containers."""

    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("FASTP2P_CACHE", raising=False)
    monkeypatch.setattr(Path, "home", no_home)
    place, problem = Place("cpu", 3), problem_of("conv", arguments("conv"))
    assert kernel_choices.read_cache(place) == {}
    with pytest.warns(UserWarning, match="no home folder, so kernels are tuned in every run; set FASTP2P_CACHE"):
        kernel_choices.add_to_cache(place, {problem: Measured("gemm")})
    assert "none kept: this user has no home folder; set FASTP2P_CACHE" in info()


def test_a_folder_that_cannot_be_written_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FASTP2P_CACHE", str(tmp_path / "file"))
    problem = problem_of("conv", arguments("conv"))
    with pytest.warns(UserWarning, match="cannot be written, so kernels are tuned in every run"):
        kernel_choices.add_to_cache(Place("cpu", 3), {problem: Measured("gemm")})
    monkeypatch.setenv("FASTP2P_CACHE", str(tmp_path))
    monkeypatch.setattr(kernel_choices, "write_atomically", full_disk)
    with pytest.warns(UserWarning, match="cannot be written"):
        kernel_choices.add_to_cache(Place("cpu", 3), {problem: Measured("gemm")})


def full_disk(path: Path, content: bytes) -> None:
    raise WriteError(path, OSError(28, "No space left on device"))


@in_cpp
def test_what_cpp_is_given_is_checked():
    extension = importlib.import_module("fastp2p._C")
    row = ("conv", "float32", 24, 36, 0, 40, 4, 4, 2, "gemm")
    for wrong, error, said in (
        ([(*row[:-1], "fast")], ValueError, "got 'fast', expected one of 'auto', 'gemm', 'direct'"),
        (
            [("adam", *row[1:])],
            ValueError,
            "got 'adam', expected one of 'conv', 'conv_transpose', 'conv_wgrad', 'conv_wgrad_adam'",
        ),
        ([("conv", "int8", *row[2:])], ValueError, "got 'int8', expected one of 'float32'"),
        ([row[:-1]], TypeError, "exactly 10 arguments"),
        ([list(row)], TypeError, "expected a tuple"),
        (3, TypeError, "not iterable"),
    ):
        with pytest.raises(error, match=said):
            extension.choose_convolutions(2, wrong)


@in_cpp
def test_a_file_that_cannot_be_read_leaves_the_rule_and_is_told():
    """Others in the folder are no matter: of another machine, of other versions, of no number of threads."""
    args, place = arguments("conv"), kernel_choices.place_of(torch.device("cpu"))
    path, by_rule = kernel_choices.cache_path(place), results("conv", args)
    assert path is not None
    path.parent.mkdir(parents=True)
    for name in ("kernels-other-cpu-2-threads-torch1.0.json", "kernels-h100-torch2.json", "kernels--threads-.json"):
        (path.parent / name).write_bytes(b"[]")
    kernel_choices.forget()
    path.write_bytes(b"[]")
    with pytest.warns(UserWarning, match="cannot be used .*kernels go by rule until they are tuned anew") as warned:
        kernel_choices.forget()
    assert len(warned) == 1
    assert same(results("conv", args), by_rule)


@pytest.mark.kernels
@pytest.mark.parametrize("operator", ["conv", "conv_transpose", "conv_wgrad", "conv_wgrad_adam"])
def test_a_choice_reaches_the_launcher(operator: str, monkeypatch: pytest.MonkeyPatch):
    args, called = arguments(operator), []
    for file in (operator, "aten"):

        def launcher(*args: Any, file: str = file, **options: Any) -> Any:
            called.append((file, options))
            return getattr(ops, f"{operator}_ref")(*args)

        monkeypatch.setattr(importlib.import_module(f"fastp2p.kernels.{file}"), operator, launcher)
    place, problem = kernel_choices.place_of(args[0].device), problem_of(operator, args)
    for choices, expected in (
        ({}, (operator, {})),
        ({problem: Measured(TILE)}, (operator, {"config": TILE})),
        ({problem: Measured("aten")}, ("aten", {})),
        ({problem._replace(pixels=25): Measured("aten")}, (operator, {})),
    ):
        kernel_choices.install(place, choices)
        results(operator, args)
        assert called.pop() == expected


@pytest.mark.kernels
@pytest.mark.parametrize("operator", ["conv", "conv_transpose", "conv_wgrad", "conv_wgrad_adam"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_aten_against_the_reference(operator: str, dtype: torch.dtype):
    """With everything that follows a convolution. bfloat16 rounds the product, and what becomes of it."""
    args = arguments(operator, dtype=dtype, epilogue=True, inner=5)
    again = arguments(operator, dtype=dtype, epilogue=True, inner=5)
    ours = results(operator, args, lambda *args: launch(operator, "aten", args))
    expected = results(operator, again, getattr(ops, f"{operator}_ref"))
    for one, other in zip(ours, expected, strict=True):
        assert one.shape == other.shape
        assert one.dtype == other.dtype
        largest = other.abs().max().item()
        rounding = 2.0**-6 if dtype == torch.bfloat16 else 1e-5
        if operator == "conv_wgrad_adam" and one.shape == args[3].shape:
            largest = max(largest, 4e-4 / rounding)  # a step is of one size, and a small gradient's may flip
        torch.testing.assert_close(one.double(), other.double(), rtol=rounding, atol=rounding * largest)


@pytest.mark.kernels
def test_aten_updates_a_slice_of_the_taps():
    """As the innermost layers have it; what lies beside the slice stays."""
    args = list(arguments("conv_wgrad_adam", inner=5))
    whole = [random(43, 5, 6, 6) for _ in range(3)]
    whole[1].zero_(), whole[2].zero_()
    before = [t.clone() for t in whole]
    args[3:6] = [t[:, :, 1:5, 1:5] for t in whole]
    dense = [t.contiguous(memory_format=torch.channels_last) for t in args[3:6]]
    launch("conv_wgrad_adam", "aten", tuple(args))
    launch("conv_wgrad_adam", "aten", (*args[:3], *dense, *args[6:]))
    for changed, unchanged, alone in zip(whole, before, dense, strict=True):
        assert torch.equal(changed[:, :, 1:5, 1:5], alone)
        unchanged[:, :, 1:5, 1:5] = alone
        assert torch.equal(changed, unchanged)


@pytest.mark.kernels
@pytest.mark.parametrize("operator", ["conv", "conv_transpose", "conv_wgrad", "conv_wgrad_adam"])
def test_the_tuner_knows_the_rule(operator: str, monkeypatch: pytest.MonkeyPatch):
    """What the launcher asks the rule is what the tuner asks it, and its answer is the first candidate."""
    candidates = importlib.import_module("fastp2p.kernels.candidates")
    tile_rule = importlib.import_module("fastp2p.kernels.tile_rule")
    asked: list[Any] = []
    choose = tile_rule.choose_config

    class AskedError(Exception):
        """In place of the launch."""

    def ask(m: int, n: int, k: int, like: torch.Tensor, **options: Any) -> None:
        asked.append((m, n, k, {"products": 1, "largest": 128 * 128} | options))
        raise AskedError

    args = arguments(operator)
    product = candidates.product_of(operator, args)
    with monkeypatch.context() as patch:
        patch.setattr(tile_rule, "choose_config", ask)
        for call in (lambda: launch(operator, None, args), lambda: candidates.by_rule(product)):
            with pytest.raises(AskedError):
                call()
    assert asked[0] == asked[1]
    found = candidates.candidates(product)
    rule = choose(product.m, product.n, product.k, product.like, **asked[0][3])
    few_pixels = operator == "conv_wgrad_adam"  # each program has its weights to itself
    assert found[0] == (rule | {"SPLIT": 1} if few_pixels else rule)
    assert 1 < len(found) <= candidates.MOST
    assert not any(config in found[:i] for i, config in enumerate(found))


def test_place_names_the_interpreter():
    """Its kernels have no file: nobody times them."""
    assert (kernel_choices.place_of(torch.device("cpu")).device_type == "triton-interpreted") == INTERPRETED
