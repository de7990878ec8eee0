"""Contestants in turn: rounds in which each one has its sample, so that a machine that slows down slows all of them."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from harness.machine import Strangers
from harness.results import Row
from harness.stopwatch import quartiles


class Contestant(Protocol):
    """Who is timed."""

    name: str
    session: int | None  # the process that works for it, where that is another one

    def sample(self, calls: int) -> float:
        """Milliseconds a call, over so many calls one after the other."""


@dataclass(frozen=True)
class Samples:
    """Each contestant's milliseconds a call; and what else was busy meanwhile."""

    ms: dict[str, list[float]]
    strangers: Strangers
    load_average: float | None  # in the minute before

    def rows(self, **facts: Any) -> list[Row]:
        """A row for each contestant."""
        return [
            {
                "provider": name,
                **dict(zip(("first_quartile", "ms", "third_quartile"), quartiles(samples), strict=True)),
                "n": len(samples),
                "strangers_cores": self.strangers.cores(),
                "load_average": self.load_average,
                **facts,
            }
            for name, samples in self.ms.items()
        ]


def take_turns(
    benchmark: Any, contestants: Sequence[Contestant], ours: str, *, rounds: int, calls: dict[str, int]
) -> Samples:
    """Let each have a sample of so many calls in every round, the others in an order that moves on, and then ours.

    What pytest-benchmark times is our turn, as seen from here; the samples are what the contestants measure.
    """
    mine = next(c for c in contestants if c.name == ours)
    others = [c for c in contestants if c is not mine]
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    strangers = Strangers({c.session for c in contestants if c.session is not None})
    samples: dict[str, list[float]] = {c.name: [] for c in contestants}

    def turn_of(contestant: Contestant) -> None:
        samples[contestant.name].append(contestant.sample(calls[contestant.name]))

    def turns_of_the_others() -> None:
        strangers.begin()
        done = len(samples[ours])
        for i in range(len(others)):
            turn_of(others[(i + done) % len(others)])

    def turn_of_ours() -> None:
        turn_of(mine)
        strangers.end()

    benchmark.pedantic(turn_of_ours, setup=turns_of_the_others, rounds=rounds)
    return Samples(samples, strangers, load)
