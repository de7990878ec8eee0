"""torch.ops.fastp2p, and the single rule by which a kernel is chosen.

Every operator has a readable PyTorch reference, registered as the dispatcher's default (CompositeExplicitAutograd), so
it runs on every device. A faster kernel is registered on top of it for one device, and PyTorch's dispatcher does the
rest: no model code asks which kernel there is.
"""

from collections.abc import Callable
from typing import Any

import torch

LIBRARY = torch.library.Library("fastp2p", "DEF")

_DISPATCH_KEYS = {"cpu": "CPU", "cuda": "CUDA"}
_names: list[str] = []


def define(name: str, schema: str, *, reference: Callable[..., Any], fake: Callable[..., Any]) -> None:
    """Define the operator fastp2p::name.

    Args:
        name: the operator's name, also that of its files.
        schema: its arguments and returns in PyTorch's schema language, such as "(Tensor x) -> Tensor".
        reference: plain PyTorch; serves every device that has no kernel of its own.
        fake: shapes and dtypes alone, for torch.compile and meta tensors.
    """
    LIBRARY.define(name + schema)
    LIBRARY.impl(name, reference, "CompositeExplicitAutograd")
    torch.library.register_fake(f"fastp2p::{name}", fake, lib=LIBRARY)
    _names.append(name)


def operators() -> list[str]:
    """The names of all operators."""
    return sorted(_names)


def served_by(name: str, device_type: str) -> str:
    """Which implementation a tensor on this device type ("cpu", "cuda") reaches, as the dispatcher itself knows it."""
    own = torch._C._dispatch_has_kernel_for_dispatch_key(f"fastp2p::{name}", _DISPATCH_KEYS[device_type])
    return "a kernel of its own" if own else "reference (PyTorch)"
