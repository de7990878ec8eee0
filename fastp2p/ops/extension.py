"""fastp2p._C, the kernels in C++ and CUDA: importing it registers them; where it cannot be, why, and what to do."""

import importlib
import importlib.metadata
import importlib.util
import json
import os
import shlex
import shutil
import warnings
from urllib.parse import unquote

import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # Triton's own switch: kernels run on the CPU, for tests


def _load() -> str | None:
    """Import the extension, and return None; or the reason why there is none.

    A module that is there and does not load was built for another PyTorch: that is warned of, and PyTorch serves.
    """
    if INTERPRETED:
        return "TRITON_INTERPRET=1 gives the CPU to Triton's kernels"
    if importlib.util.find_spec("fastp2p._C") is None:
        compiler = os.environ.get("CXX", "c++").split()[0]
        if shutil.which(compiler) is None:
            return f"there is no C++ compiler ({compiler}); install one, then: {_reinstall()}"
        return (
            f"they were not built (FASTP2P_BUILD=none, or no C++ compiler at the time); to build them: {_reinstall()}"
        )
    try:
        importlib.import_module("fastp2p._C")
    except ImportError as error:
        reason = f"it does not load with torch {torch.__version__}: {error}; build it again: {_reinstall()}"
        warnings.warn(f"fastp2p's C++ kernels: {reason}", stacklevel=2)
        return reason
    return None


def _reinstall() -> str:
    """The command that installs fastp2p again from the folder it came from, as pip noted it (PEP 610)."""
    origin = json.loads(importlib.metadata.distribution("fastp2p").read_text("direct_url.json") or "{}")
    if "dir_info" not in origin:  # a wheel, from wherever
        return "pip install --no-build-isolation SOURCE_FOLDER"
    editable = "--editable " if origin["dir_info"].get("editable") else ""
    return f"pip install --no-build-isolation {editable}{shlex.quote(unquote(origin['url'].removeprefix('file://')))}"


WHY_ABSENT = _load()


def describe_extension() -> str:
    """For a report: what it was built for, or why there is none and what to do."""
    if WHY_ABSENT is not None:
        return f"none: {WHY_ABSENT}"
    return str(importlib.import_module("fastp2p._C").BUILT_FOR)
