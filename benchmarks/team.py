"""The providers' processes: everyone's result is compared first, then they take turns, and the rows tell."""

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
from contest import Row, take_turns
from providers import EAGER, Provider, Scale

HERE = Path(__file__).resolve().parent
ROUNDS = 9
QUICK_COMPILES_FOR_S = 80  # of --quick's three minutes from the beginning; what is not compiled by then is left out
GPU_SAMPLE_MS = 50  # at least, where a step may take less than one
CPU_PAIRS = 4  # of an epoch in a sample: a whole one would take minutes

# Greatest relative distances from eager float32 in the first step or forward pass: a few times those of unet_256 at
# 256 px that NOTES.md has, where eager's own autocast is as far off as our bfloat16.
FLOAT32 = {"losses": 1e-4, "gradient of netG": 1e-2, "gradient of netD": 1e-2, "output": 1e-5}
HALF = {"losses": 1e-2, "gradient of netG": 0.3, "gradient of netD": 0.3, "output": 2e-2}
WITH_DROPOUT = {"losses": 0.05}  # other masks give another first image, which moves D's losses by up to 1 %

Answer = dict[str, Any]


class WorkerError(Exception):
    """A worker could not do what it was asked for; the message has the reason."""


class Worker:
    """A provider in its own process, see worker.py, until `close`."""

    def __init__(self, name: str, *command: str):
        self.name = name
        self.log = tempfile.NamedTemporaryFile(prefix="fastp2p-worker-", suffix=".log")  # noqa: SIM115 (see close)
        self.process = subprocess.Popen(
            [sys.executable, *command], cwd=HERE, start_new_session=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.log, text=True,
        )  # fmt: skip

    @property
    def session(self) -> int:
        return self.process.pid

    def ask(self, do: str, *, within_s: float | None = None, **request: Any) -> Answer:
        """Let it do something.

        Raises:
            WorkerError: when it could not, died of it, or was ended because it took longer than `within_s`.
        """
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        try:
            print(json.dumps({"do": do, **request}), file=self.process.stdin, flush=True)
            if not select.select([self.process.stdout], [], [], within_s)[0]:
                os.killpg(self.process.pid, signal.SIGKILL)
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
            raise WorkerError(answer["error"])
        return answer

    def sample(self, calls: int) -> float:
        return float(self.ask("sample", calls=calls)["ms"])

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        try:
            self.process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.log.close()


class Team:
    """A worker for each provider, begun all at once. Who fails is out, and why is kept.

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
        self.workers = {
            name: Worker(name, str(HERE / "worker.py"), name, "--device", device.type, "--scale", scale.name)
            for name in self.members
        }
        self.begun = time.monotonic()
        self.first_s: dict[tuple[str, int], dict[str, float]] = {}  # of what was checked, everyone's first call
        self.ours = next(p for p in members if p.ours)

    def close(self) -> None:
        for worker in self.workers.values():
            worker.close()

    def compare(self, benchmark: Any, what: str, batch: int, *, images: int = 0, **request: Any) -> None:
        """Compare all at one thing and one batch size; the rows go into pytest-benchmark's extra_info.

        Args:
            what: step, inference or epoch.
            images: of an epoch, to tell how long it takes.
            request: what Worker.prepare takes besides.
        """
        first_s = self._check("step" if what == "epoch" else what, batch)
        prepared = {}
        for name, provider in self.members.items():
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
        settings = {name: self.members[name].settings for name in prepared}
        workers = [self.workers[name] for name in prepared]
        rows = contest(benchmark, workers, prepared, self.ours.name, what, batch, on_gpu=self.device.type == "cuda",
                       quick=self.quick, images=images)  # fmt: skip
        for row in rows:
            row |= {"what": self.scale.describe(what), "settings": settings[row["provider"]]}
            row["first_s"] = max(row["first_s"], first_s[row["provider"]])
        benchmark.extra_info["rows"] = rows
        for worker in workers:
            worker.ask("release")

    def _check(self, what: str, batch: int) -> dict[str, float]:
        """Compare everyone's first step, or output, with eager float32's. Ours fails the test if it is wrong.

        Returns:
            Seconds of everyone's first call.
        """
        if (what, batch) in self.first_s:
            return self.first_s[what, batch]
        expected = self.workers[EAGER.name].ask("check", what=what, batch=batch)
        first_s = {EAGER.name: expected["first_s"]}
        for name, provider in self.members.items():
            if provider is EAGER or self._why_not(provider, what, batch):
                continue
            within_s = None
            if self.quick and provider.compile_mode:
                within_s = QUICK_COMPILES_FOR_S - (time.monotonic() - self.begun)
            try:
                got = self.workers[name].ask("check", within_s=within_s, what=what, batch=batch)
                first_s[name], wrong = got["first_s"], difference(got, expected, bounds_of(provider))
            except WorkerError as error:
                wrong = str(error)
            if wrong and provider.ours:
                pytest.fail(f"{name} is wrong, so nothing is timed: {wrong}")
            if wrong:
                self.left_out[name] = wrong
        self.first_s[what, batch] = first_s
        return first_s

    def _why_not(self, provider: Provider, what: str, batch: int) -> str:
        if provider.name in self.left_out:
            return self.left_out[provider.name]
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


def bounds_of(provider: Provider) -> dict[str, float]:
    """How far off it may be."""
    if provider.checked_with_dropout:
        return WITH_DROPOUT
    return FLOAT32 if not provider.amp and provider.precision in (None, "fp32", "fp64") else HALF


def difference(got: Answer, expected: Answer, bounds: dict[str, float]) -> str:
    """What is farther off than its bound, in words; empty if nothing is."""
    wrong = []
    for name in sorted(expected.keys() & bounds.keys()):
        distance = relative_distance(got[name], expected[name])
        if not distance <= bounds[name]:  # NaN, too
            wrong.append(f"{name} off by {distance:.2g}, at most {bounds[name]:.2g} is right")
    return ", ".join(wrong)


def relative_distance(got: Sequence[float], expected: Sequence[float]) -> float:
    """Root of the summed squares, to that of what is expected; of the four losses the greatest of theirs."""
    if len(expected) == 4:
        return max(abs(a - b) / abs(b) for a, b in zip(got, expected, strict=True))
    squares = sum((a - b) ** 2 for a, b in zip(got, expected, strict=True))
    return float((squares / sum(b * b for b in expected)) ** 0.5)
