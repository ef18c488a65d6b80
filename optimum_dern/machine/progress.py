"""Progress bars that follow transformers' setting, and the memory that is there and in use."""

import resource
import sys
from collections.abc import Iterable
from pathlib import Path

import psutil
import torch

from .torch_state import GPUS


__all__ = ["peak_memory_bytes", "progress_bar", "resident_bytes", "total_memory"]

CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")  # of a container


def progress_bar(items: Iterable, description: str, total: int | None = None) -> Iterable:
    """Wrap items in a tqdm bar, which `transformers.logging.disable_progress_bar()` turns off."""
    from transformers.utils import logging

    return logging.tqdm(items, desc=description, total=total)


def peak_memory_bytes(devices: Iterable[torch.device]) -> int:
    """Return the peak memory so far, of the GPUs among some devices together, or of the process if there are none."""
    if gpus := [device for device in devices if device.type in GPUS]:
        return sum(torch.get_device_module(gpu).max_memory_allocated(gpu) for gpu in gpus)
    status = _process_status()
    if "VmHWM" in status:  # unlike ru_maxrss it does not include the parent process's memory
        return status["VmHWM"]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def resident_bytes(devices: Iterable[torch.device]) -> int:
    """Return the memory in use, of the GPUs among some devices, or of the process if there are none (0 if unknown)."""
    if gpus := [device for device in devices if device.type in GPUS]:
        return sum(torch.get_device_module(gpu).memory_allocated(gpu) for gpu in gpus)
    return _process_status().get("VmRSS", 0)


def total_memory(device: torch.device) -> int:
    """Return the memory that this process may use, in bytes: of a GPU, else of the machine or its container."""
    if device.type in GPUS:
        return torch.get_device_module(device).get_device_properties(device).total_memory
    limits = [resource.getrlimit(kind)[0] for kind in (resource.RLIMIT_AS, resource.RLIMIT_DATA)]
    limits = [limit for limit in limits if limit != resource.RLIM_INFINITY]
    text = CGROUP_LIMIT.read_text().strip() if CGROUP_LIMIT.exists() else ""
    return min([psutil.virtual_memory().total, *limits, *([int(text)] if text.isdecimal() else [])])


def _process_status() -> dict[str, int]:
    """Read the memory entries of Linux's /proc/self/status, in bytes."""
    path = Path("/proc/self/status")
    lines = path.read_text().splitlines() if path.exists() else []
    return {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines if line.startswith("Vm")}
