"""fastp2p._C, the kernels in C++ and CUDA: importing it registers them; where it cannot be, why."""

import importlib
import importlib.util
import os
import warnings

import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # Triton's own switch: kernels run on the CPU, for tests


def _load() -> str | None:
    """Import the extension, and return None; or the reason why there is none.

    A module that is there and does not load was built for another PyTorch: that is warned of, and PyTorch serves.
    """
    if INTERPRETED:
        return "TRITON_INTERPRET=1 gives the CPU to Triton's kernels"
    if importlib.util.find_spec("fastp2p._C") is None:
        return "it was not built: there was no C++ compiler, or FASTP2P_BUILD=none"
    try:
        importlib.import_module("fastp2p._C")
    except ImportError as error:
        reason = f"it does not load with torch {torch.__version__}: {error}"
        warnings.warn(f"fastp2p's C++ kernels: {reason}; install fastp2p again", stacklevel=2)
        return reason
    return None


WHY_ABSENT = _load()


def describe_extension() -> str:
    """For a report: what it was built for, or why there is none."""
    if WHY_ABSENT is not None:
        return f"none: {WHY_ABSENT}"
    return str(importlib.import_module("fastp2p._C").BUILT_FOR)
