"""A pytest plugin, -p helpers.load_extension: the module at $FASTP2P_EXTENSION serves in fastp2p._C's place."""

import importlib.util
import os
import sys

import torch  # noqa: F401  # brings the libraries that the module needs

assert "fastp2p" not in sys.modules, "load_extension comes after fastp2p, which has loaded the installed module"
path = os.environ["FASTP2P_EXTENSION"]
spec = importlib.util.spec_from_file_location("fastp2p._C", path)
assert spec is not None
assert spec.loader is not None, f"{path}: no extension module"
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
sys.modules["fastp2p._C"] = module


def pytest_report_header() -> str:
    return f"fastp2p._C: {path}"
