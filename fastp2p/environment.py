"""What this machine and its packages are called, in files' names, results and reports."""

import importlib.metadata
import re
from pathlib import Path


def cpu_model() -> str:
    """The CPU's name as Linux tells it, else cpu. A virtual machine may hide which of its maker's models it is."""
    return cpu_fields().get("model name", "cpu")


def cpu_fields() -> dict[str, str]:
    """What Linux tells of the first core, by name; elsewhere nothing."""
    info = Path("/proc/cpuinfo")
    text = info.read_text() if info.exists() else ""
    return dict(re.findall(r"^(\S[^\t]*?)\s*: (.*)$", text.split("\n\n")[0], re.MULTILINE))


def installed_version(package: str) -> str | None:
    """The version of an installed package as its metadata tell it; None where it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def slug(text: str) -> str:
    """A text as part of a file's name: lower case, dots kept, all else between letters and digits one hyphen."""
    return re.sub(r"[^a-z0-9.]+", "-", text.lower()).strip("-")
