"""Watching from outside: whether networks and their optimizer are still what an arena was made of."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from fastp2p.errors import InputError


class Watch:
    """Knows networks' parameters and Adam's state by owner, address and version.

    Args:
        nets, optimizer, parameters: the nets', all with a state.
    """

    def __init__(self, nets: Sequence[nn.Module], optimizer: torch.optim.Adam, parameters: list[nn.Parameter]):
        self.optimizer, self.parameters = optimizer, parameters
        modules = [module for net in nets for module in net.modules()]
        self.owners = [(m._parameters, name) for m in modules for name, p in m._parameters.items() if p is not None]
        self.owned = [owner[name] for owner, name in self.owners]
        self.addresses = self._addresses()
        self.note()

    def group(self) -> dict[str, Any]:
        """The optimizer's one group. Raises InputError where its parameters are others, or more."""
        groups = self.optimizer.param_groups
        if len(groups) != 1 or len(groups[0]["params"]) != len(self.parameters):
            raise InputError("engine: the optimizer's groups changed since this step was made: make a new one")
        return groups[0]

    def check(self) -> None:
        """Raise InputError when parameters or moments were replaced, so that they are views of the arena no more, or
        are no longer all trained.
        """
        same = all(owner[name] is p for (owner, name), p in zip(self.owners, self.owned, strict=True))
        if not same or self._addresses() != self.addresses:
            raise InputError(
                "engine: the parameters or the optimizer's state were replaced since this step was made (by .to(), "
                "optimizer.load_state_dict(), load_state_dict(assign=True) or another step): make a new one"
            )

        if not all(p.requires_grad for p in self.parameters):
            raise InputError("engine: a parameter no longer requires a gradient; this engine trains all of a network")

    def has_changed(self) -> bool:
        """Whether a parameter was changed in place since `note`. Autograd does not count an edit of `.data`."""
        return self._versions() != self.versions

    def note(self) -> None:
        """What the parameters are now is known."""
        self.versions = self._versions()

    def _addresses(self) -> list[int]:
        state = self.optimizer.state
        return [tensor.data_ptr() for p in self.parameters for tensor in (p, *state.get(p, {}).values())]

    def _versions(self) -> list[int]:
        return [p._version for p in self.parameters]
