"""Losses in words."""

from typing import NamedTuple


class Reading(NamedTuple):
    """What losses say of a training, and whether a run should warn of it."""

    text: str
    warns: bool
