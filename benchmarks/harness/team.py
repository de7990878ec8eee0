"""The providers' processes: everyone's result is compared first, then they take turns, and the rows tell."""

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from harness.contest import Row, take_turns
from harness.machine import ROOT, smi_state
from harness.providers import EAGER, Provider, Scale

ROUNDS = 9
QUICK_COMPILES_FOR_S = 70  # from the beginning of --quick's three minutes; what is not compiled by then is left out
GPU_SAMPLE_MS = 50  # at least, where a step may take less than one
PATIENCE_S = 1800.0  # with a worker: torch.compile's max-autotune takes long
CLOSES_WITHIN_S = 10.0  # a worker that nothing more is asked of; then it is killed
CPU_PAIRS = 4  # an epoch's in a sample: a whole one would take minutes

# Greatest relative distances from eager float32: of each loss and of the gradients in the first step, of each loss in a
# later one, of the output. A few times those of unet_256 at 256 px that NOTES.md has, where eager's own autocast is as
# far off as our bfloat16. Adam's first steps are lr times the gradient's sign, which amplifies every rounding.
FLOAT32 = {"losses": 1e-4, "gradient of netG": 1e-2, "gradient of netD": 1e-2, "later losses": 1e-3, "output": 1e-5}
HALF = {"losses": 1e-2, "gradient of netG": 0.3, "gradient of netD": 0.3, "later losses": 1e-2, "output": 2e-2}
TF32 = {name: bound / 4 for name, bound in HALF.items()}  # 11 bits of mantissa to 8; not measured
LATER_ON_GPU = 10  # times farther off are the later losses there, of the sixth step, not the second; not measured
WITH_DROPOUT = {"losses": 0.05}  # other masks give another first image, which moves D's losses by up to 1 %

Answer = dict[str, Any]


class WorkerError(Exception):
    """A worker could not do what it was asked for; the message has the reason."""


