"""Progress bars that honour transformers' own switch, and memory in use."""

import resource
import sys
from collections.abc import Iterable
from pathlib import Path

import torch


__all__ = ["peak_memory_bytes", "progress_bar", "resident_bytes"]


def progress_bar(items: Iterable, description: str, total: int | None = None) -> Iterable:
    """A tqdm bar; `transformers.logging.disable_progress_bar()` silences it."""
    from transformers.utils import logging

    return logging.tqdm(items, desc=description, total=total)


def peak_memory_bytes(device: torch.device) -> int:
    """Highest memory use so far: of the GPU for a CUDA device, else of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = _process_status()
    if "VmHWM" in status:  # unlike ru_maxrss it does not start at what the parent process had
        return status["VmHWM"]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def resident_bytes(device: torch.device) -> int:
    """Memory in use now: of the GPU for a CUDA device, else of the process (0 where the system does not tell)."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    return _process_status().get("VmRSS", 0)


def _process_status() -> dict[str, int]:
    """The memory lines of Linux's /proc/self/status, in bytes."""
    path = Path("/proc/self/status")
    lines = path.read_text().splitlines() if path.exists() else []
    return {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines if line.startswith("Vm")}
