"""Watching from outside: whether a network and its optimizer are still what an arena was made of."""

import torch
from torch import nn

from fastp2p.errors import InputError


class Watch:
    """Knows a network's parameters and Adam's state by owner, address and version.

    Args:
        net, optimizer, parameters: net's, all with a state.
    """

    def __init__(self, net: nn.Module, optimizer: torch.optim.Adam, parameters: list[nn.Parameter]):
        self.optimizer, self.parameters = optimizer, parameters
        self.owners = [
            (m._parameters, name) for m in net.modules() for name, p in m._parameters.items() if p is not None
        ]
        self.owned = [owner[name] for owner, name in self.owners]
        self.addresses = self._addresses()
        self.note()

    def check(self) -> None:
        """Raise InputError when parameters or moments were replaced, so that they are views of the arena no more."""
        same = all(owner[name] is p for (owner, name), p in zip(self.owners, self.owned, strict=True))
        if not same or self._addresses() != self.addresses:
            raise InputError(
                "engine: the parameters or the optimizer's state were replaced since this step was made (by .to(), "
                "optimizer.load_state_dict(), load_state_dict(assign=True) or another step): make a new one"
            )

    def has_changed(self) -> bool:
        """Whether a parameter was changed in place since `note`. Autograd does not count an edit of `.data`."""
        return self._versions() != self.versions

    def note(self) -> None:
        """What the parameters are now is known."""
        self.versions = self._versions()

    def _addresses(self) -> list[tuple[int, int]]:
        states = (self.optimizer.state.get(p) for p in self.parameters)
        return [
            (p.data_ptr(), state["exp_avg"].data_ptr() if state else 0)
            for p, state in zip(self.parameters, states, strict=True)
        ]

    def _versions(self) -> list[int]:
        return [p._version for p in self.parameters]