class Worker:
    """A provider in its own process, see worker.py, until `close`. Between its turns it stands still.

    Args:
        name: for the tables.
        module: the harness's own, such as worker.
        args: its arguments.
        env: variables beside this process's.
    """

    def __init__(self, name: str, module: str, *args: str, env: dict[str, str] | None = None):
        self.name = name
        self.log = tempfile.NamedTemporaryFile(prefix="fastp2p-worker-", suffix=".log")  # noqa: SIM115 (see close)
        self.process = subprocess.Popen(
            [sys.executable, "-m", f"harness.{module}", *args], cwd=ROOT / "benchmarks",
            env=os.environ | (env or {}), start_new_session=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.log, text=True,
        )  # fmt: skip

    @property
    def session(self) -> int:
        return self.process.pid

    def ask(self, do: str, *, within_s: float = PATIENCE_S, **request: Any) -> Answer:
        """Let it do something.

        Raises:
            WorkerError: when it could not, died of it, or was ended because it took longer than `within_s`.
        """
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self._signal(signal.SIGCONT)
        try:
            print(json.dumps({"do": do, **request}), file=self.process.stdin, flush=True)
            if not select.select([self.process.stdout], [], [], max(0.0, within_s))[0]:
                self._signal(signal.SIGKILL)
                raise WorkerError(f"did not answer within {within_s:.0f} s")
            line = self.process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            status = self.process.wait()
            self.log.seek(0)
            tail = self.log.read().decode(errors="replace").strip()[-2000:]
            raise WorkerError(f"its process ended with status {status}: {tail}")
        answer: Answer = json.loads(line)
        if "error" in answer:
            error = WorkerError(answer["error"])
            error.add_note(answer["traceback"])  # which pytest shows where the error ends a test
            raise error
        return answer

    def sample(self, calls: int) -> float:
        ms = float(self.ask("sample", calls=calls)["ms"])
        self._signal(signal.SIGSTOP)  # a loader's processes would read ahead in others' turns
        return ms

    def dismiss(self) -> None:
        """Nothing more will be asked: it may end."""
        assert self.process.stdin is not None
        self._signal(signal.SIGCONT)
        with contextlib.suppress(BrokenPipeError):  # it died before it read a request
            self.process.stdin.close()

    def close(self, *, within_s: float = CLOSES_WITHIN_S) -> None:
        """Let it end, or end it."""
        self.dismiss()
        try:
            self.process.wait(timeout=within_s)
        except subprocess.TimeoutExpired:
            self._signal(signal.SIGKILL)
            self.process.wait()
        self.log.close()

    def _signal(self, number: int) -> None:
        """To it and to what it has begun."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, number)


class Team:
    """A worker for each provider, begun all at once. Who fails is out, and why is kept.

    Ours is timed even if its result is wrong, since a time helps to find out why: its row says what is wrong, the
    tables compare it with nobody, and the benchmark fails.

    Args:
        members: ours last, of these the best precision first.
        device: where all work.
        scale: of the networks.
        left_out: name -> reason, to be added to.
        quick: leave out what takes long.
    """

    def __init__(
        self, members: list[Provider], device: torch.device, scale: Scale, left_out: dict[str, str], *, quick: bool
    ):
        self.members = {p.name: p for p in members}
        self.device, self.scale, self.left_out, self.quick = device, scale, left_out, quick
        # Compiling is timed cold; with --quick what an earlier run compiled serves, or there would be no time for it
        self.caches = tempfile.TemporaryDirectory(prefix="fastp2p-compiled-")
        env = {} if quick else {"TORCHINDUCTOR_CACHE_DIR": self.caches.name}
        options = ("--device", device.type, "--scale", scale.name)
        self.workers = {name: Worker(name, "worker", name, *options, env=env) for name in self.members}
        self.begun = time.monotonic()
        self.first_s: dict[tuple[str, int], dict[str, float]] = {}  # everyone's first call of what was checked
        self.ours = next(p for p in members if p.ours)
        self.wrong: dict[tuple[str, int], dict[str, str]] = {}  # by what was checked: which of ours is off, and by what

    def close(self) -> None:
        """All end at the same time, since a process that used a GPU takes seconds."""
        end = time.monotonic() + CLOSES_WITHIN_S
        for worker in self.workers.values():
            worker.dismiss()
        for worker in self.workers.values():
            worker.close(within_s=max(0.0, end - time.monotonic()))
        self.caches.cleanup()

    def compare(self, benchmark: Any, what: str, batch: int, *, images: int = 0, **request: Any) -> None:
        """Compare all at one thing and one batch size; the rows go into pytest-benchmark's extra_info.

        Args:
            what: step, inference or epoch.
            images: of an epoch, to tell how long it takes.
            request: what Worker.prepare takes besides.
        """
        checked = "step" if what == "epoch" else what
        first_s = self._check(checked, batch)
        wrong = self.wrong[checked, batch]
        on_gpu = self.device.type == "cuda"
        clocks = [smi_state()] if on_gpu else []
        try:
            prepared = self._prepare(what, batch, **request)
            workers = [self.workers[name] for name in prepared]
            rows = contest(benchmark, workers, prepared, self.ours.name, what, batch, on_gpu=on_gpu, quick=self.quick,
                           images=images)  # fmt: skip
        finally:
            for name in self.members:
                if not self._why_not(self.members[name], what, batch):
                    self.workers[name].ask("release")
        clocks += [smi_state()] if on_gpu else []
        of_data = f", {Path(request['data']).name}" if "data" in request else ""
        for row in rows:
            row |= {"what": self.scale.describe(what) + of_data, "settings": self.members[row["provider"]].settings}
            row |= {"first_s": max(row["first_s"], first_s[row["provider"]]), "clocks": clocks}
            row |= {"wrong": wrong.get(row["provider"])}
        benchmark.extra_info["rows"] = rows
        if wrong:
            pytest.fail("; ".join(f"{name} is wrong, so its time claims nothing: {why}" for name, why in wrong.items()))

    def _prepare(self, what: str, batch: int, **request: Any) -> dict[str, Answer]:
        """Make all ready, one after the other: ours first, so that it does not want for others' memory."""
        prepared: dict[str, Answer] = {}
        for name in sorted(self.members, key=lambda name: not self.members[name].ours):
            provider = self.members[name]
            why = self._why_not(provider, what, batch)
            if not why:
                try:
                    prepared[name] = self.workers[name].ask("prepare", what=what, batch=batch, **request)
                except WorkerError as error:
                    why = str(error)
            if why and provider is self.ours:
                pytest.fail(f"{name}: {why}")
            if why and name not in self.left_out:
                self.left_out[f"{name}, {what} at batch {batch}"] = why
        return prepared

    def _check(self, what: str, batch: int) -> dict[str, float]:
        """Compare everyone's first step, or output, with eager float32's; keep who of ours is wrong in self.wrong.

        Returns:
            Seconds of everyone's first call.
        """
        if (what, batch) in self.first_s:
            return self.first_s[what, batch]
        expected = self.workers[EAGER.name].ask("check", what=what, batch=batch)
        first_s, off = {EAGER.name: expected["first_s"]}, {}
        for name, provider in self.members.items():
            if provider is EAGER or self._why_not(provider, what, batch):
                continue
            within_s = PATIENCE_S
            if self.quick and provider.compile_mode:
                within_s = QUICK_COMPILES_FOR_S - (time.monotonic() - self.begun)
            try:
                got = self.workers[name].ask("check", within_s=within_s, what=what, batch=batch)
                first_s[name], wrong = got["first_s"], difference(got, expected, bounds_of(provider, what, self.device))
            except WorkerError as error:
                if provider is self.ours:
                    pytest.fail(f"{name} fails, so nothing is timed: {error}")
                self.left_out[name] = str(error)
                continue
            if wrong and provider.ours:
                off[name] = wrong
            elif wrong:
                self.left_out[name] = wrong
        self.first_s[what, batch], self.wrong[what, batch] = first_s, off
        return first_s

    def _why_not(self, provider: Provider, what: str, batch: int) -> str:
        if provider.name in self.left_out:
            return self.left_out[provider.name]
        if what == "inference" and provider.engine == "layers":
            return "its generator is what fastp2p.fuse makes, as the other one's of ours"
        known = provider.name in self.first_s.get((what, batch), {})
        late = time.monotonic() - self.begun > QUICK_COMPILES_FOR_S and not known
        if self.quick and provider.compile_mode and (what != "step" or late):
            return "compiling takes longer than --quick has"
        return ""


