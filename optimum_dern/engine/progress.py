"""Progress bars that honour transformers' own switch, and peak memory."""

import resource
import sys
from collections.abc import Iterable

import torch


__all__ = ["peak_memory_bytes", "progress_bar"]


def progress_bar(items: Iterable, description: str, total: int | None = None) -> Iterable:
    """A tqdm bar; `transformers.logging.disable_progress_bar()` silences it."""
    from transformers.utils import logging

    return logging.tqdm(items, desc=description, total=total)


def peak_memory_bytes(device: torch.device) -> int:
    """Highest memory use so far: of the GPU for a CUDA device, else of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
