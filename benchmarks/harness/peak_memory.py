"""Peak memory: on a CUDA GPU what PyTorch's allocator reserves, graphs included; on Linux resident memory."""

import ctypes
import gc
from pathlib import Path

import torch

MIB = 2**20
_CLEAR_REFS, _STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")


class Peak:
    """The most memory that is held at once, beyond what was held at `begin`."""

    def __init__(self, device: torch.device):
        self.device, self.before = device, 0

    def begin(self) -> None:
        """What is held now does not count."""
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            torch.cuda.empty_cache()
            self.before = torch.cuda.memory_reserved(self.device)
        elif _CLEAR_REFS.exists():
            ctypes.CDLL(None).malloc_trim(0)  # free memory that glibc keeps would serve what comes unseen
            self.before = _status("VmRSS")
        self.restart()

    def restart(self) -> None:
        """Forget the peak so far."""
        if self.device.type == "cuda":
            torch.cuda.empty_cache()  # cuDNN tries algorithms that take a lot, once
            torch.cuda.reset_peak_memory_stats(self.device)
        elif _CLEAR_REFS.exists():
            _CLEAR_REFS.write_text("5")  # proc(5): resets the peak resident set size

    def mib(self) -> float | None:
        """MiB; None where nobody counts."""
        if self.device.type == "cuda":
            return (torch.cuda.max_memory_reserved(self.device) - self.before) / MIB
        return (_status("VmHWM") - self.before) / MIB if _CLEAR_REFS.exists() else None


def _status(field: str) -> int:
    """Bytes, of a field of /proc/self/status that is in kB."""
    line = next(line for line in _STATUS.read_text().splitlines() if line.startswith(f"{field}:"))
    return int(line.split()[1]) * 1024