def contest(
    benchmark: Any,
    workers: Sequence[Worker],
    prepared: dict[str, Answer],
    ours: str,
    what: str,
    batch: int,
    *,
    on_gpu: bool,
    quick: bool,
    images: int = 0,
) -> list[Row]:
    """Let workers that are prepared take turns; a row for each.

    A sample is a step or a forward pass, on a GPU as many as take long enough; of an epoch it is `images` pairs on a
    GPU, a few batches on a CPU.
    """
    if what == "epoch":
        calls = dict.fromkeys(prepared, (images if on_gpu else CPU_PAIRS) // batch)
    elif on_gpu:
        calls = {name: max(1, round(GPU_SAMPLE_MS / told["settled_ms"])) for name, told in prepared.items()}
    else:
        calls = dict.fromkeys(prepared, 1)
    rounds = ROUNDS if not quick else {"epoch": 2}.get(what, 5 if batch == 1 else 3)
    samples = take_turns(benchmark, workers, ours, rounds=rounds, calls=calls)
    rows = samples.rows(suite=what, case=f"{what}, batch {batch}", batch=batch)
    for row in rows:
        name = row["provider"]
        row |= prepared[name] | {"ours": name == ours, "calls": calls[name], "img_per_sec": batch * 1e3 / row["ms"]}
        if images:
            row["s_per_epoch"] = images / row["img_per_sec"]
    return rows


def bounds_of(provider: Provider, what: str, device: torch.device) -> dict[str, float]:
    """How far off it may be."""
    if provider.checked_with_dropout and what == "step":
        return WITH_DROPOUT
    on_gpu = device.type == "cuda"
    exact = TF32 if on_gpu and torch.backends.cudnn.allow_tf32 else FLOAT32
    bounds = HALF if provider.amp or provider.precision in ("bf16", "fp16") else exact
    return bounds | {"later losses": bounds["later losses"] * (LATER_ON_GPU if on_gpu else 1)}


def difference(got: Answer, expected: Answer, bounds: dict[str, float]) -> str:
    """What is farther off than its bound, in words; empty if nothing is."""
    wrong = []
    compared = sorted(expected.keys() & bounds.keys())
    assert compared, "nothing was compared"
    for name in compared:
        distance = relative_distance(got[name], expected[name], each=name.endswith("losses"))
        if not distance <= bounds[name]:  # NaN, too
            wrong.append(f"{name} off by {distance:.2g}, at most {bounds[name]:.2g} is right")
    return ", ".join(wrong)


def relative_distance(got: Sequence[float], expected: Sequence[float], *, each: bool) -> float:
    """Root of the summed squares, to that of what is expected; or the greatest, where each number counts for itself."""
    if each:
        return max(abs(a - b) / abs(b) for a, b in zip(got, expected, strict=True))
    squares = sum((a - b) ** 2 for a, b in zip(got, expected, strict=True))
    return float((squares / sum(b * b for b in expected)) ** 0.5)
